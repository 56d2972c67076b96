"""Attention in tiles: a few hundred queries by a few hundred keys at a time, so that memory grows with T, not T².

The grid of queries × keys is cut into tiles. For each block of queries a loop runs over the tiles that the mask does
not rule out, first over those in which every pair is allowed (no mask is evaluated there), then over the others, and
keeps a running maximum, sum and output. The backward pass computes the weights again from the saved log-sum-exp.

How the loops are laid out (how many heads at a time, how large a tile) is a `Tiling`; `kernels.choice` picks it.

References:
  Rabe & Staats 2021, "Self-attention Does Not Need O(n²) Memory"; Dao 2023, "FlashAttention-2", sections 2.3 and 3.1
  (their L is our log-sum-exp, their D our delta); lists of full and partial tiles: Dong et al. 2024, "Flex Attention",
  section 4.1 (their BlockMask).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import dropout, precision
from mhajax.kernels import pairs
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
    words: Array | None  # the dropout's, [2]


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | None = None,
    bias: Array | None = None,
    score: Callable | None = None,
    constants: tuple[Array, ...] = (),
    queries: Tokens,
    keys: Tokens,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    tiling: Tiling,
) -> tuple[Array, Array]:
    """The heads' outputs and the logarithm of every query's sum; the contract is that of `kernels.attend`.

    Forward-mode derivatives are not defined for this path: `jax.jvp`, `jax.jacfwd`, `jax.hessian` need the dense one.

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      bias: [..., 1 or N, 1 or T, 1 or S]; -inf masks.
      score: of one pair, with its constants as arguments after the positions.
      tiling: how the work is cut; changes no result beyond rounding.
      mask, queries, keys, scale, dropout_rate, dropout_key: as in `kernels.attend`.

    Returns:
      [..., N, T, Hv] in the dtype of v, and float32 [..., N, T] (-inf where nothing may be attended to).
    """
    *leading, num_heads, length, _ = q.shape
    num_keys = k.shape[-2]
    drop = bool(dropout_rate) and dropout_key is not None
    static = Static(
        tiling, tuple(leading), num_heads, length, num_keys, scale, dropout_rate if drop else 0.0, score
    )  # fmt: skip
    rows, columns = -length % tiling.rows, -num_keys % tiling.columns
    flat = lambda a, tokens: _pad(a.reshape(-1, *a.shape[-2:]), -2, tokens)  # noqa: E731
    operands = Operands(flat(q, rows), flat(k, columns), flat(v, columns), _lay_out_bias(bias, static), constants)
    context = Context(
        None if mask is None else mask.laid_out(queries, keys, tuple(leading), (rows, columns)),
        queries._replace(position=_pad(queries.position, -1, rows)),
        keys._replace(position=_pad(keys.position, -1, columns)),
        *_visits(mask, bias, queries, keys, static),
        dropout.words(dropout_key) if drop else None,
    )
    heads, log_sums = _attend(static, operands, context)
    shape = (*leading, num_heads)
    return heads[:, :length].reshape(*shape, length, -1), log_sums[:, :length].reshape(*shape, length)


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
    bias = bias.reshape(math.prod(have), heads, t, s)
    for axis, tile in ((-2, static.tiling.rows), (-1, static.tiling.columns)):
        if bias.shape[axis] > 1:
            bias = _pad(bias, axis, -bias.shape[axis] % tile)
    return bias


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
        every = every & (xp.arange(every.shape[-1]) < every.shape[-1] - 1)
    if some.ndim > 2:
        full = (*static.leading, static.num_heads, *some.shape[-2:])
        some, every = (xp.broadcast_to(a, full).reshape(-1, items, *some.shape[-2:]) for a in (some, every))
        some, every = some.any(1), every.all(1)
    else:
        some, every = some[None], every[None]
    kind = xp.where(every, 0, xp.where(some, 1, 2))
    order = xp.argsort(kind, axis=-1, stable=True).astype(np.int32)
    return order, (kind == 0).sum(-1).astype(np.int32), (kind < 2).sum(-1).astype(np.int32)


class _Chunk(NamedTuple):
    """Some items: which, and their keys and values."""

    index: Array  # of the chunk
    example: Array  # [c]
    head: Array  # [c]
    k: Array  # [c, S, H]
    v: Array  # [c, S, Hv]


def _chunk(static: Static, operands: Operands, index: Array) -> _Chunk:
    items = static.tiling.items
    flat = index * items + jnp.arange(items)
    group = operands.q.shape[0] // operands.k.shape[0]
    distinct = max(1, items // group)  # key heads of the chunk
    some = lambda a: jnp.repeat(  # noqa: E731
        jax.lax.dynamic_slice_in_dim(a, index * items // group, distinct), items // distinct, axis=0
    )
    return _Chunk(index, flat // static.num_heads, flat % static.num_heads, some(operands.k), some(operands.v))


def _of_chunk(static: Static, array: Array, chunk: _Chunk) -> Array:
    """The items of the chunk, of an array with all items in front."""
    return jax.lax.dynamic_slice_in_dim(array, chunk.index * static.tiling.items, static.tiling.items)


def _times(body: Callable, count: int) -> Any:
    """`lax.map` of a function of the index over 0 … count - 1, without a loop if there is only one."""
    if count == 1:
        return jax.tree.map(lambda a: a[None], body(jnp.int32(0)))
    return jax.lax.map(body, jnp.arange(count, dtype=jnp.int32))


def _visit(context: Context, chunk: _Chunk, row: Array, tile: Callable, state: Any) -> Any:
    """state = tile(column, masked, state) over the tiles of a block of queries, the plain ones first."""
    if context.order.shape[-1] == 1:  # one tile: nothing to loop over
        masked = not (isinstance(context.plain, np.ndarray) and np.all(context.plain == 1))
        return tile(jnp.int32(0), masked, state)
    mine = jnp.minimum(chunk.index, context.order.shape[0] - 1)
    order, plain, visited = (jnp.asarray(a)[mine, row] for a in (context.order, context.plain, context.visited))
    known = isinstance(context.plain, np.ndarray)
    if not (known and np.all(context.plain == 0)):
        state = jax.lax.fori_loop(0, plain, lambda i, state: tile(order[i], False, state), state)
    if not (known and np.all(context.plain == context.visited)):
        state = jax.lax.fori_loop(plain, visited, lambda i, state: tile(order[i], True, state), state)
    return state


def _cut(array: Array, axis: int, index: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _logits(
    static: Static, context: Context, chunk: _Chunk, row: Array, column: Array, masked: bool,
    raw: Array, bias: Array | None, constants: tuple[Array, ...],
) -> Array:  # fmt: skip
    """Logits of a tile, [c, rows, columns], -inf where masked, from scaled products and the tile of the bias."""
    _, rows, columns = static.tiling
    places = lambda example: (  # noqa: E731
        context.queries.of(example).part(row, rows), context.keys.of(example).part(column, columns)
    )  # fmt: skip
    allowed = None
    if masked:
        if context.mask is not None:
            mask = context.mask
            allowed = jax.vmap(lambda e, n: _full(mask.of(e, n).block(*places(e)), rows, columns))(
                chunk.example, chunk.head
            )
        if static.num_keys % columns:
            real = column * columns + jnp.arange(columns) < static.num_keys
            allowed = real if allowed is None else allowed & real
    logits = raw
    if static.score is not None:
        of_pair = static.score

        def one_item(raw: Array, example: Array, head: Array) -> Array:
            queries, keys = places(example)
            return pairs.lift(of_pair)(raw, head, queries.position, keys.position, *constants)

        logits = jax.vmap(one_item)(raw, chunk.example, chunk.head)
    if bias is not None:
        visible = bias != -jnp.inf  # NaN is not hidden
        allowed = visible if allowed is None else allowed & visible
        logits = logits + jnp.where(allowed, bias, 0)
    if allowed is None:
        return logits
    if static.score is None and bias is None:  # a bound stays in one loop with the product, a choice does not
        return jnp.minimum(logits, jnp.where(allowed, jnp.inf, -jnp.inf).astype(logits.dtype))
    return jnp.where(allowed, logits, -jnp.inf)


def _full(block: Array, rows: int, columns: int) -> Array:
    """[1 or rows, 1 or columns], perhaps with axes of 1 in front, to [rows, columns]."""
    return jnp.broadcast_to(block.reshape(block.shape[-2:]), (rows, columns))


def _bias_tile(static: Static, bias: Array | None, example: Array, head: Array, row: Array, column: Array) -> Any:
    """The part of the bias for one item's tile, [1 or rows, 1 or columns]."""
    if bias is None:
        return None
    start, sizes = _bias_place(static, bias, example, head, row, column)
    return jax.lax.dynamic_slice(bias, start, sizes)[0, 0]


def _bias_place(static: Static, bias: Array, example: Array, head: Array, row: Array, column: Array) -> tuple:
    zero = jnp.int32(0)
    wanted = (example, head, row * static.tiling.rows, column * static.tiling.columns)
    start = [zero if size == 1 else at for size, at in zip(bias.shape, wanted, strict=True)]
    return start, (1, 1, min(bias.shape[2], static.tiling.rows), min(bias.shape[3], static.tiling.columns))


def _kept(static: Static, context: Context, chunk: _Chunk, row: Array, column: Array) -> Array:
    """Which weights of a tile dropout leaves, [c, rows, columns]: those that `dropout.keep` leaves of the whole."""
    _, rows, columns = static.tiling
    word = lambda a: jnp.asarray(a, jnp.uint32)  # noqa: E731
    item = word(chunk.example) * word(static.num_heads) + word(chunk.head)
    query = item[:, None] * word(static.num_queries) + word(row * rows) + jnp.arange(rows, dtype=jnp.uint32)
    key = word(column * columns) + jnp.arange(columns, dtype=jnp.uint32)
    counter = query[..., None] * word(static.num_keys) + key
    return dropout.keep_at(context.words, static.dropout_rate, counter)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, operands: Operands, context: Context) -> tuple[Array, Array]:
    return _forward(static, operands, context)[0]


def _forward(static: Static, operands: Operands, context: Context) -> tuple:
    """[B·N, T, Hv] and log-sum-exp [B·N, T]."""
    items, rows, columns = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    count, length = operands.q.shape[0] // items, operands.q.shape[1] // rows

    def one_chunk(index: Array) -> tuple[Array, Array]:
        chunk = _chunk(static, operands, index)
        q = _of_chunk(static, operands.q, chunk)

        def one_row(row: Array) -> tuple[Array, Array]:
            asking = _cut(q, 1, row, rows)

            def tile(column: Array, masked: bool, state: tuple | None) -> tuple:
                k, v = _cut(chunk.k, 1, column, columns), _cut(chunk.v, 1, column, columns)
                raw = precision.einsum("cth,csh->cts", asking, k) * static.scale
                bias = jax.vmap(lambda e, n: _bias_tile(static, operands.bias, e, n, row, column))(
                    chunk.example, chunk.head
                ) if operands.bias is not None else None  # fmt: skip
                logits = _logits(static, context, chunk, row, column, masked, raw, bias, operands.constants)
                top = jnp.max(logits, axis=-1)
                if state is not None:
                    top = jnp.maximum(top, state[1])
                safe = jnp.where(top == -jnp.inf, 0, top) if masked or state is not None else top
                weights = jnp.exp(logits - safe[..., None])
                total = jnp.sum(weights, axis=-1)
                if static.dropout_rate:
                    kept = _kept(static, context, chunk, row, column)
                    weights = jnp.where(kept, weights * (1 / (1 - static.dropout_rate)), 0)
                out = precision.einsum("cts,csh->cth", weights.astype(v.dtype), v)
                if state is not None:
                    shrink = jnp.exp(state[1] - safe)
                    out, total = out + state[0] * shrink[..., None], total + state[2] * shrink
                return out, top, total

            shape = (items, rows)
            state = None if context.order.shape[-1] == 1 else (
                jnp.zeros((*shape, operands.v.shape[-1]), wide), jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide)
            )  # fmt: skip
            out, top, total = _visit(context, chunk, row, tile, state)
            log_sum = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total)))
            out = out / jnp.where(total == 0, 1, total)[..., None]
            return out.astype(operands.v.dtype), log_sum

        out, log_sum = _times(one_row, length)  # [t_tiles, c, rows, …]
        return _joined(out), _joined(log_sum)

    out, log_sums = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), _times(one_chunk, count))
    return (out, log_sums), (operands, context, out, log_sums)


def _joined(tiles: Array) -> Array:
    """[t_tiles, c, rows, …] to [c, T, …]."""
    tiles = jnp.moveaxis(tiles, 0, 1)
    return tiles.reshape(tiles.shape[0], -1, *tiles.shape[3:])


def _backward(static: Static, saved: tuple, cotangents: tuple) -> tuple:
    """Gradients of all operands, row block after row block; those of keys and values are summed up transposed."""
    operands, context, out, log_sums = saved
    d_out, d_log_sums = cotangents
    items, rows, columns = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    count, length = operands.q.shape[0] // items, operands.q.shape[1] // rows
    log_sums = jnp.where(log_sums == -jnp.inf, 0, log_sums)  # a query that sees nothing has no weights either way
    # The gradient of a weight's logit is weight · (its own gradient - delta).
    delta = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1) - d_log_sums
    d_shared = jax.tree.map(lambda a: jnp.zeros(a.shape, wide), (operands.bias, operands.constants))

    def one_chunk(d_shared: Any, index: Array) -> tuple[Any, tuple]:
        chunk = _chunk(static, operands, index)
        mine = [_of_chunk(static, a, chunk) for a in (operands.q, d_out, log_sums, delta)]

        def one_row(state: tuple, row: Array) -> tuple[tuple, Array]:
            asking, d_asked, log_sum, lost = (_cut(a, 1, row, rows) for a in mine)
            # A product whose left side is transposed is slow on CPU: turn the thin side, not the weights.
            turned = jax.lax.optimization_barrier(tuple(jnp.swapaxes(a, 1, 2) for a in (asking, d_asked)))

            def tile(column: Array, masked: bool, state: tuple) -> tuple:
                d_k, d_v, d_shared, d_q = state
                k, v = _cut(chunk.k, 1, column, columns), _cut(chunk.v, 1, column, columns)
                raw = precision.einsum("cth,csh->cts", asking, k) * static.scale
                bias = jax.vmap(lambda e, n: _bias_tile(static, operands.bias, e, n, row, column))(
                    chunk.example, chunk.head
                ) if operands.bias is not None else None  # fmt: skip
                logits = partial(_logits, static, context, chunk, row, column, masked)
                if static.score is None:
                    weights = jnp.exp(logits(raw, bias, operands.constants) - log_sum[..., None])
                    back = lambda d: (d, (), d)  # noqa: E731
                else:
                    scores, pull = jax.vjp(lambda raw, constants: logits(raw, bias, constants), raw, operands.constants)
                    weights = jnp.exp(scores - log_sum[..., None])
                    back = lambda d: (*pull(d), d)  # noqa: E731
                d_weights = precision.einsum("cth,csh->cts", d_asked, v)
                kept_weights = weights
                if static.dropout_rate:
                    factor = jnp.where(
                        _kept(static, context, chunk, row, column), 1 / (1 - static.dropout_rate), 0
                    ).astype(wide)
                    kept_weights, d_weights = weights * factor, d_weights * factor
                d_logits = weights * (d_weights - lost[..., None])
                d_raw, d_constants, d_bias = back(d_logits)
                narrow = d_raw.astype(k.dtype)
                d_q = d_q + precision.einsum("cts,csh->cth", narrow, k)
                d_k = _add(d_k, precision.einsum("cht,cts->chs", turned[0], narrow), column, columns)
                d_v = _add(
                    d_v, precision.einsum("cht,cts->chs", turned[1], kept_weights.astype(v.dtype)), column, columns
                )
                if operands.bias is not None:
                    d_shared = _add_bias(static, d_shared[0], d_bias, chunk, row, column), d_shared[1]
                if static.score is not None:
                    d_shared = d_shared[0], jax.tree.map(jnp.add, d_shared[1], d_constants)
                return d_k, d_v, d_shared, d_q

            d_q = jnp.zeros((items, rows, operands.q.shape[-1]), wide)
            *state, d_q = _visit(context, chunk, row, tile, (*state, d_q))
            return tuple(state), (d_q * static.scale).astype(operands.q.dtype)

        num_keys = operands.k.shape[1]
        state = (*(jnp.zeros((items, a.shape[-1], num_keys), wide) for a in (operands.k, operands.v)), d_shared)
        if length == 1:
            (d_k, d_v, d_shared), d_q = one_row(state, jnp.int32(0))
            d_q = d_q[None]
        else:
            (d_k, d_v, d_shared), d_q = jax.lax.scan(one_row, state, jnp.arange(length, dtype=jnp.int32))
        return d_shared, (_joined(d_q), d_k, d_v)

    d_shared, (d_q, d_k, d_v) = jax.lax.scan(one_chunk, d_shared, jnp.arange(count, dtype=jnp.int32))
    group = operands.q.shape[0] // operands.k.shape[0]

    def ungrouped(d: Array, like: Array, factor: float) -> Array:
        """[chunks, c, H, S] to [B·K, S, H], summed over the query heads that share a key head."""
        d = d.reshape(-1, group, *d.shape[2:])
        d = d[:, 0] if group == 1 else jnp.sum(d, axis=1)
        return (jnp.swapaxes(d, 1, 2) * factor).astype(like.dtype)

    d_bias, d_constants = jax.tree.map(lambda d, a: d.astype(a.dtype), d_shared, (operands.bias, operands.constants))
    return Operands(
        d_q.reshape(operands.q.shape), ungrouped(d_k, operands.k, static.scale), ungrouped(d_v, operands.v, 1.0),
        d_bias, d_constants,
    ), None  # fmt: skip


def _add(total: Array, part: Array, column: Array, columns: int) -> Array:
    """The sum with the part of one column of tiles added, [c, H, S]."""
    at = column * columns
    there = jax.lax.dynamic_slice_in_dim(total, at, columns, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, there + part, at, axis=2)


def _add_bias(static: Static, total: Array, part: Array, chunk: _Chunk, row: Array, column: Array) -> Array:
    """The gradient of the bias with that of the chunk's tile [c, rows, columns] added, summed where it is shared."""

    def one_item(i: Array, total: Array) -> Array:
        start, sizes = _bias_place(static, total, chunk.example[i], chunk.head[i], row, column)
        shared = tuple(axis for axis in (0, 1) if sizes[2 + axis] == 1)
        mine = jnp.sum(part[i], axis=shared, keepdims=True)[None, None]
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, sizes) + mine, start)

    return jax.lax.fori_loop(0, static.tiling.items, one_item, total)


_attend.defvjp(_forward, _backward)
