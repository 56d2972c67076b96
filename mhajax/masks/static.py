"""What is known while a program is traced: arithmetic that stays in NumPy as long as its numbers are there.

A kernel decides which tiles to leave out when it is traced; inside `jit` every JAX operation gives a tracer, even on
constants. So what goes into the bounds of tiles is NumPy where it can be, and JAX where it must.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhajax.arguments import known


def numbers(*values: Any) -> list[Any]:
    """All of them as NumPy arrays if all are known, else all as JAX arrays."""
    return [(np if known(*values) else jnp).asarray(value) for value in values]


def library(array: Any) -> ModuleType:
    """NumPy or jax.numpy, whichever the array is of."""
    return jnp if isinstance(array, jax.Array) else np


def given(value: Any) -> Any:
    """What a user gives for an array: numbers and arrays as they are, lists and the like as an array."""
    if isinstance(value, bool | int | float | np.generic | np.ndarray | jax.Array):
        return value
    try:
        return np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list of tracers
        return jnp.asarray(value)


def down(values: Any) -> Any:
    """Values of the queries, [t] or [..., t], as a column that broadcasts over heads and keys."""
    return values[:, None] if values.ndim == 1 else values[..., None, :, None]


def across(values: Any) -> Any:
    """Values of the keys, [s] or [..., s], as a row that broadcasts over heads and queries."""
    return values[None, :] if values.ndim == 1 else values[..., None, None, :]


def apart(value: Any) -> Any:
    """One value for all, [], or one for every example, [...], as it broadcasts over heads, queries and keys."""
    return value[..., None, None, None] if value.ndim else value


def aligned(*arrays: Any) -> tuple[Any, ...]:
    """The arrays with axes of 1 in front, so that all have the same rank, which JAX can be told to insist on."""
    rank = max(array.ndim for array in arrays)
    return tuple(array.reshape((1,) * (rank - array.ndim) + array.shape) for array in arrays)


def flat(values: Any, leading: tuple[int, ...], axes: int = 0) -> Any:
    """[] or [...] (before so many axes of its own) with the leading axes flattened to one; shared values stay."""
    values = jnp.asarray(values)
    if values.ndim == axes:
        return values
    own = values.shape[values.ndim - axes :]
    return jnp.broadcast_to(values, (*leading, *own)).reshape(-1, *own)


def flat_pairs(pairs: Any, leading: tuple[int, ...], padding: tuple[int, int]) -> Any:
    """Pairs [T, S] or [..., 1 or N, T, S] as [B or 1, 1 or N, T or 1, S or 1], with padding."""
    for axis, size in zip((-2, -1), padding, strict=True):
        pairs = pairs if pairs.shape[axis] == 1 else longer(pairs, axis, size)
    pairs = pairs if pairs.ndim > 2 else pairs[None]
    if any(size != 1 for size in pairs.shape[:-3]):  # not shared by all examples
        pairs = jnp.broadcast_to(pairs, (*leading, *pairs.shape[-3:]))
    return pairs.reshape(-1, *pairs.shape[-3:])


def entry(values: Any, example: jax.Array, axes: int = 0) -> Any:
    """One example's values of those that are `flat`."""
    return values if jnp.ndim(values) == axes else values[example]


def longer(values: Any, axis: int, size: int) -> jax.Array:
    """The array with `size` more entries along an axis, copies of the last."""
    values = jnp.asarray(values)
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, size)
    return jnp.pad(values, widths, mode="edge") if size else values
