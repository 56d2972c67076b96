"""What a mask is: a question about a block of tokens, bounds for the tiles of a kernel, and `&`, `|`, `~`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mhajax.arguments import kind_of
from mhajax.masks import picture, static


class Tokens(NamedTuple):
    """A run of neighbouring tokens, as a mask sees it.

    Attributes:
      start: index of the first one in the arrays (where a mask looks up lengths, segments and dense entries).
      position: [t] or [..., t], their positions in the text (what causal compares). A cache makes the two differ.
    """

    start: ArrayLike
    position: Array | np.ndarray

    @property
    def size(self) -> int:
        """Number of tokens, t."""
        return self.position.shape[-1]

    @property
    def index(self) -> Array:
        """Indices in the arrays, [t]."""
        return jnp.asarray(self.start) + jnp.arange(self.size)

    @property
    def origin(self) -> int | None:
        """Position of the first token where positions are known, shared by all examples and go up by one; else None.

        A kernel that only knows "index ≤ index" is right if the origins of queries and keys are the same number.
        """
        if self.position.ndim != 1 or not self.size or not static.known(self.position):
            return None
        positions = np.asarray(self.position)
        return int(positions[0]) if np.all(np.diff(positions) == 1) else None

    def of(self, example: Array) -> Tokens:
        """The tokens of one example, by its number in the flattened leading axes."""
        if self.position.ndim == 1:
            return self
        return self._replace(position=jnp.asarray(self.position).reshape(-1, self.size)[example])

    def part(self, index: Array, size: int) -> Tokens:
        """The `index`th run of `size` tokens, of tokens [t]."""
        position = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.position), index * size, size)
        return Tokens(self.start + index * size, position)


def tokens(size: int, position: Array | np.ndarray | None = None) -> Tokens:
    """All `size` tokens of a sequence, at positions 0, 1, 2, … unless others are given.

    The positions that are not given are known while a program is traced, so that kernels can leave out tiles.
    """
    return Tokens(0, np.arange(size, dtype=np.int32) if position is None else position)


class Tiles(NamedTuple):
    """What is certain about the tiles of a grid: [t_tiles, s_tiles], or [..., 1 or N, t_tiles, s_tiles].

    Attributes:
      some: bool; False is certain: no pair of the tile is allowed. True may be said without need.
      every: bool; True is certain: every pair of the tile is allowed. False may be said without need.
    """

    some: Array | np.ndarray
    every: Array | np.ndarray


class Mask:
    """Base of all masks; `block` is the one thing that a new mask defines."""

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        """Which of these queries may attend to which of these keys: bool [t, s] or [..., 1 or N, t, s]."""
        raise NotImplementedError

    def tiles(self, queries: Tokens, keys: Tokens, rows: int, columns: int) -> Tiles:
        """Bounds for tiles of `rows` queries by `columns` keys, in O(t + s + tiles): what a kernel may leave out.

        The grid has ceil(t / rows) × ceil(s / columns) tiles; the last ones may be partial, and only tokens that exist
        count. A mask that does not define this is taken to be unknown: some, but not every pair.

        Returns:
          NumPy arrays where the mask's own arrays and the tokens that it compares are known, also while `jit` traces;
          JAX arrays otherwise. `known_tiles` gives NumPy arrays always.
        """
        return unknown(queries, keys, rows, columns)

    def sizes(self) -> tuple[int | None, int | None]:
        """For how many queries and keys it is written out; None: for any number."""
        return None, None

    def laid_out(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        """The mask made ready for `of`: its arrays with one leading axis, and room for so many more queries and keys.

        What it says of the padding may be anything. A mask that does not define this is written out pair by pair.
        """
        from mhajax.masks.by_index import lay_out_pairs  # which makes a Mask

        pairs = self.block(queries, keys)
        pairs = jnp.broadcast_to(pairs, (*pairs.shape[:-2], queries.size, keys.size))
        return lay_out_pairs(pairs, (queries.start, keys.start), leading, padding)

    def of(self, example: Array, head: Array) -> Mask:
        """What a mask that is laid out says of one example and one head, numbers that may be traced.

        Its `block` is [1 or t, 1 or s], perhaps with axes of 1 in front.
        """
        raise NotImplementedError

    def show(
        self, queries: int | Tokens | None = None, keys: int | Tokens | None = None, *, width: int | None = None
    ) -> str:
        """A picture in characters, to be printed: queries downwards, keys to the right; █ allowed, · not, ▒ some.

        Args:
          queries: how many, or Tokens; None: as many as the mask is written out for.
          keys: how many, or Tokens; None: as many as the mask is written out for, else as many as queries.
          width: characters in a line, and at most lines; more pairs than that are drawn as tiles. None: the terminal's.

        Raises:
          ValueError: if the number of queries is neither given nor known.

        >>> from mhajax import masks
        >>> print((masks.causal() & masks.window(1) | masks.prefix(2)).show(5))
        causal() & window(before=1) | prefix(2): 5 queries (down) × 5 keys
        ██···
        ██···
        ███··
        ████·
        ██·██
        """
        rows, columns = self.sizes()
        queries = rows if queries is None else queries
        if queries is None:
            raise ValueError(f"masks: {self!r} is for any number of tokens; say how many to show: mask.show(T, S).")
        if keys is None:
            keys = queries if columns is None else columns
        return picture.draw(self, _as_tokens(queries), _as_tokens(keys), width)

    def __repr__(self) -> str:
        values = (getattr(self, part.name) for part in fields(self)) if is_dataclass(self) else ()
        return f"{type(self).__name__.lower()}({', '.join(map(brief, jax.tree.leaves(list(values))))})"

    def __bool__(self) -> bool:
        raise TypeError(
            f"masks: a mask has no truth value, got {self!r} where Python asks for one; write a & b for `a and b`, "
            "a | b for `a or b`, ~a for `not a`, and `mask is not None` to ask whether there is one."
        )

    def __and__(self, other: Mask) -> Mask:
        return And(self, _operand(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _operand(other, "|"))

    def __invert__(self) -> Mask:
        return Not(self)

    __array_ufunc__ = None  # so that numpy asks us too, below

    def __rand__(self, other: object) -> Mask:  # what comes first is no Mask
        return And(_operand(other, "&"), self)

    def __ror__(self, other: object) -> Mask:
        return Or(_operand(other, "|"), self)

    def __xor__(self, other: object) -> Mask:
        raise TypeError("masks: masks have no ^; write a & ~b | ~a & b.")

    def __sub__(self, other: object) -> Mask:
        raise TypeError("masks: masks have no -; write a & ~b for what a allows and b does not.")

    def __add__(self, other: object) -> Mask:
        raise TypeError("masks: masks have no + and no *; write a | b for what either allows, a & b for what both do.")

    __rxor__, __rsub__, __radd__ = __xor__, __sub__, __add__
    __mul__ = __rmul__ = __add__


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def pytree(cls):
    """Makes a mask a frozen dataclass whose fields are leaves of a pytree; the decorator of a new mask."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False, repr=False)(cls))


def as_array(mask: Mask | None, queries: int | Tokens, keys: int | Tokens) -> Array:
    """The mask written out: boolean [T, S] if all examples and heads share it, else [..., 1 or N, T, S].

    For what takes nothing but an array; it is as large as the logits of a head.

    Args:
      mask: None is everybody to everybody.
      queries: how many, or Tokens.
      keys: how many, or Tokens.
    """
    queries, keys = _as_tokens(queries), _as_tokens(keys)
    pairs = jnp.ones((1, 1), bool) if mask is None else mask.block(queries, keys)
    return jnp.broadcast_to(pairs, (*pairs.shape[:-2], queries.size, keys.size))


def _as_tokens(given: int | Tokens) -> Tokens:
    return given if isinstance(given, Tokens) else tokens(given)


def brief(value: Any) -> str:
    """Numbers as they are, arrays by dtype and shape, functions by name."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if getattr(value, "shape", ()) or not static.known(value):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return str(value)


def _operand(other: object, operator: str) -> Mask:
    if isinstance(other, Mask):
        return other
    uncalled("masks", other)
    raise TypeError(
        f"masks: {operator} combines two masks, got {type(other).__name__}; "
        "wrap an array: masks.dense(array), masks.per_example(array) or masks.per_head(array)."
    )


def uncalled(who: str, mask: Any) -> None:
    """Raise a TypeError for what would have to be called to be a mask: `masks.causal` instead of `masks.causal()`."""
    if not callable(mask):
        return
    name, advice = kind_of(mask), "wrap a function of positions: masks.function(…)"
    if (getattr(mask, "__module__", None) or "").startswith("mhajax.masks"):
        name = f"the function masks.{mask.__name__.lower()}"
        advice = "call it: masks.causal()" if name.endswith(".causal") else f"call it: {name.split()[-1]}(…)"
    raise TypeError(f"{who}: mask must be a Mask or booleans, got {name} itself; {advice}.")


class Combination(Mask):
    """A mask made of masks: what it says, and its bounds, follow from what they say and from theirs."""

    def parts(self) -> tuple[Mask, ...]:
        """The masks that it is made of."""
        raise NotImplementedError

    def joined(self, *blocks: Array) -> Array:
        """What it says, from what its parts say."""
        raise NotImplementedError

    def bounds(self, *tiles: Tiles) -> Tiles:
        """Its bounds, from those of its parts."""
        raise NotImplementedError

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return self.joined(*(part.block(queries, keys) for part in self.parts()))

    def tiles(self, queries: Tokens, keys: Tokens, rows: int, columns: int) -> Tiles:
        return self.bounds(*(part.tiles(queries, keys, rows, columns) for part in self.parts()))

    def sizes(self) -> tuple[int | None, int | None]:
        return functools.reduce(_agreed, (part.sizes() for part in self.parts()))

    def laid_out(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        return type(self)(*(part.laid_out(queries, keys, leading, padding) for part in self.parts()))

    def of(self, example: Array, head: Array) -> Mask:
        return type(self)(*(part.of(example, head) for part in self.parts()))


@pytree
class And(Combination):
    """Both masks allow it."""

    first: Mask
    second: Mask

    def parts(self) -> tuple[Mask, ...]:
        return self.first, self.second

    def joined(self, *blocks: Array) -> Array:
        first, second = static.aligned(*blocks)
        return first & second

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.parts())

    def bounds(self, *tiles: Tiles) -> Tiles:
        (some, others), (every, all_others) = map(static.aligned, *tiles)
        return Tiles(some & others, every & all_others)


@pytree
class Or(Combination):
    """At least one of the masks allows it."""

    first: Mask
    second: Mask

    def parts(self) -> tuple[Mask, ...]:
        return self.first, self.second

    def joined(self, *blocks: Array) -> Array:
        first, second = static.aligned(*blocks)
        return first | second

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"

    def bounds(self, *tiles: Tiles) -> Tiles:
        (some, others), (every, all_others) = map(static.aligned, *tiles)
        return Tiles(some | others, every | all_others)


@pytree
class Not(Combination):
    """The mask does not allow it."""

    mask: Mask

    def parts(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def joined(self, *blocks: Array) -> Array:
        return ~blocks[0]

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, And | Or) else f"~{self.mask!r}"

    def bounds(self, *tiles: Tiles) -> Tiles:
        return Tiles(~tiles[0].every, ~tiles[0].some)


def unknown(queries: Tokens, keys: Tokens, rows: int, columns: int) -> Tiles:
    """The bounds of a mask about which nothing is known: some pairs of every tile, and not all."""
    shape = static.grid(queries.size, keys.size, rows, columns)
    return Tiles(np.ones(shape, bool), np.zeros(shape, bool))


def on_grid(some: Any, every: Any, queries: Tokens, keys: Tokens, rows: int, columns: int) -> Tiles:
    """Bounds that hold for whole rows or columns of tiles, [..., 1 or t_tiles, 1 or s_tiles], for every tile."""
    shape = static.grid(queries.size, keys.size, rows, columns)
    full = lambda bound: static.library(bound).broadcast_to(bound, (*bound.shape[:-2], *shape))  # noqa: E731
    return Tiles(full(some), full(every))


def known_tiles(mask: Mask | None, queries: Tokens, keys: Tokens, rows: int, columns: int) -> Tiles:
    """The bounds that hold whatever the values are that `jit` traces: NumPy arrays, always.

    `causal() & lengths(n)` with a traced n leaves out what is above the diagonal; what n leaves out is found at run
    time by `Mask.tiles`.

    Args:
      mask: None is everybody to everybody.
      queries, keys, rows, columns: as in `Mask.tiles`.
    """
    if mask is None:
        bounds = unknown(queries, keys, rows, columns)
        return Tiles(bounds.some, ~bounds.every)
    if isinstance(mask, Combination):
        return mask.bounds(*(known_tiles(part, queries, keys, rows, columns) for part in mask.parts()))
    if static.known(*jax.tree.leaves(mask)):
        bounds = mask.tiles(queries, keys, rows, columns)
        if static.known(*bounds):
            return bounds
    return unknown(queries, keys, rows, columns)


def _agreed(first: tuple, second: tuple) -> tuple[int | None, int | None]:
    """Sizes that fit both; two that differ are an error."""
    for axis, a, b in zip("TS", first, second, strict=True):
        if a is not None and b is not None and a != b:
            raise ValueError(f"masks: two masks that are combined must be for the same tokens, got {axis}={a} and {b}.")
    queries, keys = (b if a is None else a for a, b in zip(first, second, strict=True))
    return queries, keys
