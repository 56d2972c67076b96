"""Attention in tiles: a few hundred queries by a few hundred keys at a time, so that memory grows with T, not T².

The grid of queries × keys is cut into tiles. For each block of queries a loop runs over the tiles that the mask does
not rule out, first over those in which every pair is allowed (no mask is evaluated there), then over the others, and
keeps a running maximum, sum and output. The backward pass computes the weights again from the saved maximum and sum.

How the loops are laid out (how many heads at a time, how large a tile) is a `Tiling`; `kernels.choice` picks it. Where
no gradient is taken, whole rows of many heads may be one tile: XLA's library for CPUs takes both products and the
softmax between them as one loop, which writes no logits down, if all that is between is maximum, exponential, sums and
products. A choice between two values breaks that loop: so a mask adds 0 or -inf, and a query that sees nothing is no
special case.

References:
  Rabe & Staats 2021, "Self-attention Does Not Need O(n²) Memory"; Dao 2023, "FlashAttention-2", sections 2.3 and 3.1
  (their L is our log-sum-exp, their D our delta); lists of full and partial tiles: Dong et al. 2024, "Flex Attention",
  section 4.1 (their BlockMask).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import precision
from mhajax.kernels import devices, finite, grid, walk
from mhajax.kernels.grid import Context, Operands, Static, Tiling
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.kernels.loops import accumulate, times
from mhajax.kernels.walk import Tile
from mhajax.masks import Mask, Tokens


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
    values_at_once: int = 0,
) -> tuple[Array, LogSumExp]:
    """The heads' outputs and the log-sum-exp of every query; the contract is that of `kernels.attend`.

    Forward-mode derivatives are not defined for this path: `jax.jvp`, `jax.jacfwd`, `jax.hessian` need the dense one.
    Gradients of gradients hold every logit, as the dense path does.

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      bias: [..., 1 or N, 1 or T, 1 or S]; -inf masks.
      score: of one pair, with its constants as arguments after the positions.
      tiling: how the work is cut; changes no result beyond rounding.
      values_at_once: heads whose whole rows are computed together where no gradient is taken; divides B·N, and divides
        N/K or is a multiple of it. 0: as the tiling says.
      mask, queries, keys, scale, dropout_rate, dropout_key: as in `kernels.attend`.

    Returns:
      [..., N, T, Hv] in the dtype of v, and the log-sum-exp, float32 [..., N, T].
    """
    *leading, num_heads, length, _ = q.shape
    if 0 in leading:  # no examples, no tiles
        nothing = jnp.zeros(q.shape[:-1], jnp.promote_types(q.dtype, jnp.float32))
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype), LogSumExp(nothing, nothing - jnp.inf)
    static = Static(
        tiling, tuple(leading), num_heads, length, k.shape[-2], scale,
        0.0 if dropout_key is None else dropout_rate, score, guarded=mask is not None or bias is not None,
    )  # fmt: skip
    operands, context = grid.lay_out(static, q, k, v, mask, bias, constants, queries, keys, dropout_key)
    known, arrays = grid.split(context)
    results: Any = _attend((static, values_at_once, known), operands, arrays)
    heads, log_sums = results
    shape = (*leading, num_heads)
    heads = heads[:, :length].astype(v.dtype).reshape(*shape, length, v.shape[-1])
    return heads, jax.tree.map(lambda a: a[:, :length].reshape(*shape, length), log_sums)


_Fixed = tuple[Static, int, grid.Known]  # how, heads at once for values only, what the context holds besides arrays


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(fixed: _Fixed, operands: Operands, arrays: grid.Arrays) -> tuple[Array, LogSumExp]:
    static, at_once, known = fixed
    if not static.guarded:
        return _forward(*_cut(static, at_once, operands, known.joined(arrays)))

    def spoilt(operands: Operands, arrays: grid.Arrays) -> Array:
        nobody = lambda: jnp.zeros_like(operands.q[..., 0], bool)  # noqa: E731
        look = partial(walk.spoilt, static, operands, known.joined(arrays))
        return jax.lax.cond(finite.moderate(*operands[:3]), nobody, look)

    def whole_rows(operands: Operands, arrays: grid.Arrays) -> tuple[Array, LogSumExp]:
        context = known.joined(arrays)
        whole = _cut(static, at_once, operands, context)
        sound = partial(_forward, whole[0]._replace(guarded=False), *whole[1:])
        marked = lambda: _marked(*whole, walk.spoilt(static, operands, context))  # noqa: E731
        return jax.lax.cond(finite.moderate(*operands[:3]), sound, marked)

    # Under a plain `vmap` both branches would be computed for every example.
    one_by_one = jax.custom_batching.sequential_vmap
    if at_once:
        return one_by_one(whole_rows)(operands, arrays)
    return _marked(static, operands, known.joined(arrays), one_by_one(spoilt)(operands, arrays))


def _cut(static: Static, at_once: int, operands: Operands, context: Context) -> tuple[Static, Operands, Context]:
    """How the work is cut: so many heads' whole rows at once, or as the tiling says."""
    if at_once:
        static, context = grid.in_one_tile(static, operands, context, at_once)
    return static, operands, context


def _marked(static: Static, operands: Operands, context: Context, spoilt: Array) -> tuple[Array, LogSumExp]:
    """`_forward`, with NaN for these queries, bool [B·N, T]."""
    out, (top, log_total) = _forward(static, operands, context)
    return jnp.where(spoilt[..., None], jnp.nan, out), LogSumExp(top, jnp.where(spoilt, jnp.nan, log_total))


def _attend_and_keep(fixed: _Fixed, operands: Operands, arrays: grid.Arrays) -> tuple:
    static, _, known = fixed
    results: Any = _attend((static, 0, known), operands, arrays)
    return results, (operands, arrays, *results)


def _forward(static: Static, operands: Operands, context: Context) -> tuple[Array, LogSumExp]:
    """[B·N, T, Hv] and log-sum-exp [B·N, T], both wide, bad numbers count as 0."""
    items, rows, columns = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    lowest = jnp.finfo(wide).min

    def one_chunk(index: Array) -> tuple[Array, LogSumExp]:
        chunk = walk.chunk_of(static, operands, index)
        q = walk.of_chunk(static, operands.q, chunk)

        def one_row(row: Array) -> tuple[Array, LogSumExp]:
            asking, rest = walk.scaled(static, walk.cut_tokens(static, q, row, rows, finite.limit(q)))

            def visited(tile: Tile, state: tuple | None) -> tuple:
                k = walk.cut_tokens(static, chunk.k, tile.column, columns, finite.limit(chunk.k))
                v = walk.cut_tokens(static, chunk.v, tile.column, columns)
                raw = precision.einsum("cth,csh->cts", asking, k) * rest
                bias = walk.bias_of(static, operands.bias, tile)
                logits = walk.logits(static, context, tile, raw, bias, operands.constants)
                top = jnp.maximum(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), lowest)  # a shift changes nothing
                if state is not None:
                    top = jnp.maximum(top, state[1])
                weights = jnp.exp(logits - top[..., None])
                total = jnp.sum(weights, axis=-1)
                if static.dropout_rate:
                    weights = jnp.where(walk.kept(static, context, tile), weights * (1 / (1 - static.dropout_rate)), 0)
                out = precision.einsum("cts,csh->cth", precision.narrow(weights, v), v)
                if state is not None:
                    shrink = jnp.exp(state[1] - top)
                    out, total = out + state[0] * shrink[..., None], total + state[2] * shrink
                return out, top, total

            state = None  # of one tile: nothing came before
            if context.order.shape[-1] > 1:
                zeros = jnp.zeros_like(q, wide, (items, rows, operands.v.shape[-1] + 1))
                state = zeros[..., 1:], jnp.full_like(zeros[..., 0], -jnp.inf), zeros[..., 0]
            out, top, total = walk.visit(context, chunk, row, visited, state)
            some = jnp.maximum(total, 0.5)  # a query that sees nothing has a total of 0, any other one of at least 1
            log_total = jnp.where(total == 0, -jnp.inf, jnp.log(some))
            return out / some[..., None], LogSumExp(top, log_total)

        return jax.tree.map(walk.joined, times(one_row, operands.q.shape[1] // rows))  # of [t_tiles, c, rows, …]

    chunks = times(one_chunk, operands.q.shape[0] // items)
    out, log_sums = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks)
    return out, log_sums


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pull(
    fixed: _Fixed, operands: Operands, arrays: grid.Arrays, out: Array, log_sums: LogSumExp, d_out: Array,
    d_log_sums: LogSumExp,
) -> Operands:  # fmt: skip
    """Gradients of all operands, one block of queries after another; keys' and values' are summed up transposed."""
    static, _, known = fixed
    context = known.joined(arrays)
    items, rows, columns = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    # The gradient of a weight's logit is weight · (its own gradient - delta).
    delta = jnp.sum(out * d_out, axis=-1) - d_log_sums.log_total
    top, log_total = log_sums
    # The sum that weights are divided by is divided into these instead, which are not as many.
    share = jnp.exp(-log_total)
    d_out, delta = d_out * share[..., None], delta * share
    if static.guarded or static.score is not None:
        # A query that sees nothing passes no gradient, nor does one that is spoilt, whatever its cotangent.
        dead = ~jnp.isfinite(log_total) if static.guarded else log_total == -jnp.inf
        d_out, delta = jnp.where(dead[..., None], 0, d_out), jnp.where(dead, 0, delta)

    def one_chunk(d_shared: Any, index: Array) -> tuple[Any, tuple]:
        chunk = walk.chunk_of(static, operands, index)
        q, *others = (walk.of_chunk(static, a, chunk) for a in (operands.q, d_out, top, delta))

        def one_row(state: tuple, row: Array) -> tuple[tuple, Array]:
            asking = walk.cut_tokens(static, q, row, rows, finite.limit(q))
            d_asked, top, lost = (walk.cut(a, 1, row, rows) for a in others)
            # A product whose left side is transposed is slow on CPU: turn the thin side, not the weights.
            turned = jax.lax.optimization_barrier(tuple(jnp.swapaxes(a, 1, 2) for a in (asking, d_asked)))
            asking, rest = walk.scaled(static, asking)

            def visited(tile: Tile, state: tuple) -> tuple:
                d_k, d_v, (d_bias, d_constants), d_q = state
                k = walk.cut_tokens(static, chunk.k, tile.column, columns, finite.limit(chunk.k))
                v = walk.cut_tokens(static, chunk.v, tile.column, columns)
                raw = precision.einsum("cth,csh->cts", asking, k) * rest
                bias = walk.bias_of(static, operands.bias, tile)
                logits = partial(walk.logits, static, context, tile)
                d_logits_to_raw = None
                if static.score is None:
                    scores = logits(raw, bias, operands.constants)
                else:
                    scores, d_logits_to_raw = jax.vjp(
                        lambda raw, constants: logits(raw, bias, constants), raw, operands.constants
                    )
                weights = jnp.exp(scores - top[..., None])  # not yet divided by their sum
                d_weights, kept_weights = precision.einsum("cth,csh->cts", d_asked, v), weights
                if tile.masked or bias is not None or static.score is not None:
                    d_weights = jnp.where(weights > 0, d_weights, 0)  # a hidden value may be so large that it is inf
                if static.dropout_rate:
                    factor = jnp.where(walk.kept(static, context, tile), 1 / (1 - static.dropout_rate), 0).astype(wide)
                    kept_weights, d_weights = weights * factor, d_weights * factor
                d_raw = d_logits = weights * (d_weights - lost[..., None])
                if d_logits_to_raw is not None:
                    d_raw, more = d_logits_to_raw(d_logits)
                    d_constants = jax.tree.map(jnp.add, d_constants, more)
                if d_bias is not None:
                    d_bias = walk.add_to_bias(static, d_bias, d_logits, tile)
                d_raw, kept_weights = precision.narrow(d_raw, k), precision.narrow(kept_weights, v)
                d_q = d_q + precision.einsum("cts,csh->cth", d_raw, k)
                d_k = _add(d_k, precision.einsum("cht,cts->chs", turned[0], d_raw), tile.column * columns)
                d_v = _add(d_v, precision.einsum("cht,cts->chs", turned[1], kept_weights), tile.column * columns)
                return d_k, d_v, (d_bias, d_constants), d_q

            d_q = jnp.zeros_like(asking, wide)
            *sums, d_q = walk.visit(context, chunk, row, visited, (*state, d_q))
            return tuple(sums), (d_q * static.scale).astype(operands.q.dtype)

        d_k, d_v = (jnp.zeros_like(a, wide, (items, a.shape[-1], a.shape[1])) for a in (operands.k, operands.v))
        (d_k, d_v, d_shared), d_q = accumulate(one_row, (d_k, d_v, d_shared), operands.q.shape[1] // rows)
        return d_shared, (walk.joined(d_q), d_k, d_v)

    given = operands.bias, operands.constants
    d_shared = devices.over(devices.axes(operands), jax.tree.map(lambda a: jnp.zeros_like(a, wide), given))
    d_shared, (d_q, d_k, d_v) = accumulate(one_chunk, d_shared, operands.q.shape[0] // items)
    group = operands.q.shape[0] // operands.k.shape[0]

    def ungrouped(d: Array, like: Array, factor: float) -> Array:
        """[chunks, c, H, S] to [B·K, S, H], summed over the query heads that share a key head."""
        d = d.reshape(-1, group, *d.shape[2:])
        d = d[:, 0] if group == 1 else jnp.sum(d, axis=1)
        return (jnp.swapaxes(d, 1, 2) * factor).astype(like.dtype)

    d_bias, d_constants = jax.tree.map(lambda d, a: d.astype(a.dtype), d_shared, given)
    d_k, d_v = ungrouped(d_k, operands.k, static.scale), ungrouped(d_v, operands.v, 1.0)
    return Operands(d_q.reshape(operands.q.shape), d_k, d_v, d_bias, d_constants)


def _backward(fixed: _Fixed, saved: tuple, cotangents: tuple) -> tuple[Operands, None]:
    gradients: Any = _pull(fixed, *saved, *cotangents)
    return gradients, None


_attend.defvjp(_attend_and_keep, _backward)


def _pull_and_keep(fixed: _Fixed, operands: Operands, arrays: grid.Arrays, *results: Array) -> tuple:
    gradients: Any = _pull(fixed, operands, arrays, *results)
    return gradients, (operands, arrays, *results[1:])


def _second(fixed: _Fixed, saved: tuple, cotangents: Operands) -> tuple:
    """Derivatives of the gradients: a loop that stops when it is told has none, so it is all logits in one tile."""
    static, _, known = fixed
    operands, arrays, log_sums, d_out, d_log_sums = saved
    whole, context = grid.in_one_tile(static, operands, known.joined(arrays), static.tiling.items)

    def gradients(operands: Operands, d_out: Array, d_log_sums: LogSumExp) -> Operands:
        if static.guarded:  # a query that is spoilt passes no gradient
            spoilt = jnp.isnan(log_sums.log_total)
            d_out = jnp.where(spoilt[..., None], 0, d_out)
            d_log_sums = jax.tree.map(lambda d: jnp.where(spoilt, 0, d), d_log_sums)
        return jax.vjp(lambda operands: _forward(whole, operands, context), operands)[1]((d_out, d_log_sums))[0]

    d_operands, *d_given = jax.vjp(gradients, operands, d_out, d_log_sums)[1](cotangents)
    return d_operands, None, None, None, *d_given


_pull.defvjp(_pull_and_keep, _second)


def _add(total: Array, part: Array, start: Array) -> Array:
    """The sum [c, H, S] with the part of one block of keys added in its place."""
    there = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, there + part, start, axis=2)
