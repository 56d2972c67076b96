"""Tokens as a mask sees them: where they are in the arrays, and where in the text."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mhajax.masks import static


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

    def at(self, example: Array) -> Tokens:
        """The tokens of one example, by its number in the flattened leading axes."""
        if self.position.ndim == 1:
            return self
        return self._replace(position=jnp.asarray(self.position).reshape(-1, self.size)[example])

    def part(self, index: Array, size: int) -> Tokens:
        """The `index`th run of `size` tokens, of tokens [t]."""
        position = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.position), index * size, size)
        return Tokens(self.start + index * size, position)

    def within(self, whole: Tokens) -> Tokens:
        """Those of the whole that begin where these do or, where these end in padding after it, so much before."""
        size = min(self.size, whole.size)
        first = jnp.clip(jnp.asarray(self.start) - whole.start, 0, whole.size - size)
        position = jax.lax.dynamic_slice_in_dim(jnp.asarray(whole.position), first, size)
        return Tokens(first + whole.start, position)


def tokens(size: int | Tokens, position: Array | np.ndarray | None = None) -> Tokens:
    """All `size` tokens of a sequence, at positions 0, 1, 2, … unless others are given; Tokens as they are.

    The positions that are not given are known while a program is traced, so that kernels can leave out tiles.
    """
    if isinstance(size, Tokens):
        return size
    return Tokens(0, np.arange(size, dtype=np.int32) if position is None else position)


def positions(queries: Tokens, keys: Tokens) -> tuple[Any, ...]:
    """Positions that broadcast to pairs: of the queries [..., 1, t, 1] or [t, 1], of the keys [..., 1, 1, s] or [1, s].

    Both have the same rank, and are signed: their difference is a distance.

    >>> q, k = positions(tokens(3), tokens(2))
    >>> (q - k).tolist()
    [[0, -1], [1, 0], [2, 1]]
    """
    q, k = static.down(jnp.asarray(queries.position)), static.across(jnp.asarray(keys.position))
    return static.aligned(signed(q), signed(k))


def signed(values: Any) -> Any:
    """Positions that can be subtracted: unsigned ones would wrap around below 0."""
    return values.astype(np.promote_types(values.dtype, np.int32))
