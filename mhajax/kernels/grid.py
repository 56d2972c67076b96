"""The grid of tiles that the blockwise path walks: how it is cut, which are visited, what the logits of one are.

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
from mhajax.kernels import finite, pairs
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
    guarded: bool  # there is a mask or a bias: what is not finite must stay where it is seen


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
        None if mask is None else mask.laid_out(queries, keys, static.leading, (rows, columns)),
        queries._replace(position=_pad(queries.position, -1, rows)),
        keys._replace(position=_pad(keys.position, -1, columns)),
        order,
        plain,
        visited,
        dropout.words(dropout_key) if static.dropout_rate and dropout_key is not None else None,
    )
    return operands, context


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


class Chunk(NamedTuple):
    """Some items: which, and their keys and values."""

    index: Array  # of the chunk
    example: Array  # [c]
    head: Array  # [c]
    k: Array  # [c, S, H]
    v: Array  # [c, S, Hv]


def chunk_of(static: Static, operands: Operands, index: Array) -> Chunk:
    """The chunk with this number; heads of a group share their keys and values."""
    items = static.tiling.items
    flat = index * items + jnp.arange(items)
    group = operands.q.shape[0] // operands.k.shape[0]
    distinct = max(1, items // group)  # key heads of the chunk

    def some(array: Array) -> Array:
        there = jax.lax.dynamic_slice_in_dim(array, index * items // group, distinct)
        return there if distinct == items else jnp.repeat(there, items // distinct, axis=0)

    return Chunk(index, flat // static.num_heads, flat % static.num_heads, some(operands.k), some(operands.v))


def of_chunk(static: Static, array: Array, chunk: Chunk) -> Array:
    """The items of the chunk, of an array with all items in front."""
    return jax.lax.dynamic_slice_in_dim(array, chunk.index * static.tiling.items, static.tiling.items)


def times(body: Callable, count: int) -> Any:
    """`lax.map` of a function of the index over 0 … count - 1, without a loop if there is only one."""
    if count == 1:
        return jax.tree.map(lambda a: a[None], body(jnp.int32(0)))
    return jax.lax.map(body, jnp.arange(count, dtype=jnp.int32))


def joined(tiles: Array) -> Array:
    """[t_tiles, c, rows, …] to [c, T, …]."""
    tiles = jnp.moveaxis(tiles, 0, 1)
    return tiles.reshape(tiles.shape[0], -1, *tiles.shape[3:])


def accumulate(body: Callable, state: Any, count: int) -> tuple[Any, Any]:
    """`lax.scan` over 0 … count - 1, without a loop if there is only one."""
    if count == 1:
        state, out = body(state, jnp.int32(0))
        return state, jax.tree.map(lambda a: a[None], out)
    return jax.lax.scan(body, state, jnp.arange(count, dtype=jnp.int32))


def visit(context: Context, chunk: Chunk, row: Array, body: Callable[[Tile, Any], Any], state: Any) -> Any:
    """state = body(tile, state) over the tiles of a block of queries, those without a mask first."""
    if context.order.shape[-1] == 1:  # one tile: nothing to loop over
        masked = not (isinstance(context.plain, np.ndarray) and np.all(context.plain == 1))
        return body(Tile(chunk, row, jnp.int32(0), masked), state)
    mine = jnp.minimum(chunk.index, context.order.shape[0] - 1)
    order, plain, visited = (jnp.asarray(a)[mine, row] for a in (context.order, context.plain, context.visited))
    known = isinstance(context.plain, np.ndarray)
    if not (known and np.all(context.plain == 0)):
        state = jax.lax.fori_loop(0, plain, lambda i, state: body(Tile(chunk, row, order[i], False), state), state)
    if not (known and np.all(context.plain == context.visited)):
        state = jax.lax.fori_loop(plain, visited, lambda i, state: body(Tile(chunk, row, order[i], True), state), state)
    return state


def cut(array: Array, axis: int, index: Array, size: int) -> Array:
    """The block with this number, of `size` entries along an axis."""
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def cut_tokens(static: Static, array: Array, index: Array, size: int) -> Array:
    """The block with this number of [c, tokens, H]; if there is a mask, with 0 in place of what is not finite.

    It is copied anyway, so that this costs nothing; `spoilt` says who must not be told the result.
    """
    block = cut(array, 1, index, size)
    return finite.healed(block)[0] if static.guarded else block


class Lengths(NamedTuple):
    """The largest length of a vector of every head; not finite if any of the head's numbers is not."""

    q: Array  # [B·N]
    k: Array  # [B·K]
    v: Array  # [B·K]

    @property
    def finite(self) -> Array:
        """Whether all are, bool []."""
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in self]))


def lengths_of(*arrays: Array) -> Lengths:
    """Those of q [B·N, T, H], k [B·K, S, H] and v [B·K, S, Hv]."""
    wide = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)
    return Lengths(*(jnp.sqrt(jnp.max(jnp.sum(a * a, axis=-1), axis=-1, initial=0)) for a in wide))


def spoilt(static: Static, operands: Operands, context: Context) -> Array:
    """Queries that see something that is not finite, bool [B·N, T]."""
    items, rows, columns = static.tiling
    (_, bad_queries), (_, bad_keys), (_, bad_values) = map(finite.healed, (operands.q, operands.k, operands.v))

    def one_chunk(index: Array) -> Array:
        chunk = chunk_of(static, operands._replace(k=bad_keys, v=bad_values), index)
        asking, sought = of_chunk(static, bad_queries, chunk), chunk.k | chunk.v

        def one_row(row: Array) -> Array:
            def visited(tile: Tile, state: Array) -> Array:
                pairs = cut(asking, 1, row, rows)[:, :, None] | cut(sought, 1, tile.column, columns)[:, None, :]
                allowed = _allowed(static, context, tile, bias_of(static, operands.bias, tile))
                return state | jnp.any(pairs if allowed is None else pairs & allowed, axis=-1)

            return visit(context, chunk, row, visited, jnp.zeros((items, rows), bool))

        return joined(times(one_row, operands.q.shape[1] // rows))

    return times(one_chunk, operands.q.shape[0] // items).reshape(bad_queries.shape)


def scaled(static: Static, q: Array) -> tuple[Array, float]:
    """The queries times the scale, and what is left of it for the logits: nothing, unless the queries are narrow."""
    if q.dtype.itemsize < 4:
        return q, static.scale
    return jax.lax.optimization_barrier(q * static.scale), 1.0


class Tile(NamedTuple):
    """Some queries and some keys of a chunk."""

    chunk: Chunk
    row: Array  # which block of queries
    column: Array  # which block of keys
    masked: bool  # whether some pairs may not attend

    def places(self, context: Context, static: Static, example: Array) -> tuple[Tokens, Tokens]:
        """The queries and the keys of one example."""
        _, rows, columns = static.tiling
        return (
            context.queries.of(example).part(self.row, rows),
            context.keys.of(example).part(self.column, columns),
        )


def logits(
    static: Static, context: Context, tile: Tile, raw: Array, bias: Array | None, constants: tuple[Array, ...],
) -> Array:  # fmt: skip
    """Logits of a tile, [c, rows, columns], -inf where masked.

    Args:
      raw: scaled products.
      bias: the tile's part of it, [c, 1 or rows, 1 or columns].
      constants: of the score function.
    """
    scores = raw
    if static.score is not None:
        of_pairs = pairs.lift(static.score)

        def one_item(raw: Array, example: Array, head: Array) -> Array:
            queries, keys = tile.places(context, static, example)
            return of_pairs(raw, head, queries.position, keys.position, *constants)

        scores = jax.vmap(one_item)(raw, tile.chunk.example, tile.chunk.head)
    allowed = _allowed(static, context, tile, bias)
    if allowed is None:
        return scores
    if bias is not None:
        scores = scores + jnp.where(allowed, bias, 0)
    # A bound stays in one loop with the product, a choice does not; but a choice also hides what a score makes of it.
    bound = jnp.where(allowed, jnp.inf, -jnp.inf).astype(scores.dtype)
    scores = jnp.minimum(scores, bound)
    return scores if static.score is None and bias is None else jnp.where(allowed, scores, -jnp.inf)


def _allowed(static: Static, context: Context, tile: Tile, bias: Array | None) -> Array | None:
    """Which pairs of a tile may attend, [c or 1, rows, columns]; None: all."""
    allowed = None if bias is None else bias != -jnp.inf  # NaN is not hidden
    if not tile.masked:
        return allowed
    _, rows, columns = static.tiling
    if context.mask is not None:
        mask = context.mask

        def one_item(example: Array, head: Array) -> Array:
            block = mask.of(example, head).block(*tile.places(context, static, example))
            return jnp.broadcast_to(block.reshape(block.shape[-2:]), (rows, columns))

        of_mask = jax.vmap(one_item)(tile.chunk.example, tile.chunk.head)
        allowed = of_mask if allowed is None else allowed & of_mask
    if static.num_keys % columns:  # the last keys are padding
        real = (tile.column * columns + jnp.arange(columns) < static.num_keys)[None, None]
        allowed = real if allowed is None else allowed & real
    return allowed


def kept(static: Static, context: Context, tile: Tile) -> Array:
    """Which weights of a tile dropout leaves, [c, rows, columns]: those that `dropout.keep` leaves of the whole."""
    _, rows, columns = static.tiling
    word = lambda a: jnp.asarray(a, jnp.uint32)  # noqa: E731
    item = word(tile.chunk.example) * word(static.num_heads) + word(tile.chunk.head)
    query = word(tile.row * rows) + jnp.arange(rows, dtype=jnp.uint32)
    key = word(tile.column * columns) + jnp.arange(columns, dtype=jnp.uint32)
    query = item[:, None, None] * word(static.num_queries) + query[None, :, None]
    counter = query * word(static.num_keys) + key[None, None]
    return dropout.keep_at(context.words, static.dropout_rate, counter)


def bias_of(static: Static, bias: Array | None, tile: Tile) -> Array | None:
    """The part of the bias for a tile, [c, 1 or rows, 1 or columns]."""
    if bias is None:
        return None
    whole = bias

    def one_item(example: Array, head: Array) -> Array:
        start, sizes = _bias_place(static, whole, tile, example, head)
        return jax.lax.dynamic_slice(whole, start, sizes)[0, 0]

    return jax.vmap(one_item)(tile.chunk.example, tile.chunk.head)


def add_to_bias(static: Static, total: Array, part: Array, tile: Tile) -> Array:
    """The gradient of the bias with that of a tile [c, rows, columns] added, summed where it is shared."""

    def one_item(i: Array, total: Array) -> Array:
        start, sizes = _bias_place(static, total, tile, tile.chunk.example[i], tile.chunk.head[i])
        shared = tuple(axis for axis in (0, 1) if sizes[2 + axis] == 1)
        mine = jnp.sum(part[i], axis=shared, keepdims=True)[None, None]
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, sizes) + mine, start)

    return jax.lax.fori_loop(0, static.tiling.items, one_item, total)


def _bias_place(static: Static, bias: Array, tile: Tile, example: Array, head: Array) -> tuple[list, tuple]:
    """Where one item's part of the bias begins, and how large it is."""
    _, rows, columns = static.tiling
    wanted = (example, head, tile.row * rows, tile.column * columns)
    start = [jnp.int32(0) if size == 1 else at for size, at in zip(bias.shape, wanted, strict=True)]
    return start, (1, 1, min(bias.shape[2], rows), min(bias.shape[3], columns))
