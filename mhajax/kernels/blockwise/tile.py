"""The loop over tiles: some batch-heads at a time, a block of queries, the tiles that they see; what a tile holds.

What the passes compute is their own affair: here is over which tiles they go, and what the logits, the bias and the
dropout of one tile are.
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
from mhajax.kernels import finite, score
from mhajax.kernels.blockwise.layout import Context, Operands, Static
from mhajax.kernels.loops import times
from mhajax.masks import Tokens


class Chunk(NamedTuple):
    """Some batch-heads: which, and their keys and values."""

    index: Array  # of the chunk
    example: Array  # [c]
    head: Array  # [c]
    k: Array  # [c, S, H]
    v: Array  # [c, S, Hv]


class Tile(NamedTuple):
    """Some queries and some keys of a chunk."""

    chunk: Chunk
    q_block: Array  # which block of queries
    k_block: Array  # which block of keys
    masked: bool  # whether some pairs may not attend

    def tokens(self, context: Context, static: Static, example: Array) -> tuple[Tokens, Tokens]:
        """The queries and the keys of one example."""
        _, block_q, block_k = static.tiling
        return (
            context.queries.at(example).part(self.q_block, block_q),
            context.keys.at(example).part(self.k_block, block_k),
        )


def chunk_of(static: Static, operands: Operands, index: Array) -> Chunk:
    """The chunk with this number; heads of a group share their keys and values."""
    size = static.tiling.batch_heads
    flat = index * size + jnp.arange(size)
    group = operands.q.shape[0] // operands.k.shape[0]
    distinct = max(1, size // group)  # key heads of the chunk

    def take_shared(array: Array) -> Array:
        heads = jax.lax.dynamic_slice_in_dim(array, index * size // group, distinct)
        return heads if distinct == size else jnp.repeat(heads, size // distinct, axis=0)

    example, head = flat // static.num_heads, flat % static.num_heads
    return Chunk(index, example, head, take_shared(operands.k), take_shared(operands.v))


def take_chunk(static: Static, array: Array, chunk: Chunk) -> Array:
    """The batch-heads of the chunk, of an array with all of them in front."""
    size = static.tiling.batch_heads
    return jax.lax.dynamic_slice_in_dim(array, chunk.index * size, size)


def merge_blocks(blocks: Array) -> Array:
    """[t_tiles, c, block_q, …] to [c, T, …]."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def loop(context: Context, chunk: Chunk, q_block: Array, body: Callable[[Tile, Any], Any], state: Any) -> Any:
    """state = body(tile, state) over the tiles of a block of queries, those without a mask first."""
    if context.order.shape[-1] == 1:  # one tile: nothing to loop over
        masked = not (isinstance(context.full, np.ndarray) and np.all(context.full == 1))
        return body(Tile(chunk, q_block, jnp.int32(0), masked), state)
    at = jnp.minimum(chunk.index, context.order.shape[0] - 1), q_block
    order, full, nonempty = (jnp.asarray(a)[at] for a in (context.order, context.full, context.nonempty))
    of_tile = lambda i, masked, state: body(Tile(chunk, q_block, order[i], masked), state)  # noqa: E731
    known = isinstance(context.full, np.ndarray)
    if not (known and np.all(context.full == 0)):
        state = jax.lax.fori_loop(0, full, lambda i, state: of_tile(i, False, state), state)
    if not (known and np.all(context.full == context.nonempty)):
        state = jax.lax.fori_loop(full, nonempty, lambda i, state: of_tile(i, True, state), state)
    return state


def cut(array: Array, axis: int, index: Array, size: int) -> Array:
    """The block with this number, of `size` entries along an axis."""
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def cut_tokens(static: Static, array: Array, index: Array, size: int, limit: float = math.inf) -> Array:
    """The block with this number of [c, tokens, H]; if there is something to guard, with 0 in place of non-finite rows.

    It is copied anyway, so that this costs little; `reached` says who must not be told the result.
    """
    block = cut(array, 1, index, size)
    return finite.replace_rows(block, limit)[0] if static.guarded else block


def reached(static: Static, operands: Operands, context: Context) -> Array:
    """Queries that see something non-finite, bool [B·N, T]."""
    batch_heads, block_q, block_k = static.tiling
    q, k, v, *_ = operands
    bad_q, bad_k, bad_v = (
        finite.replace_rows(a, most)[1] for a, most in ((q, finite.limit(q)), (k, finite.limit(k)), (v, math.inf))
    )

    def one_chunk(index: Array) -> Array:
        chunk = chunk_of(static, operands._replace(k=bad_k, v=bad_v), index)
        of_queries, of_keys = take_chunk(static, bad_q, chunk), chunk.k | chunk.v

        def one_block(i: Array) -> Array:
            def body(tile: Tile, state: Array) -> Array:
                pairs = cut(of_queries, 1, i, block_q)[:, :, None] | cut(of_keys, 1, tile.k_block, block_k)[:, None, :]
                allowed = _allowed(static, context, tile, bias_of(static, operands.bias, tile))
                return state | jnp.any(pairs if allowed is None else pairs & allowed, axis=-1)

            return loop(context, chunk, i, body, jnp.zeros_like(of_queries, bool, (batch_heads, block_q)))

        return merge_blocks(times(one_block, operands.q.shape[1] // block_q))

    return times(one_chunk, operands.q.shape[0] // batch_heads).reshape(bad_q.shape)


def scale_queries(static: Static, q: Array) -> tuple[Array, float]:
    """The queries times the scale, and what is left of it for the logits: nothing, unless the queries are narrow."""
    if q.dtype.itemsize < 4:
        return q, static.scale
    return jax.lax.optimization_barrier(q * static.scale), 1.0


def logits(
    static: Static, context: Context, tile: Tile, raw: Array, bias: Array | None, constants: tuple[Array, ...],
) -> Array:  # fmt: skip
    """Logits of a tile, [c, block_q, block_k], -inf where masked.

    Args:
      raw: scaled products.
      bias: the tile's part of it, [c, 1 or block_q, 1 or block_k].
      constants: of the score function.
    """
    scores = raw
    if static.score is not None:
        of_pairs = score.lift(static.score)

        def one_head(raw: Array, example: Array, head: Array) -> Array:
            queries, keys = tile.tokens(context, static, example)
            return of_pairs(raw, head, queries.position, keys.position, *constants)

        scores = jax.vmap(one_head)(raw, tile.chunk.example, tile.chunk.head)
    allowed = _allowed(static, context, tile, bias)
    if allowed is None:
        return scores
    hidden = jnp.where(allowed, 0 if bias is None else bias, -jnp.inf).astype(scores.dtype)
    # A sum stays in one loop with the products, a choice does not; but a score may make anything of what is hidden.
    return scores + hidden if static.score is None else jnp.where(allowed, scores + hidden, -jnp.inf)


def _allowed(static: Static, context: Context, tile: Tile, bias: Array | None) -> Array | None:
    """Which pairs of a tile may attend, [c or 1, block_q, block_k]; None: all."""
    allowed = None if bias is None else bias != -jnp.inf  # NaN is not hidden
    if not tile.masked:
        return allowed
    _, block_q, block_k = static.tiling
    if context.mask is not None:
        mask = context.mask

        def one_head(example: Array, head: Array) -> Array:
            block = mask.at(example, head).block(*tile.tokens(context, static, example))
            return jnp.broadcast_to(block.reshape(block.shape[-2:]), (block_q, block_k))

        of_mask = jax.vmap(one_head)(tile.chunk.example, tile.chunk.head)
        allowed = of_mask if allowed is None else allowed & of_mask
    if static.num_keys % block_k:  # the last keys are padding
        valid = (tile.k_block * block_k + jnp.arange(block_k) < static.num_keys)[None, None]
        allowed = valid if allowed is None else allowed & valid
    return allowed


def kept(static: Static, context: Context, tile: Tile) -> Array:
    """Which weights of a tile dropout leaves, [c, block_q, block_k]: those that `dropout.keep` leaves of the whole."""
    _, block_q, block_k = static.tiling
    word = lambda a: jnp.asarray(a, jnp.uint32)  # noqa: E731
    head = word(tile.chunk.example) * word(static.num_heads) + word(tile.chunk.head)
    query = word(tile.q_block * block_q) + jnp.arange(block_q, dtype=jnp.uint32)
    key = word(tile.k_block * block_k) + jnp.arange(block_k, dtype=jnp.uint32)
    query = head[:, None, None] * word(static.num_queries) + query[None, :, None]
    counter = query * word(static.num_keys) + key[None, None]
    return dropout.keep_at(context.words, static.dropout_rate, counter)


def bias_of(static: Static, bias: Array | None, tile: Tile) -> Array | None:
    """The part of the bias for a tile, [c, 1 or block_q, 1 or block_k]."""
    if bias is None:
        return None
    whole = bias

    def one_head(example: Array, head: Array) -> Array:
        start, sizes = _bias_slice(static, whole, tile, example, head)
        return jax.lax.dynamic_slice(whole, start, sizes)[0, 0]

    return jax.vmap(one_head)(tile.chunk.example, tile.chunk.head)


def add_to_bias(static: Static, total: Array, part: Array, tile: Tile) -> Array:
    """The gradient of the bias with that of a tile [c, block_q, block_k] added, summed where it is shared."""

    def one_head(i: Array, total: Array) -> Array:
        start, sizes = _bias_slice(static, total, tile, tile.chunk.example[i], tile.chunk.head[i])
        shared = tuple(axis for axis in (0, 1) if sizes[2 + axis] == 1)
        summed = jnp.sum(part[i], axis=shared, keepdims=True)[None, None]
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, sizes) + summed, start)

    return jax.lax.fori_loop(0, static.tiling.batch_heads, one_head, total)


def _bias_slice(static: Static, bias: Array, tile: Tile, example: Array, head: Array) -> tuple[list, tuple]:
    """Where one batch-head's part of the bias begins, and how large it is."""
    _, block_q, block_k = static.tiling
    wanted = (example, head, tile.q_block * block_q, tile.k_block * block_k)
    start = [jnp.asarray(0 if size == 1 else at, jnp.int32) for size, at in zip(bias.shape, wanted, strict=True)]
    return start, (1, 1, min(bias.shape[2], block_q), min(bias.shape[3], block_k))
