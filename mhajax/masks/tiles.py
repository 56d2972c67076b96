"""What is certain about the tiles of a grid of queries and keys, so that a kernel can leave some out.

Bounds are NumPy arrays where the numbers that they come from are known (`static`), JAX arrays otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax import Array

from mhajax.masks import static
from mhajax.masks.static import across, aligned, down
from mhajax.masks.tokens import Tokens


class Tiles(NamedTuple):
    """Bounds for the tiles of a grid: [t_tiles, s_tiles], or [..., 1 or N, t_tiles, s_tiles].

    Attributes:
      nonempty: bool; False is certain: no pair of the tile is allowed. True may be said without need.
      full: bool; True is certain: every pair of the tile is allowed. False may be said without need.
    """

    nonempty: Array | np.ndarray
    full: Array | np.ndarray


def on_grid(nonempty: Any, full: Any, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
    """Bounds of every tile, from [..., 1 or t_tiles, 1 or s_tiles], where 1 is for a whole row or column of tiles."""
    shape = -(-queries.size // block_q), -(-keys.size // block_k)
    expand = lambda bound: static.library(bound).broadcast_to(bound, (*bound.shape[:-2], *shape))  # noqa: E731
    return Tiles(expand(nonempty), expand(full))


def equal(q: Any, k: Any, queries: Tokens, keys: Tokens, block_q: int, block_k: int) -> Tiles:
    """Bounds where a pair is allowed if a number of the query, [..., t], equals one of the key, [..., s]."""
    least_q, most_q, least_k, most_k = extremes_of_pairs(q, k, block_q, block_k)
    nonempty = (least_q <= most_k) & (least_k <= most_q)
    full = (least_q == most_k) & (least_k == most_q)
    return on_grid(nonempty, full, queries, keys, block_q, block_k)


def extremes_of_pairs(q: Any, k: Any, block_q: int, block_k: int) -> tuple[Any, ...]:
    """Smallest and largest number of every tile's queries, as columns, and of its keys, as rows, of the same rank."""
    return aligned(*map(down, extremes(q, block_q)), *map(across, extremes(k, block_k)))


def extremes(values: Any, size: int) -> tuple[Any, Any]:
    """Smallest and largest of every `size` neighbours, [..., t] → [..., ceil(t / size)]; the last may be fewer."""
    xp = static.library(values)
    missing = -values.shape[-1] % size
    padded = xp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], mode="edge")
    runs = padded.reshape(*values.shape[:-1], -1, size)
    return runs.min(-1), runs.max(-1)


def of_pairs(pairs: Any, block_q: int, block_k: int) -> Tiles:
    """The bounds of pairs written out, [..., t, s] → [..., t_tiles, s_tiles]; an axis of 1 stays."""
    xp = static.library(pairs)
    *leading, t, s = pairs.shape
    block_q, block_k = (1 if t == 1 else block_q), (1 if s == 1 else block_k)
    t_tiles, s_tiles = -(-t // block_q), -(-s // block_k)
    missing = [(0, 0)] * len(leading) + [(0, t_tiles * block_q - t), (0, s_tiles * block_k - s)]

    def tiled(outside: bool) -> Any:
        padded = xp.pad(pairs, missing, constant_values=outside)
        return padded.reshape(*leading, t_tiles, block_q, s_tiles, block_k)

    return Tiles(tiled(False).any((-3, -1)), tiled(True).all((-3, -1)))
