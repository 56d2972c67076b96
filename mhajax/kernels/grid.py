"""The grid of tiles that the blockwise path walks: how it is cut, and which tiles are visited.

The items are the heads of all examples, B·N of them; a chunk is some items that are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import dropout
from mhajax.kernels import finite
from mhajax.masks import Mask, Tokens


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      items: heads of examples at a time; divides B·N, and divides the group size N/K or is a multiple of it.
      rows: queries of a tile.
      columns: keys of a tile.
    """

    items: int
    rows: int
    columns: int


def fitting(items: int, most: int, group: int = 1) -> int:
    """The largest number up to `most` that divides the items, and the group or is a multiple of it."""
    fits = [n for n in range(1, min(items, most) + 1) if items % n == 0 and (group % n == 0 or n % group == 0)]
    return max(fits, default=1)


class Static(NamedTuple):
    """What the compiled program depends on, besides shapes."""

    tiling: Tiling
    leading: tuple[int, ...]  # the axes before the heads
    num_heads: int  # N
    num_queries: int  # T, without padding
    num_keys: int  # S, without padding
    scale: float
    dropout_rate: float
    score: Callable | None  # (score, head, q_position, k_position, *constants), of one pair
    guarded: bool  # something that is not finite may be hidden, by a mask or a bias, and must stay where it is seen


class Operands(NamedTuple):
    """What has a gradient; B·N or B·K items in front, tokens padded to whole tiles."""

    q: Array  # [B·N, T, H]
    k: Array  # [B·K, S, H]
    v: Array  # [B·K, S, Hv]
    bias: Array | None  # [B or 1, N or 1, T or 1, S or 1]
    constants: tuple[Array, ...]  # of the score function


class Context(NamedTuple):
    """What has none."""

    mask: Mask | None  # laid out
    queries: Tokens
    keys: Tokens
    order: Array | np.ndarray  # [chunks or 1, t_tiles, s_tiles]: tiles to visit, plain ones first
    plain: Array | np.ndarray  # [chunks or 1, t_tiles]: how many of them need no mask
    visited: Array | np.ndarray  # [chunks or 1, t_tiles]: how many are visited at all
    words: Any  # the dropout's, [2]; None without


def lay_out(
    static: Static, q: Array, k: Array, v: Array, mask: Mask | None, bias: Array | None, constants: tuple[Array, ...],
    queries: Tokens, keys: Tokens, dropout_key: Array | None,
) -> tuple[Operands, Context]:  # fmt: skip
    """What `kernels.attend` is given, in the form that the loops take."""
    rows, columns = -static.num_queries % static.tiling.rows, -static.num_keys % static.tiling.columns
    flat = lambda a, tokens: _pad(a.reshape(-1, *a.shape[-2:]), -2, tokens)  # noqa: E731
    operands = Operands(flat(q, rows), flat(k, columns), flat(v, columns), _lay_out_bias(bias, static), constants)
    order, plain, visited = _visits(mask, bias, queries, keys, static)
    context = Context(
        None if mask is None else mask.prepare(queries, keys, static.leading, (rows, columns)),
        queries._replace(position=_pad(queries.position, -1, rows)),
        keys._replace(position=_pad(keys.position, -1, columns)),
        order,
        plain,
        visited,
        dropout.words(dropout_key) if static.dropout_rate and dropout_key is not None else None,
    )
    return operands, context


def in_one_tile(static: Static, operands: Operands, context: Context, items: int) -> tuple[Static, Context]:
    """The same work with all queries and keys of some items in one tile, in which there is nothing to loop over."""
    tiling = Tiling(items, operands.q.shape[1], operands.k.shape[1])
    order, plain, visited = np.zeros((1, 1, 1), np.int32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.int32)
    return static._replace(tiling=tiling), context._replace(order=order, plain=plain, visited=visited)


Arrays = tuple[Array, ...]


class Known:
    """What a tree holds besides JAX's arrays: it is not traced, so tiles that are known stay known.

    Two of them are equal only if they are the same, which is enough for what is traced once.
    """

    def __init__(self, structure: Any, leaves: tuple):
        self._structure, self._leaves = structure, leaves

    def joined(self, arrays: Arrays) -> Any:
        """The tree, with these arrays."""
        given = iter(arrays)
        return self._structure.unflatten([next(given) if leaf is None else leaf for leaf in self._leaves])


def split(tree: Any) -> tuple[Known, Arrays]:
    """The arrays of a tree, and the rest of it."""
    leaves, structure = jax.tree.flatten(tree)
    ours = [isinstance(leaf, jax.Array) for leaf in leaves]
    rest = tuple(None if is_ours else leaf for leaf, is_ours in zip(leaves, ours, strict=True))
    return Known(structure, rest), tuple(
        finite.own(leaf) for leaf, is_ours in zip(leaves, ours, strict=True) if is_ours
    )


def _pad(array: Any, axis: int, size: int) -> Any:
    """The array with `size` more entries, copies of the last; positions stay in NumPy where they are known."""
    if not size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size)
    return (np if isinstance(array, np.ndarray) else jnp).pad(array, widths, mode="edge")


def _lay_out_bias(bias: Array | None, static: Static) -> Array | None:
    """[..., 1 or N, t, s] to [B or 1, 1 or N, t, s], padded to whole tiles where an axis is not shared."""
    if bias is None:
        return None
    *have, heads, t, s = bias.shape
    if math.prod(have) not in (1, math.prod(static.leading)):  # only some of the leading axes are shared
        have = static.leading
        bias = jnp.broadcast_to(bias, (*have, heads, t, s))
    laid_out: Array = bias.reshape(math.prod(have), heads, t, s)
    for axis, tile in ((-2, static.tiling.rows), (-1, static.tiling.columns)):
        if laid_out.shape[axis] > 1:
            laid_out = _pad(laid_out, axis, -laid_out.shape[axis] % tile)
    return laid_out


def _visits(mask: Mask | None, bias: Array | None, queries: Tokens, keys: Tokens, static: Static) -> tuple:
    """Which tiles every chunk of items visits, in which order: `Context.order`, `plain` and `visited`."""
    items, rows, columns = static.tiling
    if mask is None:
        shape = -(-static.num_queries // rows), -(-static.num_keys // columns)
        some = every = np.ones(shape, bool)
    else:
        some, every = mask.tiles(queries, keys, rows, columns)
    xp = np if isinstance(some, np.ndarray) and isinstance(every, np.ndarray) else jnp
    if bias is not None:
        every = xp.zeros_like(every)  # it may hold -inf
    if static.num_keys % columns:  # the last keys are padding
        every = every & xp.broadcast_to(xp.arange(every.shape[-1]) < every.shape[-1] - 1, every.shape)
    if some.ndim > 2:
        full = (*static.leading, static.num_heads, *some.shape[-2:])
        some, every = (xp.broadcast_to(a, full).reshape(-1, items, *some.shape[-2:]) for a in (some, every))
        some, every = some.any(1), every.all(1)
    else:
        some, every = some[None], every[None]
    kind = xp.where(every, 0, xp.where(some, 1, 2))
    order = xp.argsort(kind, axis=-1, stable=True).astype(np.int32)
    return order, (kind == 0).sum(-1).astype(np.int32), (kind < 2).sum(-1).astype(np.int32)
