"""The forward pass over tiles, its backward pass, and the derivative of that."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import precision
from mhajax.kernels import finite, varying
from mhajax.kernels.blockwise import layout
from mhajax.kernels.blockwise import tile as tiles
from mhajax.kernels.blockwise.layout import Context, Operands, Static
from mhajax.kernels.blockwise.tile import Tile
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.kernels.loops import accumulate, times

_Fixed = tuple[Static, int, layout.Known]  # how, heads at once for values only, what the context holds besides arrays


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(fixed: _Fixed, operands: Operands, arrays: layout.Arrays) -> tuple[Array, LogSumExp]:
    """The heads' outputs [B·N, T, Hv] and their log-sum-exp [B·N, T], both wide."""
    static, at_once, known = fixed
    if not static.guarded:
        return _forward(*_cut(static, at_once, operands, known.merge(arrays)))

    def reached(operands: Operands, arrays: layout.Arrays) -> Array:
        nobody = lambda: jnp.zeros_like(operands.q[..., 0], bool)  # noqa: E731
        search = partial(tiles.reached, static, operands, known.merge(arrays))
        return jax.lax.cond(finite.all_finite(*operands[:3]), nobody, search)

    def whole_rows(operands: Operands, arrays: layout.Arrays) -> tuple[Array, LogSumExp]:
        context = known.merge(arrays)
        whole = _cut(static, at_once, operands, context)
        unguarded = partial(_forward, whole[0]._replace(guarded=False), *whole[1:])
        marked = lambda: _marked(*whole, tiles.reached(static, operands, context))  # noqa: E731
        return jax.lax.cond(finite.all_finite(*operands[:3]), unguarded, marked)

    # Under a plain `vmap` both branches would be computed for every example.
    one_by_one = jax.custom_batching.sequential_vmap
    if at_once:
        return one_by_one(whole_rows)(operands, arrays)
    return _marked(static, operands, known.merge(arrays), one_by_one(reached)(operands, arrays))


def _cut(static: Static, at_once: int, operands: Operands, context: Context) -> tuple[Static, Operands, Context]:
    """How the work is cut: so many heads' whole rows at once, or as the tiling says."""
    if at_once:
        static, context = layout.in_one_tile(static, operands, context, at_once)
    return static, operands, context


def _marked(static: Static, operands: Operands, context: Context, reached: Array) -> tuple[Array, LogSumExp]:
    """`_forward`, with NaN for these queries, bool [B·N, T]."""
    out, (top, log_total) = _forward(static, operands, context)
    return jnp.where(reached[..., None], jnp.nan, out), LogSumExp(top, jnp.where(reached, jnp.nan, log_total))


def _attend_and_keep(fixed: _Fixed, operands: Operands, arrays: layout.Arrays) -> tuple:
    static, _, known = fixed
    results: Any = attend((static, 0, known), operands, arrays)
    return results, (operands, arrays, *results)


def _forward(static: Static, operands: Operands, context: Context) -> tuple[Array, LogSumExp]:
    """[B·N, T, Hv] and log-sum-exp [B·N, T], both wide; non-finite numbers count as 0."""
    batch_heads, block_q, block_k = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    lowest = jnp.finfo(wide).min

    def one_chunk(index: Array) -> tuple[Array, LogSumExp]:
        chunk = tiles.chunk_of(static, operands, index)
        q = tiles.take_chunk(static, operands.q, chunk)

        def one_block(i: Array) -> tuple[Array, LogSumExp]:
            scaled, rest = tiles.scale_queries(static, tiles.cut_tokens(static, q, i, block_q, finite.limit(q)))

            def body(tile: Tile, state: tuple | None) -> tuple:
                k = tiles.cut_tokens(static, chunk.k, tile.k_block, block_k, finite.limit(chunk.k))
                v = tiles.cut_tokens(static, chunk.v, tile.k_block, block_k)
                raw = precision.einsum("cth,csh->cts", scaled, k) * rest
                bias = tiles.bias_of(static, operands.bias, tile)
                logits = tiles.logits(static, context, tile, raw, bias, operands.constants)
                top = jnp.maximum(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), lowest)  # a shift changes nothing
                if state is not None:
                    top = jnp.maximum(top, state[1])
                weights = jnp.exp(logits - top[..., None])
                total = jnp.sum(weights, axis=-1)
                if static.dropout_rate:
                    weights = jnp.where(tiles.kept(static, context, tile), weights * (1 / (1 - static.dropout_rate)), 0)
                out = precision.einsum("cts,csh->cth", precision.narrow(weights, v), v)
                if state is not None:
                    shrink = jnp.exp(state[1] - top)
                    out, total = out + state[0] * shrink[..., None], total + state[2] * shrink
                return out, top, total

            state = None  # of one tile: nothing came before
            if context.order.shape[-1] > 1:
                zeros = jnp.zeros_like(q, wide, (batch_heads, block_q, operands.v.shape[-1] + 1))
                state = zeros[..., 1:], jnp.full_like(zeros[..., 0], -jnp.inf), zeros[..., 0]
            out, top, total = tiles.loop(context, chunk, i, body, state)
            divisor = jnp.maximum(total, 0.5)  # a fully masked query has a total of 0, any other one of at least 1
            log_total = jnp.where(total == 0, -jnp.inf, jnp.log(divisor))
            return out / divisor[..., None], LogSumExp(top, log_total)

        return jax.tree.map(tiles.merge_blocks, times(one_block, operands.q.shape[1] // block_q))

    chunks = times(one_chunk, operands.q.shape[0] // batch_heads)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(
    fixed: _Fixed, operands: Operands, arrays: layout.Arrays, out: Array, log_sums: LogSumExp, d_out: Array,
    d_log_sums: LogSumExp,
) -> Operands:  # fmt: skip
    """Gradients of all operands, one block of queries after another; keys' and values' are summed up transposed."""
    static, _, known = fixed
    context = known.merge(arrays)
    batch_heads, block_q, block_k = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    # The gradient of a weight's logit is weight · (its own gradient - delta).
    delta = jnp.sum(out * d_out, axis=-1) - d_log_sums.log_total
    top, log_total = log_sums
    # The sum that weights are divided by is divided into these instead, which are not as many.
    share = jnp.exp(-log_total)
    d_out, delta = d_out * share[..., None], delta * share
    if static.guarded or static.score is not None:
        # A fully masked query passes no gradient, nor does one that sees something non-finite, whatever its cotangent.
        dead = ~jnp.isfinite(log_total) if static.guarded else log_total == -jnp.inf
        d_out, delta = jnp.where(dead[..., None], 0, d_out), jnp.where(dead, 0, delta)

    def one_chunk(d_shared: Any, index: Array) -> tuple[Any, tuple]:
        chunk = tiles.chunk_of(static, operands, index)
        q, *others = (tiles.take_chunk(static, a, chunk) for a in (operands.q, d_out, top, delta))

        def one_block(state: tuple, i: Array) -> tuple[tuple, Array]:
            of_queries = tiles.cut_tokens(static, q, i, block_q, finite.limit(q))
            d_heads, top, delta = (tiles.cut(a, 1, i, block_q) for a in others)
            # A product whose left side is transposed is slow on CPU: transpose the thin side, not the weights.
            transposed = jax.lax.optimization_barrier(tuple(jnp.swapaxes(a, 1, 2) for a in (of_queries, d_heads)))
            scaled, rest = tiles.scale_queries(static, of_queries)

            def body(tile: Tile, state: tuple) -> tuple:
                d_k, d_v, (d_bias, d_constants), d_q = state
                k = tiles.cut_tokens(static, chunk.k, tile.k_block, block_k, finite.limit(chunk.k))
                v = tiles.cut_tokens(static, chunk.v, tile.k_block, block_k)
                raw = precision.einsum("cth,csh->cts", scaled, k) * rest
                bias = tiles.bias_of(static, operands.bias, tile)
                logits = partial(tiles.logits, static, context, tile)
                d_logits_to_raw = None
                if static.score is None:
                    scores = logits(raw, bias, operands.constants)
                else:
                    scores, d_logits_to_raw = jax.vjp(
                        lambda raw, constants: logits(raw, bias, constants), raw, operands.constants
                    )
                weights = jnp.exp(scores - top[..., None])  # not yet divided by their sum
                d_weights, kept_weights = precision.einsum("cth,csh->cts", d_heads, v), weights
                if tile.masked or bias is not None or static.score is not None:
                    d_weights = jnp.where(weights > 0, d_weights, 0)  # a hidden value may be so large that it is inf
                if static.dropout_rate:
                    factor = jnp.where(tiles.kept(static, context, tile), 1 / (1 - static.dropout_rate), 0).astype(wide)
                    kept_weights, d_weights = weights * factor, d_weights * factor
                d_raw = d_logits = weights * (d_weights - delta[..., None])
                if d_logits_to_raw is not None:
                    d_raw, d_here = d_logits_to_raw(d_logits)
                    d_constants = jax.tree.map(jnp.add, d_constants, d_here)
                if d_bias is not None:
                    d_bias = tiles.add_to_bias(static, d_bias, d_logits, tile)
                d_raw, kept_weights = precision.narrow(d_raw, k), precision.narrow(kept_weights, v)
                d_q = d_q + precision.einsum("cts,csh->cth", d_raw, k)
                d_k = _add(d_k, precision.einsum("cht,cts->chs", transposed[0], d_raw), tile.k_block * block_k)
                d_v = _add(d_v, precision.einsum("cht,cts->chs", transposed[1], kept_weights), tile.k_block * block_k)
                return d_k, d_v, (d_bias, d_constants), d_q

            d_q = jnp.zeros_like(scaled, wide)
            *sums, d_q = tiles.loop(context, chunk, i, body, (*state, d_q))
            return tuple(sums), (d_q * static.scale).astype(operands.q.dtype)

        d_k, d_v = (jnp.zeros_like(a, wide, (batch_heads, a.shape[-1], a.shape[1])) for a in (operands.k, operands.v))
        (d_k, d_v, d_shared), d_q = accumulate(one_block, (d_k, d_v, d_shared), operands.q.shape[1] // block_q)
        return d_shared, (tiles.merge_blocks(d_q), d_k, d_v)

    shared = operands.bias, operands.constants
    d_shared = varying.over(varying.axes(operands), jax.tree.map(lambda a: jnp.zeros_like(a, wide), shared))
    d_shared, (d_q, d_k, d_v) = accumulate(one_chunk, d_shared, operands.q.shape[0] // batch_heads)
    group = operands.q.shape[0] // operands.k.shape[0]

    def ungrouped(d: Array, like: Array, factor: float) -> Array:
        """[chunks, c, H, S] to [B·K, S, H], summed over the query heads that share a key head."""
        d = d.reshape(-1, group, *d.shape[2:])
        d = d[:, 0] if group == 1 else jnp.sum(d, axis=1)
        return (jnp.swapaxes(d, 1, 2) * factor).astype(like.dtype)

    d_bias, d_constants = jax.tree.map(lambda d, a: d.astype(a.dtype), d_shared, shared)
    d_k, d_v = ungrouped(d_k, operands.k, static.scale), ungrouped(d_v, operands.v, 1.0)
    return Operands(d_q.reshape(operands.q.shape), d_k, d_v, d_bias, d_constants)


def _gradients(fixed: _Fixed, saved: tuple, cotangents: tuple) -> tuple[Operands, None]:
    gradients: Any = _backward(fixed, *saved, *cotangents)
    return gradients, None


attend.defvjp(_attend_and_keep, _gradients)


def _backward_and_keep(fixed: _Fixed, operands: Operands, arrays: layout.Arrays, *results: Array) -> tuple:
    gradients: Any = _backward(fixed, operands, arrays, *results)
    return gradients, (operands, arrays, *results[1:])


def _second(fixed: _Fixed, saved: tuple, cotangents: Operands) -> tuple:
    """Derivatives of the gradients: a loop that stops when it is told has none, so it is all logits in one tile."""
    static, _, known = fixed
    operands, arrays, log_sums, d_out, d_log_sums = saved
    whole, context = layout.in_one_tile(static, operands, known.merge(arrays), static.tiling.batch_heads)

    def gradients(operands: Operands, d_out: Array, d_log_sums: LogSumExp) -> Operands:
        if static.guarded:  # a query that sees something non-finite passes no gradient
            reached = jnp.isnan(log_sums.log_total)
            d_out = jnp.where(reached[..., None], 0, d_out)
            d_log_sums = jax.tree.map(lambda d: jnp.where(reached, 0, d), d_log_sums)
        return jax.vjp(lambda operands: _forward(whole, operands, context), operands)[1]((d_out, d_log_sums))[0]

    d_operands, *d_cotangents = jax.vjp(gradients, operands, d_out, d_log_sums)[1](cotangents)
    return d_operands, None, None, None, *d_cotangents


_backward.defvjp(_backward_and_keep, _second)


def _add(total: Array, part: Array, start: Array) -> Array:
    """The sum [c, H, S] with the part of one block of keys added in its place."""
    before = jax.lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, before + part, start, axis=2)
