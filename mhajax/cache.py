"""Keys and values already seen, so that a token attends to the past without computing it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from mhajax import attention


class Cache(NamedTuple):
    """Room for `capacity` keys and values of every head, of which the first `length` are filled."""

    k: Array  # [..., K, capacity, H]
    v: Array  # [..., K, capacity, Hv]
    length: Array  # [], int32

    @property
    def capacity(self) -> int:
        """Number of tokens that fit."""
        return self.k.shape[-2]


def init(leading: Sequence[int], capacity: int, config: attention.Config, dtype=jnp.float32) -> Cache:
    """An empty cache for inputs [*leading, T, D]."""
    heads = (*leading, config.kv_heads, capacity)
    return Cache(jnp.zeros((*heads, config.width), dtype), jnp.zeros((*heads, config.value_width), dtype), jnp.int32(0))


def check_room(cache: Cache, size: int) -> None:
    """Raise a ValueError if `size` more tokens are known not to fit; the cache may be that of a stack, [L, ...]."""
    known = not isinstance(cache.length, Tracer)
    length = int(jnp.max(cache.length)) if known else 0
    if length + size > cache.capacity:
        raise ValueError(
            f"cache.append: {size} more tokens must fit, got a cache of capacity {cache.capacity} that holds "
            f"{length if known else 'an unknown number'}; make it larger with cache.init(…, capacity, …)."
        )


def append(cache: Cache, new: attention.KeysValues) -> Cache:
    """The cache with t more tokens.

    A cache that would overflow is an error where its length is known. Under jit it cannot raise: then the new keys are
    NaN, so that every query which sees them is NaN too, rather than quietly wrong.

    Args:
      cache: what was seen.
      new: keys [..., K, t, H] and values [..., K, t, Hv] of the next t tokens.

    Raises:
      ValueError: if the tokens do not fit and the length is a concrete number.
    """
    size = new.k.shape[-2]
    check_room(cache, size)
    overflow = cache.length + size > cache.capacity
    k = jnp.where(overflow, jnp.nan, new.k.astype(cache.k.dtype))
    return Cache(
        jax.lax.dynamic_update_slice_in_dim(cache.k, k, cache.length, axis=-2),
        jax.lax.dynamic_update_slice_in_dim(cache.v, new.v.astype(cache.v.dtype), cache.length, axis=-2),
        cache.length + size,
    )
