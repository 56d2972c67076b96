"""What the tests of attention in the place of others' share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference import numbers

B, T, S, N, K, H, D = 3, 5, 7, 6, 2, 11, 12
RANDOM = np.random.default_rng(0)
SEEN = RANDOM.random((B, N, T, S)) < 0.6
SEEN[..., 0] = True  # every query sees a key: where it sees none, the peers are wrong
LENGTHS, QUERY_LENGTHS = np.array([4, 7, 1], np.int32), np.array([5, 2, 3], np.int32)


def arrays(kv_heads: int = K, dtype: str = "float32") -> Any:
    """q [B, T, N, H], k and v [B, S, K, H]."""
    shapes = (B, T, N, H), (B, S, kv_heads, H), (B, S, kv_heads, H)
    return tuple(jnp.asarray(numbers(seed, *shape), dtype) for seed, shape in enumerate(shapes))


def near(got, expected, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=tolerance), got, expected)
