"""The walk over a grid of tiles: a few heads at a time, a block of queries, the tiles that they see; what a tile holds.

What the blockwise path computes on the way is its own affair: here is where the walk goes, and what the logits, the
bias and the dropout of one tile are.
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
from mhajax.kernels.grid import Context, Operands, Static
from mhajax.kernels.loops import times
from mhajax.masks import Tokens


class Chunk(NamedTuple):
    """Some items: which, and their keys and values."""

    index: Array  # of the chunk
    example: Array  # [c]
    head: Array  # [c]
    k: Array  # [c, S, H]
    v: Array  # [c, S, Hv]


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
            context.queries.at(example).part(self.row, rows),
            context.keys.at(example).part(self.column, columns),
        )


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


def joined(tiles: Array) -> Array:
    """[t_tiles, c, rows, …] to [c, T, …]."""
    tiles = jnp.moveaxis(tiles, 0, 1)
    return tiles.reshape(tiles.shape[0], -1, *tiles.shape[3:])


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


def cut_tokens(static: Static, array: Array, index: Array, size: int, limit: float = math.inf) -> Array:
    """The block with this number of [c, tokens, H]; if there is something to guard, with 0 in place of what is bad.

    It is copied anyway, so that this costs little; `spoilt` says who must not be told the result.
    """
    block = cut(array, 1, index, size)
    return finite.healed(block, limit)[0] if static.guarded else block


def spoilt(static: Static, operands: Operands, context: Context) -> Array:
    """Queries that see something bad, bool [B·N, T]."""
    items, rows, columns = static.tiling
    q, k, v, *_ = operands
    bad_queries, bad_keys, bad_values = (
        finite.healed(a, most)[1] for a, most in ((q, finite.limit(q)), (k, finite.limit(k)), (v, math.inf))
    )

    def one_chunk(index: Array) -> Array:
        chunk = chunk_of(static, operands._replace(k=bad_keys, v=bad_values), index)
        asking, sought = of_chunk(static, bad_queries, chunk), chunk.k | chunk.v

        def one_row(row: Array) -> Array:
            def visited(tile: Tile, state: Array) -> Array:
                pairs = cut(asking, 1, row, rows)[:, :, None] | cut(sought, 1, tile.column, columns)[:, None, :]
                allowed = _allowed(static, context, tile, bias_of(static, operands.bias, tile))
                return state | jnp.any(pairs if allowed is None else pairs & allowed, axis=-1)

            return visit(context, chunk, row, visited, jnp.zeros_like(asking, bool, (items, rows)))

        return joined(times(one_row, operands.q.shape[1] // rows))

    return times(one_chunk, operands.q.shape[0] // items).reshape(bad_queries.shape)


def scaled(static: Static, q: Array) -> tuple[Array, float]:
    """The queries times the scale, and what is left of it for the logits: nothing, unless the queries are narrow."""
    if q.dtype.itemsize < 4:
        return q, static.scale
    return jax.lax.optimization_barrier(q * static.scale), 1.0


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
    hidden = jnp.where(allowed, 0 if bias is None else bias, -jnp.inf).astype(scores.dtype)
    # A sum stays in one loop with the products, a choice does not; but a score may make anything of what is hidden.
    return scores + hidden if static.score is None else jnp.where(allowed, scores + hidden, -jnp.inf)


def _allowed(static: Static, context: Context, tile: Tile, bias: Array | None) -> Array | None:
    """Which pairs of a tile may attend, [c or 1, rows, columns]; None: all."""
    allowed = None if bias is None else bias != -jnp.inf  # NaN is not hidden
    if not tile.masked:
        return allowed
    _, rows, columns = static.tiling
    if context.mask is not None:
        mask = context.mask

        def one_item(example: Array, head: Array) -> Array:
            block = mask.at(example, head).block(*tile.places(context, static, example))
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
    start = [jnp.asarray(0 if size == 1 else at, jnp.int32) for size, at in zip(bias.shape, wanted, strict=True)]
    return start, (1, 1, min(bias.shape[2], rows), min(bias.shape[3], columns))
