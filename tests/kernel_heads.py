"""What the tests of the kernels' platforms share: heads, a call with its gradients, and how numbers are compared."""

import jax
import jax.numpy as jnp
import numpy as np

from mhajax import kernels
from mhajax.masks import tokens

B, N, K, T, S, H, HV = 2, 6, 3, 11, 13, 5, 7
LENGTHS = np.array([9, 0])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def heads_of(t=T, s=S, h=H, hv=HV, k=K):
    return normal(B, N, t, h, seed=1), normal(B, k, s, h, seed=2), normal(B, k, s, hv, seed=3)


def with_gradients(function):
    """(q, k, v) → output and the gradients of a weighted sum of it."""

    def both(q, k, v):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(jnp.asarray(normal(*out.shape, seed=4), out.dtype))

    return jax.jit(both)


def attend(t=T, s=S, **options):
    def function(q, k, v):
        return kernels.attend(q, k, v, queries=tokens(t), keys=tokens(s), **options)[0]

    return function


def error(got, expected):
    """Largest difference, relative to the largest number."""
    return float(np.max(np.abs(np.asarray(got) - expected)) / np.max(np.abs(expected)))


def assert_close(got, expected, most=2e-6):
    assert [error(a, b) < most for a, b in zip(got, expected, strict=True)] == [True] * len(expected)
