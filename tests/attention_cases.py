"""What the tests of attention share: a small attention, its inputs, and how numbers are compared."""

from typing import Any

import jax
import numpy as np
import reference
from reference import numbers

from mhajax import attention
from mhajax.attention import Config

B, T, S, D, H, HV = 4, 13, 17, 11, 5, 7
apply = jax.jit(attention.apply, static_argnames=("config", "rotate", "dropout_rate"))
apply_captured = jax.jit(attention.apply_captured, static_argnames=("config", "rotate", "dropout_rate", "capture"))

SMALL = Config(d_model=6, num_heads=3, num_kv_heads=1, head_dim=2, value_dim=5, use_bias=True)


def random_params(config: Config, seed: int = 0, dtype: Any = np.float32) -> Any:
    return reference.random_params(attention.init_params, config, seed, dtype)


def booleans(seed: int, *shape: int) -> Any:
    """About half True, with a row of queries that sees nothing."""
    array = np.random.default_rng(seed).random(shape) < 0.5
    array[..., 1, :] = False
    return array


def close(got: Any, expected: Any, tolerance: float) -> None:
    """Every number within the tolerance, relative to the largest expected one."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.all(np.isfinite(expected))
    np.testing.assert_array_less(np.abs(got - expected).max(initial=0), tolerance * np.abs(expected).max(initial=1))


def small(seed: int = 0, leading: Any = (2,), size: int = 5, memory: int | None = None) -> Any:
    """Parameters and inputs for SMALL."""
    x = numbers(seed + 1, *leading, size, 6)
    return random_params(SMALL, seed), x, None if memory is None else numbers(seed + 2, *leading, memory, 6)
