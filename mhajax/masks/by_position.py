"""Masks that compare positions, so that caches, packed texts and T ≠ S are right: causal, window, prefix, chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mhajax.masks import static
from mhajax.masks.algebra import Mask, brief
from mhajax.masks.conditions import Conditions, smaller
from mhajax.masks.static import across, aligned, apart
from mhajax.masks.tiles import Tiles, equal, extremes, extremes_of_pairs, on_grid
from mhajax.masks.tokens import Tokens, positions, signed


class _Shared(Mask):
    """A mask that compares positions and has no arrays that differ between examples or heads."""

    def indexed(self) -> tuple[bool, bool]:
        return False, False

    def prepare(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        return self

    def at(self, example: Array, head: Array) -> Mask:
        return self


class Causal(_Shared):
    """Key position ≤ query position."""

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        q, k = positions(queries, keys)
        return k <= q

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        q, k = static.numbers(queries.position, keys.position)
        first_q, last_q, first_k, last_k = extremes_of_pairs(q, k, block_q, block_k)
        return on_grid(first_k <= last_q, last_k <= first_q, queries, keys, block_q, block_k)

    def add_to(self, found: Conditions) -> Conditions:
        return found._replace(causal=True)


class Window(_Shared):
    """Query position - before ≤ key position ≤ query position + after."""

    before: ArrayLike  # []
    after: ArrayLike  # []

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        q, k = positions(queries, keys)
        distance = q - k
        return (distance <= jnp.asarray(self.before)) & (-distance <= jnp.asarray(self.after))

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        q, k, before, after = static.numbers(queries.position, keys.position, self.before, self.after)
        first_q, last_q, first_k, last_k = extremes_of_pairs(signed(q), signed(k), block_q, block_k)
        least, most = first_q - last_k, last_q - first_k  # distances in the tile
        nonempty = (least <= before) & (-most <= after)
        full = (most <= before) & (-least <= after)
        return on_grid(nonempty, full, queries, keys, block_q, block_k)

    def add_to(self, found: Conditions) -> Conditions:
        sides = zip((self.before, self.after), found.window or (None, None), strict=True)
        before, after = (smaller(side, other) for side, other in sides)
        return found._replace(window=(before, after))

    def __repr__(self) -> str:
        after = brief(self.after)
        return f"window(before={brief(self.before)}{'' if after == '0' else f', after={after}'})"


class Prefix(Mask):
    """Key position < length."""

    length: ArrayLike  # [] or [...]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        position, length = aligned(across(jnp.asarray(keys.position)), apart(jnp.asarray(self.length)))
        return position < length

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        k, length = static.numbers(keys.position, self.length)
        first, last, length = aligned(*map(across, extremes(k, block_k)), apart(length))
        return on_grid(first < length, last < length, queries, keys, block_q, block_k)

    def prepare(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        return Prefix(static.flat(self.length, leading))

    def at(self, example: Array, head: Array) -> Mask:
        return Prefix(static.entry(self.length, example))


class Chunk(_Shared):
    """Query position // size = key position // size."""

    size: ArrayLike  # []

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        size = jnp.asarray(self.size)
        q, k = positions(queries, keys)
        return q // size == k // size

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        q, k, size = static.numbers(queries.position, keys.position, self.size)
        return equal(q // size, k // size, queries, keys, block_q, block_k)


class Function(_Shared):
    """What a function of one query and one key says."""

    mask_fn: Callable[..., Any] = field(metadata={"static": True})
    arrays: tuple[Any, ...]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        pair = lambda q, k: jnp.asarray(self.mask_fn(q, k, *self.arrays))  # noqa: E731
        return jnp.vectorize(pair)(*positions(queries, keys))


def causal() -> Mask:
    """A query attends to keys at its own position and before: key position ≤ query position.

    Positions, not indices, are compared, so it is right for caches and for T ≠ S: with the default positions, query 0
    attends to key 0 only.
    """
    return Causal()


def window(before: ArrayLike, *, after: ArrayLike = 0) -> Mask:
    """A sliding window: keys from `before` positions before the query to `after` positions after it.

    The query's own position is in the window and not counted: `window(3)` is 4 keys, itself and 3 before, which is
    `sliding_window = 4` in the configuration of Mistral and `local_window_size = (3, 0)` in `jax.nn`.

    Args:
      before: how far back, an integer ≥ 0.
      after: how far ahead, an integer ≥ 0; by name only, as `window(2, 3)` would be easy to misread.

    Raises:
      TypeError: if they are not integers.
      ValueError: if one is known to be negative.

    >>> tokens = Tokens(0, np.arange(4))
    >>> window(1).block(tokens, tokens)[2].tolist()
    [False, True, True, False]

    References:
      Beltagy et al. 2020, "Longformer", section 3.1 (their w is before + after). Jiang et al. 2023, "Mistral 7B",
      section 2 (their W is before + 1).
    """
    return Window(
        _integer("window", "before", before, 0, "0 is the query's own position only"),
        _integer("window", "after", after, 0, "0 is nothing ahead of the query"),
    )


def prefix(length: ArrayLike) -> Mask:
    """All attend to keys at positions below `length`; `causal() | prefix(n)` reads a prompt in both directions.

    Args:
      length: tokens of the prefix, an integer or integers [...] with the leading axes of the input.

    Raises:
      TypeError: if the length is not an integer.

    References:
      Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 3.2.1 (prefix language model).
    """
    return Prefix(_integer("prefix", "length", length, 0, "0 is no prefix", scalar=False))


def chunk(size: ArrayLike) -> Mask:
    """A query attends to the keys of its own chunk of `size` positions: q // size = k // size.

    Meant as `causal() & chunk(size)`, the local attention of Llama 4 (`attention_chunk_size`).

    Args:
      size: positions in a chunk, an integer ≥ 1.

    Raises:
      TypeError: if the size is not an integer.
      ValueError: if it is known to be below 1.
    """
    return Chunk(_integer("chunk", "size", size, 1, "1 is the query's own position only"))


def function(mask_fn: Callable[..., Any], *arrays: Any) -> Mask:
    """A mask of your own, written for one query and one key.

    Nothing is known about it before it is called, so a kernel evaluates every tile. Where it has a bound, say so with
    another mask: `function(mask_fn) & window(512)` leaves out what is further away.

    Args:
      mask_fn: (query position, key position, *arrays) → bool, all scalars but the arrays; it is mapped over the pairs
        that are asked for. It is static under jit, so hand over the same function each time, not a new lambda.
      *arrays: what it reads: pytrees of arrays, whole for every pair. New values do not retrace.

    Raises:
      TypeError: if mask_fn cannot be called, or does not return one boolean.

    >>> tokens = Tokens(0, np.arange(4))
    >>> dilated = function(lambda q, k, step: (q - k) % step == 0, 2)
    >>> dilated.block(tokens, tokens)[3].tolist()
    [False, True, False, True]

    References:
      Dong et al. 2024, "Flex Attention" (their mask_mod, which is also given batch and head).
    """
    if not callable(mask_fn):
        raise TypeError(
            f"masks.function: mask_fn must be a function (q_position, k_position, *arrays) -> bool, "
            f"got {type(mask_fn).__name__}; wrap an array: masks.dense(array)."
        )
    arrays = jax.tree.map(static.given, arrays)
    position = jax.ShapeDtypeStruct((), jnp.int32)
    told = jax.eval_shape(lambda q, k, arrays: mask_fn(q, k, *arrays), position, position, arrays)
    if getattr(told, "shape", None) != () or told.dtype != bool:
        got = f"{told.dtype} {told.shape}" if isinstance(told, jax.ShapeDtypeStruct) else type(told).__name__
        raise TypeError(
            "masks.function: mask_fn must return one boolean, shape (), for one query position and one key position, "
            f"got {got}; return a comparison such as k <= q, combined with & and |."
        )
    return Function(mask_fn, arrays)


def _integer(who: str, name: str, value: ArrayLike, least: int, hint: str, scalar: bool = True) -> ArrayLike:
    """The value, if it is an integer (one, unless said otherwise) and, where that is known, not below `least`."""
    value = static.given(value)
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"masks.{who}: {name} must be an integer, got {dtype}; {hint}.")
    if scalar and jnp.ndim(value):
        both = "window(before, after=…) looks to both sides, " if who == "window" else ""
        raise TypeError(
            f"masks.{who}: {name} must be one integer, got shape {jnp.shape(value)}; {both}vmap for several."
        )
    if static.known(value) and np.any(np.asarray(value) < least):
        raise ValueError(f"masks.{who}: {name} must be at least {least}, got {np.asarray(value)}; {hint}.")
    return value
