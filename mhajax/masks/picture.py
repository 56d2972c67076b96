"""A mask as text: one character for a pair, or for a tile where there are too many pairs."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np

from mhajax.masks import static

if TYPE_CHECKING:
    from mhajax.masks.algebra import Mask, Tokens

ALL, SOME, NONE = "█▒·"
LOOKED_AT = 2**22  # up to so many pairs, every one is looked at; beyond, bounds of tiles have to do


def draw(mask: Mask, queries: Tokens, keys: Tokens, width: int | None = None) -> str:
    """Queries from top to bottom, keys from left to right; of many examples and heads, the first.

    Args:
      mask: what is drawn.
      queries, keys: the tokens that it is asked about.
      width: characters in a line; None: as wide as the terminal.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    columns = -(-keys.size // width)
    single = columns == 1 and queries.size <= width
    rows = 1 if single else max(2 * columns, -(-queries.size // width))  # a character is about twice as high as wide
    shape = static.grid(queries.size, keys.size, rows, columns)
    if queries.size * keys.size <= LOOKED_AT:
        pairs = np.asarray(mask.block(queries, keys))
        pairs = np.broadcast_to(pairs, (*pairs.shape[:-2], queries.size, keys.size))
        bounds = static.reduced(pairs, rows, columns)
    else:
        bounds = mask.tiles(queries, keys, rows, columns)
    leading = np.shape(bounds[0])[:-2]
    some, every = (np.asarray(bound).reshape(-1, *shape)[0] for bound in bounds)
    characters = np.where(every, ALL, np.where(some, SOME, NONE))
    title = f"{mask!r}: {queries.size} queries (down) × {keys.size} keys"
    if leading:
        title += f", the first of {'×'.join(map(str, leading))}"
    if not single:
        title += f"; {ALL} is {rows} × {columns} pairs, {SOME} some of them"
    return "\n".join([title, *map("".join, characters)])
