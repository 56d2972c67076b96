"""Arrays that broadcast to [..., N, T, S] and the like, brought to the shapes that the paths take."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def full_rank(array: Array, rank: int) -> Array:
    """The array with axes of 1 in front."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def check_full_rank(
    name: str, array: Array, full: tuple[int, ...], axes: str = "[..., N, T, S]", who: str = "attention",
    advice: str = "use 1 for an axis that is shared",
) -> Array:  # fmt: skip
    """The array with axes of 1 in front: [..., 1 or N, t, s]. What is said besides is for the error.

    Raises:
      ValueError: if it does not broadcast to the full shape.
    """
    shape = (1,) * (len(full) - array.ndim) + array.shape
    if len(shape) > len(full) or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise ValueError(f"{who}: {name} must broadcast to {axes} = {full}, got {array.shape}; {advice}.")
    return full_rank(array, len(full))


def flatten_leading(array: Array, leading: Sequence[int], groups: tuple[int, ...] | None = None) -> Array:
    """[..., 1 or N, t, s] to [B or 1, 1 or N, t, s]; with groups (K, N/K) to [B or 1, K or 1, N/K or 1, t, s]."""
    *have, heads, t, s = array.shape
    if math.prod(have) not in (1, math.prod(leading)):  # only some of the leading axes are shared
        array, have = jnp.broadcast_to(array, (*leading, heads, t, s)), leading
    split = (heads,) if groups is None else (1,) * len(groups) if heads == 1 else groups
    return array.reshape(math.prod(have), *split, t, s)


def scale_queries(q: Array, scale: float | Array | None) -> tuple[Array, float]:
    """The queries, and the number by which their products are multiplied; an array is multiplied into the queries."""
    if scale is None:
        return q, q.shape[-1] ** -0.5
    if not isinstance(scale, jax.Array | np.ndarray):
        return q, scale
    scale = check_full_rank("scale", jnp.asarray(scale), (*q.shape[:-1], 1), "[..., N, T, 1]")
    return (q * scale.astype(jnp.promote_types(q.dtype, jnp.float32))).astype(q.dtype), 1.0
