"""Masks that look up arrays by index: lengths, segments, and pairs written out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mhajax.arguments import kind_of
from mhajax.masks import static
from mhajax.masks.algebra import Mask, Pairs, uncalled
from mhajax.masks.conditions import Conditions, smaller
from mhajax.masks.static import across, aligned, apart, down
from mhajax.masks.tiles import Tiles, equal, of_pairs, on_grid
from mhajax.masks.tokens import Tokens


class Lengths(Mask):
    """Keys with an index below the length."""

    lengths: ArrayLike  # [] or [...]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        index, lengths = aligned(across(keys.index), apart(jnp.asarray(self.lengths)))
        return index < lengths

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        lengths, start = static.numbers(self.lengths, keys.start)
        begin = np.arange(0, keys.size, block_k)
        end = np.minimum(begin + block_k, keys.size) - 1
        first, last, lengths = aligned(across(start + begin), across(start + end), apart(lengths))
        return on_grid(first < lengths, last < lengths, queries, keys, block_q, block_k)

    def add_to(self, found: Conditions) -> Conditions:
        return found._replace(lengths=smaller(self.lengths, found.lengths))

    def prepare(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        return Lengths(static.flat(self.lengths, leading))

    def at(self, example: Array, head: Array) -> Mask:
        return Lengths(static.entry(self.lengths, example))


class Segments(Mask):
    """Queries and keys of the same segment."""

    queries: ArrayLike  # [T] or [..., T]
    keys: ArrayLike  # [S] or [..., S]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        q, k = jnp.asarray(_cut(self.queries, -1, queries)), jnp.asarray(_cut(self.keys, -1, keys))
        q, k = aligned(down(q), across(k))
        return q == k

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        q, k = static.numbers(_cut(self.queries, -1, queries), _cut(self.keys, -1, keys))
        return equal(q, k, queries, keys, block_q, block_k)

    def add_to(self, found: Conditions) -> Conditions:
        return super().add_to(found) if found.segments else found._replace(segments=(self.queries, self.keys))

    def sizes(self) -> tuple[int | None, int | None]:
        return jnp.shape(self.queries)[-1], jnp.shape(self.keys)[-1]

    def prepare(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        longer = (static.longer(ids, -1, size) for ids, size in zip((self.queries, self.keys), padding, strict=True))
        return Segments(*(static.flat(ids, leading, axes=1) for ids in longer))

    def at(self, example: Array, head: Array) -> Mask:
        return Segments(*(static.entry(ids, example, axes=1) for ids in (self.queries, self.keys)))


class Dense(Mask):
    """Every pair written out."""

    array: ArrayLike  # [T, S] or [..., 1 or N, T, S]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return jnp.asarray(_cut(_cut(self.array, -2, queries), -1, keys))

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        (pairs,) = static.numbers(_cut(_cut(self.array, -2, queries), -1, keys))
        return on_grid(*of_pairs(pairs, block_q, block_k), queries, keys, block_q, block_k)

    def sizes(self) -> tuple[int | None, int | None]:
        queries, keys = jnp.shape(self.array)[-2:]
        return None if queries == 1 else queries, None if keys == 1 else keys

    def prepare(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        return Pairs(static.flat_pairs(jnp.asarray(self.array), leading, padding))


def lengths(lengths: ArrayLike) -> Mask:
    """Sequences padded at the end: keys with index < length may be attended to.

    Args:
      lengths: number of real keys, an integer or integers [...] with the leading axes of the input. 0 is allowed: such
        a row is fully masked and gives exact zeros.

    Raises:
      TypeError: if the lengths are not integers.
    """
    lengths = static.given(lengths)
    dtype = jnp.result_type(lengths)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"masks.lengths: lengths must be integers, got {dtype}; "
            "for a boolean array that is True at real keys use masks.dense(array[:, None, None, :])."
        )
    return Lengths(lengths)


def segments(queries: ArrayLike, keys: ArrayLike | None = None) -> Mask:
    """Several texts packed into one row: a query attends to the keys of its own segment.

    Args:
      queries: segment of every query, integers [T] or [..., T] with the leading axes of the input.
      keys: segment of every key, [S] or [..., S]; the same as `queries` if it is left out.
    """
    queries = static.given(queries)
    return Segments(queries, queries if keys is None else static.given(keys))


def dense(array: ArrayLike) -> Mask:
    """A boolean array, True = may attend.

    Args:
      array: [T, S], shared by all examples and heads, or [B, N, T, S] in which any axis may be 1.

    Raises:
      TypeError: if the array is not boolean.
      ValueError: if it has three axes, which could mean one mask per example or one per head.
    """
    pairs = _boolean(array, "masks.dense")
    if pairs.ndim == 3 or pairs.ndim < 2:
        raise ValueError(
            f"masks.dense: array must be [T, S] or [B, N, T, S], got {pairs.shape}; three axes could mean one mask per "
            "example or one per head: say which with masks.per_example(array) or masks.per_head(array)."
        )
    return Dense(pairs)


def per_example(array: ArrayLike) -> Mask:
    """One mask per example, boolean [..., T, S] with the leading axes of the input, shared by its heads."""
    pairs = _boolean(array, "masks.per_example")
    if pairs.ndim < 3:
        raise ValueError(f"masks.per_example: array must be [B, T, S], got {pairs.shape}; use masks.dense for [T, S].")
    return Dense(pairs[..., None, :, :])


def per_head(array: ArrayLike) -> Mask:
    """One mask per head, boolean [N, T, S], shared by all examples."""
    pairs = _boolean(array, "masks.per_head")
    if pairs.ndim != 3:
        raise ValueError(f"masks.per_head: array must be [N, T, S], got {pairs.shape}; use masks.dense for others.")
    return Dense(pairs)


def as_mask(mask: Mask | ArrayLike | None, who: str = "attention.apply") -> Mask | None:
    """A Mask as it is, None (everything may attend) as it is, a boolean array through `dense`.

    Raises:
      TypeError, ValueError: for another array, as `dense`; for a function that would have to be called, as `who`.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    uncalled(who, mask)
    if not hasattr(mask, "dtype") and np.asarray(mask).dtype.kind in "OUS":  # a name, a dict, rows of unequal lengths
        raise TypeError(
            f"{who}: mask must be a Mask or booleans, got {kind_of(mask)}; write masks.causal(), masks.lengths(…) or "
            "another of masks, or jnp.asarray(…) of booleans [T, S]."
        )
    return dense(mask)


def _boolean(array: ArrayLike, who: str) -> Any:
    """A boolean array, of NumPy where that is what was given."""
    pairs = static.given(array)
    dtype = jnp.result_type(pairs)
    if not jnp.issubdtype(dtype, jnp.bool_):
        raise TypeError(
            f"{who}: array must be boolean, True = may attend, got {dtype}; "
            "write array != 0, or pass numbers that are added to the logits as bias=."
        )
    return pairs if isinstance(pairs, jax.Array) else np.asarray(pairs)


def _cut(array: Any, axis: int, part: Tokens) -> Any:
    """The entries of `part` along an axis, -1 or -2; an axis of 1 is shared by all tokens."""
    length, size = array.shape[axis], part.size
    if length == 1:
        return array
    known = static.known(part.start)
    start = int(np.asarray(part.start)) if known else 0
    if start + size > length:
        raise ValueError(
            f"masks: a mask made for {length} tokens was asked about {size}"
            f"{f' from {start}' if start else ''} ({'queries' if axis == -2 else 'tokens'}); "
            f"its array has the shape {array.shape}."
        )
    if known:
        return array[(..., slice(start, start + size), *[slice(None)] * (-1 - axis))]
    return jax.lax.dynamic_slice_in_dim(array, part.start, size, axis=axis)
