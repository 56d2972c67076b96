"""What several test files share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # several test processes cannot share one accelerator

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compiles():
    """Compile with few optimisations, for tests of whole models, whose time is all spent in the compiler."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
