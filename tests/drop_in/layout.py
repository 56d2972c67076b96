"""What the adapters share: [..., T, N, H] to [..., N, T, H], and arrays whose axes could be misread."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array


def heads_first(who: str, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Queries [..., T, N, H], keys [..., S, K, H] and values [..., S, K, Hv] with the heads before the tokens.

    Raises:
      ValueError: for sizes that do not belong together.
    """
    shapes = f"got query {query.shape}, key {key.shape} and value {value.shape}."
    if not 3 <= query.ndim == key.ndim == value.ndim:
        raise ValueError(f"{who}: query, key and value must have the same rank, [..., T, N, H]; {shapes}")
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"{who}: the batch dims must match; {shapes}")
    if key.shape[-3] != value.shape[-3]:
        raise ValueError(f"{who}: key and value lengths must match; {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{who}: query and key depths must match; {shapes}")
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{who}: key and value must have as many heads, and the heads of query must be a multiple of that; {shapes}"
        )
    return jnp.swapaxes(query, -2, -3), jnp.swapaxes(key, -2, -3), jnp.swapaxes(value, -2, -3)


def full_rank(who: str, name: str, array: Any, rank: int) -> Array:
    """A mask or bias with the axes [..., N, T, S] that it lacks, where there is only one way to read it.

    Raises:
      ValueError: if leading axes are missing and another one could be taken for them.
    """
    array = jnp.asarray(array)
    if array.ndim < rank and any(size > 1 for size in array.shape[:-2]) or array.ndim > rank:
        raise ValueError(
            f"{who}: {name} must have {rank} axes, [..., N, T, S] with 1 where it is shared, got {array.shape}; "
            f"write {name}[None] for one per head, {name}[:, None] for one per example."
        )
    return array.reshape((1,) * (rank - array.ndim) + array.shape)
