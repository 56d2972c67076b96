"""Who may look at whom.

A mask says, for a block of queries and a block of keys, which query may attend to which key. It is evaluated only where
it is needed, so `causal()` or `lengths(n)` never hold T × S booleans, and masks combine with `&`, `|` and `~`:

    mask = masks.causal() & masks.lengths(lengths)

Masks are pytrees: they go through `jit`, `vmap` and `scan`, and new values in them do not retrace.

Shapes that a mask may produce: `[t, s]`, or `[..., N, t, s]` with the leading axes of the input and 1 where all
examples or all heads share a mask. A three-axis array is never guessed to be per example or per head: `per_example` and
`per_head` say which. True always means *may attend*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


class Tokens(NamedTuple):
    """A run of neighbouring tokens, as a mask sees it.

    Attributes:
      start: index of the first one in the arrays (where a mask looks up lengths, segments and dense entries).
      position: [t] or [..., t], their positions in the text (what causal compares). A cache makes the two differ.
    """

    start: ArrayLike
    position: Array

    @property
    def index(self) -> Array:
        """Indices in the arrays, [t]."""
        return jnp.asarray(self.start) + jnp.arange(self.position.shape[-1])


def tokens(size: int, position: Array | None = None) -> Tokens:
    """All `size` tokens of a sequence, at positions 0, 1, 2, … unless others are given."""
    return Tokens(0, jnp.arange(size) if position is None else position)


class Mask:
    """Base of all masks; `block` is the one thing that a new mask defines."""

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        """Which of these queries may attend to which of these keys: bool [t, s] or [..., 1 or N, t, s]."""
        raise NotImplementedError

    def sizes(self) -> tuple[int | None, int | None]:
        """For how many queries and keys it is written out; None: for any number."""
        return None, None

    def __and__(self, other: Mask) -> Mask:
        return And(self, _operand(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _operand(other, "|"))

    def __invert__(self) -> Mask:
        return Not(self)


@dataclass_transform(frozen_default=True, eq_default=False)
def _mask(cls):
    return jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False)(cls))


def _operand(other: object, operator: str) -> Mask:
    if isinstance(other, Mask):
        return other
    raise TypeError(
        f"masks: {operator} combines two masks, got {type(other).__name__}; "
        "wrap an array: masks.dense(array), masks.per_example(array) or masks.per_head(array)."
    )


@_mask
class And(Mask):
    """Both masks allow it."""

    first: Mask
    second: Mask

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return self.first.block(queries, keys) & self.second.block(queries, keys)

    def sizes(self) -> tuple[int | None, int | None]:
        return _agreed(self.first.sizes(), self.second.sizes())


@_mask
class Or(Mask):
    """At least one of the masks allows it."""

    first: Mask
    second: Mask

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return self.first.block(queries, keys) | self.second.block(queries, keys)

    def sizes(self) -> tuple[int | None, int | None]:
        return _agreed(self.first.sizes(), self.second.sizes())


@_mask
class Not(Mask):
    """The mask does not allow it."""

    mask: Mask

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return ~self.mask.block(queries, keys)

    def sizes(self) -> tuple[int | None, int | None]:
        return self.mask.sizes()


@_mask
class Causal(Mask):
    """Key position ≤ query position."""

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return _across(keys.position) <= _down(queries.position)


@_mask
class Lengths(Mask):
    """Keys with an index below the length."""

    lengths: Array  # [] or [...]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        lengths = jnp.asarray(self.lengths)
        if lengths.ndim:
            lengths = lengths[..., None, None, None]
        return keys.index[None, :] < lengths


@_mask
class Segments(Mask):
    """Queries and keys of the same segment."""

    queries: Array  # [T] or [..., T]
    keys: Array  # [S] or [..., S]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        asking = _cut(jnp.asarray(self.queries), -1, queries)
        answering = _cut(jnp.asarray(self.keys), -1, keys)
        return _down(asking) == _across(answering)

    def sizes(self) -> tuple[int | None, int | None]:
        return jnp.shape(self.queries)[-1], jnp.shape(self.keys)[-1]


@_mask
class Dense(Mask):
    """Every pair written out."""

    array: Array  # [T, S] or [..., 1 or N, T, S]

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return _cut(_cut(jnp.asarray(self.array), -2, queries), -1, keys)

    def sizes(self) -> tuple[int | None, int | None]:
        queries, keys = jnp.shape(self.array)[-2:]
        return None if queries == 1 else queries, None if keys == 1 else keys


def causal() -> Mask:
    """A query attends to keys at its own position and before: key position ≤ query position.

    Positions, not indices, are compared, so it is right for caches and for T ≠ S: with the default positions, query 0
    sees key 0 only.
    """
    return Causal()


def lengths(lengths: ArrayLike) -> Mask:
    """Sequences padded at the end: keys with index < length may be attended to.

    Args:
      lengths: number of real keys, an integer or integers [...] with the leading axes of the input. 0 is allowed: such
        a row has nothing to attend to and gives exact zeros.

    Raises:
      TypeError: if the lengths are not integers.
    """
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(
            f"masks.lengths: lengths must be integers, got {lengths.dtype}; "
            "for a boolean array that is True at real keys use masks.dense(array[:, None, None, :])."
        )
    return Lengths(lengths)


def segments(queries: ArrayLike, keys: ArrayLike | None = None) -> Mask:
    """Several texts packed into one row: a query attends to the keys of its own segment.

    Args:
      queries: segment of every query, integers [T] or [..., T] with the leading axes of the input.
      keys: segment of every key, [S] or [..., S]; the same as `queries` if it is left out.
    """
    queries = jnp.asarray(queries)
    return Segments(queries, queries if keys is None else jnp.asarray(keys))


def dense(array: ArrayLike) -> Mask:
    """A boolean array, True = may attend.

    Args:
      array: [T, S], shared by all examples and heads, or [B, N, T, S] in which any axis may be 1.

    Raises:
      TypeError: if the array is not boolean.
      ValueError: if it has three axes, which could mean one mask per example or one per head.
    """
    array = _boolean(array, "masks.dense")
    if array.ndim == 3 or array.ndim < 2:
        raise ValueError(
            f"masks.dense: array must be [T, S] or [B, N, T, S], got {array.shape}; three axes could mean one mask per "
            "example or one per head: say which with masks.per_example(array) or masks.per_head(array)."
        )
    return Dense(array)


def per_example(array: ArrayLike) -> Mask:
    """One mask per example, boolean [..., T, S] with the leading axes of the input, shared by its heads."""
    array = _boolean(array, "masks.per_example")
    if array.ndim < 3:
        raise ValueError(f"masks.per_example: array must be [B, T, S], got {array.shape}; use masks.dense for [T, S].")
    return Dense(array[..., None, :, :])


def per_head(array: ArrayLike) -> Mask:
    """One mask per head, boolean [N, T, S], shared by all examples."""
    array = _boolean(array, "masks.per_head")
    if array.ndim != 3:
        raise ValueError(f"masks.per_head: array must be [N, T, S], got {array.shape}; use masks.dense for others.")
    return Dense(array)


def as_mask(mask: Mask | ArrayLike | None) -> Mask | None:
    """A Mask as it is, None (everything may attend) as it is, a boolean array through `dense`."""
    if mask is None or isinstance(mask, Mask):
        return mask
    return dense(mask)


def _agreed(first: tuple, second: tuple) -> tuple[int | None, int | None]:
    """Sizes that fit both; two that differ are an error."""
    for axis, a, b in zip("TS", first, second, strict=True):
        if a is not None and b is not None and a != b:
            raise ValueError(f"masks: two masks that are combined must be for the same tokens, got {axis}={a} and {b}.")
    queries, keys = (b if a is None else a for a, b in zip(first, second, strict=True))
    return queries, keys


def _boolean(array: ArrayLike, who: str) -> Array:
    array = jnp.asarray(array)
    if array.dtype != bool:
        raise TypeError(
            f"{who}: array must be boolean, True = may attend, got {array.dtype}; "
            "write array != 0, or pass numbers that are added to the logits as bias=."
        )
    return array


def _down(values: Array) -> Array:
    """Values of the queries, [t] or [..., t], as a column that broadcasts over heads and keys."""
    return values[:, None] if values.ndim == 1 else values[..., None, :, None]


def _across(values: Array) -> Array:
    """Values of the keys, [s] or [..., s], as a row that broadcasts over heads and queries."""
    return values[None, :] if values.ndim == 1 else values[..., None, None, :]


def _cut(array: Array, axis: int, part: Tokens) -> Array:
    """The entries of `part` along an axis; an axis of 1 is shared by all tokens."""
    size = part.position.shape[-1]
    whole = isinstance(part.start, int | np.integer) and part.start == 0 and array.shape[axis] == size
    if whole or array.shape[axis] == 1:
        return array
    if array.shape[axis] < size:
        raise ValueError(
            f"masks: a mask made for {array.shape[axis]} tokens was asked about {size} "
            f"({'queries' if axis == -2 else 'tokens'}); its array has the shape {array.shape}."
        )
    return jax.lax.dynamic_slice_in_dim(array, part.start, size, axis=axis)
