"""A mask as text: one character for a pair, or for a tile where there are too many pairs."""

from __future__ import annotations

import shutil
from typing import Any, Protocol

import numpy as np

from mhajax.masks.tiles import Tiles, of_pairs
from mhajax.masks.tokens import Tokens

ALL, SOME, NONE = "█▒·"
ONE_BY_ONE = 2**22  # up to so many pairs, every one is evaluated; beyond, bounds of tiles have to do


class _Drawable(Protocol):
    def block(self, queries: Tokens, keys: Tokens, /) -> Any: ...
    def tiles(self, queries: Tokens, keys: Tokens, block_q: int, block_k: int, /) -> Tiles: ...


def draw(mask: _Drawable, queries: Tokens, keys: Tokens, width: int | None = None) -> str:
    """Queries from top to bottom, keys from left to right; of many examples and heads, the first.

    Args:
      mask: what is drawn: its `repr`, and its `block` or, of too many pairs, `tiles`.
      queries, keys: the tokens that it is asked about.
      width: characters in a line; None: as wide as the terminal.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    block_k = -(-keys.size // width)
    single = block_k == 1 and queries.size <= width
    block_q = 1 if single else max(2 * block_k, -(-queries.size // width))  # a character is twice as high as wide
    if queries.size * keys.size <= ONE_BY_ONE:
        pairs = np.asarray(mask.block(queries, keys))
        pairs = np.broadcast_to(pairs, (*pairs.shape[:-2], queries.size, keys.size))
        bounds = of_pairs(pairs, block_q, block_k)
    else:
        bounds = mask.tiles(queries, keys, block_q, block_k)
    leading = np.shape(bounds.full)[:-2]
    nonempty, full = (np.asarray(bound).reshape(-1, *np.shape(bound)[-2:])[0] for bound in bounds)
    characters = np.where(full, ALL, np.where(nonempty, SOME, NONE))
    title = f"{mask!r}: {queries.size} queries (down) × {keys.size} keys"
    if leading:
        title += f", the first of {'×'.join(map(str, leading))}"
    if not single:
        title += f"; {ALL} is {block_q} × {block_k} pairs, {SOME} some of them"
    return "\n".join([title, *map("".join, characters)])
