"""What replaces a quantity of the heads, brought to its shape and mixed in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from mhajax.interventions import Patch
from mhajax.kernels import finite, shapes

_times = finite.guarded(jnp.multiply)


def materialise(patch: Patch, rank: int) -> tuple[Array, Array]:
    """Value and amount of a patch with all axes of the quantity, [..., N, T, H] or the like; 1 where shared."""
    return shapes.full_rank(jnp.asarray(patch.value), rank), by_token(patch.amount, rank)


def by_token(amount: Any, rank: int) -> Array:
    """An amount [], [N], [..., N] or [..., N, T] with all axes of a quantity [..., N, T, H]; 1 where shared."""
    amount = jnp.asarray(amount)
    missing = 1 if amount.ndim == rank - 1 else min(2, rank)
    return shapes.full_rank(amount.reshape(*amount.shape, *(1,) * missing), rank)


def mix(x: Array, value: Array, amount: Array) -> Array:
    """x · (1 - amount) + value · amount, in the dtype of x; exactly one of them where the amount is a boolean, 0 or 1.

    In the derivative of the amount what is not finite counts as 0.
    """
    if amount.dtype == bool:
        return jnp.where(amount, value.astype(x.dtype), x)
    amount = amount.astype(x.dtype)
    return _times(x, 1 - amount) + _times(value.astype(x.dtype), amount)


def apply(x: Array, patch: Patch | None) -> Array:
    """The quantity x with its patch; as it is without one."""
    return x if patch is None else mix(x, *materialise(patch, x.ndim))
