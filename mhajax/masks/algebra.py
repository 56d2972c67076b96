"""What a mask is: one question about a block of queries and keys, what follows from the answer, and `&`, `|`, `~`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.arguments import kind_of
from mhajax.masks import picture, static
from mhajax.masks.conditions import Conditions
from mhajax.masks.tiles import Tiles, on_grid
from mhajax.masks.tokens import Tokens, tokens


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
class Mask:
    """Base of all masks. One of your own is a class with one method, `block`; all else has defaults that are right.

    A subclass is made a frozen dataclass and a pytree of its fields, of which those that are no arrays are declared as
    `field(metadata={"static": True})`. `block` is asked about any run of queries and any run of keys. It compares
    positions, which `masks.positions` gives as they broadcast to pairs, or looks arrays up by `queries.index` and
    `keys.index`. Nothing is known of its answers before: every tile is evaluated, unless a mask beside it (`&`) rules
    it out. `tiles` and `add_to` may say more; `indexed`, `sizes`, `prepare`, `at` and `__repr__` need not be defined.

    >>> from mhajax import masks
    >>> class Dilated(masks.Mask):
    ...     step: int
    ...
    ...     def block(self, queries, keys):
    ...         q, k = masks.positions(queries, keys)
    ...         return (q - k) % self.step == 0
    >>> print(masks.as_array(masks.causal() & Dilated(3), 5, 5).astype(int))
    [[1 0 0 0 0]
     [0 1 0 0 0]
     [0 0 1 0 0]
     [1 0 0 1 0]
     [0 1 0 0 1]]
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False, repr=False)(cls))

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        """Which of these queries may attend to which of these keys: bool [t, s] or [..., 1 or N, t, s], 1 if shared."""
        raise NotImplementedError(f"masks: {type(self).__name__} must define block(self, queries, keys).")

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        """Bounds for tiles of block_q × block_k pairs, in O(t + s + tiles): what a kernel may leave out.

        The grid has ceil(t / block_q) × ceil(s / block_k) tiles; the last ones may be partial, and only tokens that
        exist count. By default nothing is known: every tile has some pairs, and none has all.

        Returns:
          NumPy arrays where the mask's own arrays and the tokens that it compares are known, also while `jit` traces;
          JAX arrays otherwise. `known_tiles` gives NumPy arrays always.
        """
        one = np.ones((1, 1), bool)
        return on_grid(one, ~one, queries, keys, block_q, block_k)

    def add_to(self, found: Conditions) -> Conditions:
        """The conditions found so far and this one, for `conditions`: by its name there, or with the rest."""
        return found._replace(rest=(*found.rest, self))

    def indexed(self) -> tuple[bool, bool]:
        """Whether it looks anything up by the index of queries, and of keys; by default `block` is traced to see.

        Rows of a batch that are at different places have no index of queries, a rolling cache has none of keys.
        """

        def one_pair(query: Array, key: Array) -> Array:
            return self.block(*(Tokens(start, np.zeros(1, np.int32)) for start in (query, key)))

        program = jax.make_jaxpr(one_pair)(0, 0).jaxpr
        used = [variable for equation in program.eqns for variable in equation.invars]
        queries, keys = (any(variable is start for variable in used) for start in program.invars)
        return queries, keys

    def sizes(self) -> tuple[int | None, int | None]:
        """For how many queries and keys it is written out; None: for any number."""
        return None, None

    def prepare(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        """The mask made ready for `at`: arrays have one leading axis, and padding, of which it may say anything."""
        return _Prepared(self, (queries, keys), leading, padding)

    def at(self, example: Array, head: Array) -> Mask:
        """What a prepared mask says of one example and head, which may be traced; `block` has then no axes for them."""
        raise NotImplementedError(f"masks: {self!r} is not prepared.")

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
        """
        num_queries, num_keys = self.sizes()
        queries = num_queries if queries is None else queries
        if queries is None:
            raise ValueError(f"masks: {self!r} is for any number of tokens; say how many to show: mask.show(T, S).")
        if keys is None:
            keys = queries if num_keys is None else num_keys
        return picture.draw(self, tokens(queries), tokens(keys), width)

    def __repr__(self) -> str:
        values = (getattr(self, part.name) for part in fields(self)) if is_dataclass(self) else ()
        name = type(self).__name__  # one of the library's is made by a function
        name = name.lower() if self.__module__.startswith("mhajax.") else name
        return f"{name}({', '.join(map(brief, jax.tree.leaves(list(values))))})"

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


def as_array(mask: Mask | None, queries: int | Tokens, keys: int | Tokens) -> Array:
    """The mask written out: boolean [T, S] if all examples and heads share it, else [..., 1 or N, T, S].

    For what takes nothing but an array; it is as large as the logits of a head.

    Args:
      mask: None is every query to every key.
      queries: how many, or Tokens.
      keys: how many, or Tokens.
    """
    queries, keys = tokens(queries), tokens(keys)
    pairs = jnp.ones((1, 1), bool) if mask is None else mask.block(queries, keys)
    return jnp.broadcast_to(pairs, (*pairs.shape[:-2], queries.size, keys.size))


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


class _Prepared(Mask):
    """A mask of which nothing but `block` is known, asked block by block, and only about tokens that there are."""

    mask: Mask
    whole: tuple[Tokens, Tokens]  # all queries and all keys
    leading: tuple[int, ...] = field(metadata={"static": True})
    padding: tuple[int, int] = field(metadata={"static": True})
    entry: tuple[Any, Any] = (0, 0)  # the example and the head

    def at(self, example: Array, head: Array) -> Mask:
        queries, keys = self.whole
        return replace(self, whole=(queries.at(example), keys.at(example)), entry=(example, head))

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        asked = tuple(map(Tokens.within, (queries, keys), self.whole))
        pairs = static.flat_pairs(self.mask.block(*asked), self.leading, self.padding)
        return Pairs(pairs, (asked[0].start, asked[1].start), self.entry).block(queries, keys)


class Pairs(Mask):
    """Pairs written out, prepared for `at`, and cut out where they are evaluated."""

    array: Array  # [B or 1, N or 1, T or 1, S or 1]
    origin: tuple[Any, Any] = (0, 0)  # index of the first query and of the first key
    entry: tuple[Any, Any] = (0, 0)  # the example and the head

    def at(self, example: Array, head: Array) -> Mask:
        return replace(self, entry=(example, head))

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        example, head = self.entry
        q, k = queries.start - self.origin[0], keys.start - self.origin[1]
        wanted = (example, 1), (head, 1), (q, queries.size), (k, keys.size)
        cuts = [(0, 1) if size == 1 else cut for size, cut in zip(self.array.shape, wanted, strict=True)]
        starts = [jnp.asarray(start, jnp.int32) for start, _ in cuts]  # of one dtype, in 64 bits too
        return jax.lax.dynamic_slice(self.array, starts, [size for _, size in cuts])[0, 0]


class Combination(Mask):
    """A mask made of masks: what it says, and its bounds, follow from what they say and from theirs."""

    operation: ClassVar[Callable[..., Any]]

    @property
    def parts(self) -> tuple[Mask, ...]:
        """The masks that it is made of."""
        return tuple(getattr(self, part.name) for part in fields(self))

    def merge_tiles(self, *tiles: Tiles) -> Tiles:
        """Its bounds, from those of its parts: of what grows with them."""
        nonempty, full = (self.operation(*static.aligned(*bounds)) for bounds in zip(*tiles, strict=True))
        return Tiles(nonempty, full)

    def block(self, queries: Tokens, keys: Tokens) -> Array:
        return self.operation(*static.aligned(*(part.block(queries, keys) for part in self.parts)))

    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
        return self.merge_tiles(*(part.tiles(queries, keys, block_q, block_k) for part in self.parts))

    def indexed(self) -> tuple[bool, bool]:
        queries, keys = zip(*(part.indexed() for part in self.parts), strict=True)
        return any(queries), any(keys)

    def sizes(self) -> tuple[int | None, int | None]:
        return functools.reduce(_agreed, (part.sizes() for part in self.parts))

    def prepare(self, queries: Tokens, keys: Tokens, leading: tuple[int, ...], padding: tuple[int, int]) -> Mask:
        return type(self)(*(part.prepare(queries, keys, leading, padding) for part in self.parts))

    def at(self, example: Array, head: Array) -> Mask:
        return type(self)(*(part.at(example, head) for part in self.parts))


class And(Combination):
    """Both masks allow it."""

    first: Mask
    second: Mask
    operation = staticmethod(operator.and_)

    def add_to(self, found: Conditions) -> Conditions:
        return self.second.add_to(self.first.add_to(found))

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.parts)


class Or(Combination):
    """At least one of the masks allows it."""

    first: Mask
    second: Mask
    operation = staticmethod(operator.or_)

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"


class Not(Combination):
    """The mask does not allow it."""

    mask: Mask
    operation = staticmethod(operator.invert)

    def merge_tiles(self, *tiles: Tiles) -> Tiles:
        return Tiles(~tiles[0].full, ~tiles[0].nonempty)

    def add_to(self, found: Conditions) -> Conditions:
        return self.mask.mask.add_to(found) if isinstance(self.mask, Not) else super().add_to(found)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, And | Or) else f"~{self.mask!r}"


def known_tiles(mask: Mask | None, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
    """The bounds that hold whatever the values are that `jit` traces: NumPy arrays, always.

    `causal() & lengths(n)` with a traced n leaves out what is above the diagonal; what n leaves out is found at run
    time by `Mask.tiles`.

    Args:
      mask: None is every query to every key.
      queries, keys, block_q, block_k: as in `Mask.tiles`.
    """
    nothing = Mask().tiles(queries, keys, block_q, block_k)
    if mask is None:
        return Tiles(nothing.nonempty, ~nothing.full)
    if isinstance(mask, Combination):
        return mask.merge_tiles(*(known_tiles(part, queries, keys, block_q, block_k) for part in mask.parts))
    if static.known(*jax.tree.leaves(mask)):
        bounds = mask.tiles(queries, keys, block_q, block_k)
        if static.known(*bounds):
            return bounds
    return nothing


def _agreed(first: tuple, second: tuple) -> tuple[int | None, int | None]:
    """Sizes that fit both; two that differ are an error."""
    for axis, a, b in zip("TS", first, second, strict=True):
        if a is not None and b is not None and a != b:
            raise ValueError(f"masks: two masks that are combined must be for the same tokens, got {axis}={a} and {b}.")
    queries, keys = (b if a is None else a for a, b in zip(first, second, strict=True))
    return queries, keys
