"""What several test files share, and how they compile."""

import os

# Before JAX is imported, and for the processes that tests start too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # several test processes cannot share one accelerator
# Nearly all of the time is the compiler's. So it takes a tenth of it, and the numbers are held to the same bounds;
# `full_compiles` is for what must be compiled as users do, and `XLA_FLAGS= python -m pytest` compiles everything so.
# The last option takes a third of all time off compilers that still have a second, simpler way to make loops; the
# newest do not and pass over it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
)

from functools import partial

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# A file is one process's, so what takes longest comes first: at the end no process waits for another.
LONGEST = (
    "test_experiments", "test_attention", "test_kernels", "test_attention_inside", "test_doors", "test_word_sense",
    "test_readme", "test_docs", "test_cli", "test_attention_masking", "test_cache", "test_cache_rows", "test_masks",
    "test_own_masks", "test_roles", "test_variants", "test_scores", "test_runs", "test_view", "test_training",
    "test_generated_tasks", "test_process", "test_recipes",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Examples in docstrings are in the slow tier; those of README run every time. The longest files come first."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module")
def quick_compiles():
    """Compile with few optimisations, for tests of whole models, whose time is all spent in the compiler."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Keep what is compiled, for tests that compile the same programs again, in other processes too."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")  # fmt: skip
    values = (str(tmp_path_factory.mktemp("compiled")), 0, -1)
    before = [getattr(jax.config, name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def full_compiles():
    """`jax.jit` with all optimisations, as users have it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    options = {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
        "xla_cpu_parallel_codegen_split_count": 32,
    }
    yield partial(jax.jit, compiler_options=options)
    jax.config.update("jax_disable_most_optimizations", before)
