"""Attention in tiles without a running maximum, for logits that are known to be small.

The softmax subtracts the largest logit so that no exponential overflows. Where no logit can be large, that is not
needed: the exponentials are what they are, and tiles are simply added up. On a CPU that is faster: XLA's library
computes such a tile in one loop, from the first product to the second, and writes no logits down (see `fused`); and
tiles may be small, so that less is computed of what a mask hides.

References:
  Hong et al. 2024, "FlashDecoding++", section 3 (a unified maximum instead of every row's own; ours is 0, and it is
  known before whether that will do).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import precision
from mhajax.kernels import finite, walk
from mhajax.kernels.finite import Lengths
from mhajax.kernels.grid import Context, Operands, Static
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.kernels.loops import times
from mhajax.kernels.walk import Tile

LARGEST = 60.0  # logit
_EXPONENT = 75.0  # of a sum of weights times values, in nats; float32 has 87 on either side


def suits(static: Static, operands: Operands, lengths: Lengths) -> Array:
    """Whether no logit of any head can be large, what is not finite aside: bool []."""
    without = lambda: finite.lengths_of(*(finite.healed(a)[0] for a in operands[:3]))  # noqa: E731
    q, k, v = jax.lax.cond(lengths.finite, lambda: lengths, without)
    largest = jnp.max(q.reshape(k.size, -1), axis=-1) * k * abs(static.scale)  # Cauchy-Schwarz
    of_sums = largest + jnp.abs(jnp.log(v)) + math.log(max(1, static.num_keys))
    return jnp.all((largest < LARGEST) & (of_sums < _EXPONENT))


def forward(static: Static, operands: Operands, context: Context) -> tuple[Array, LogSumExp]:
    """[B·N, T, Hv] and log-sum-exp [B·N, T], both wide, as `blockwise` has them; for logits that are small."""
    items, rows, columns = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    # One more column, in which the sums of the weights ride along.
    values = jnp.pad(operands.v, ((0, 0), (0, 0), (0, 1)))
    of_sums = jnp.zeros(values.shape[-1], wide).at[-1].set(1)

    def one_chunk(index: Array) -> tuple[Array, LogSumExp]:
        chunk = walk.chunk_of(static, operands._replace(v=values), index)
        q = walk.of_chunk(static, operands.q, chunk)

        def one_row(row: Array) -> tuple[Array, LogSumExp]:
            asking, rest = walk.scaled(static, walk.cut_tokens(static, q, row, rows))

            def visited(tile: Tile, state: Array) -> Array:
                k, v = jax.lax.optimization_barrier(
                    tuple(walk.cut_tokens(static, a, tile.column, columns) for a in (chunk.k, chunk.v))
                )
                raw = precision.einsum("cth,csh->cts", asking, k) * rest
                weights = jnp.exp(walk.logits(static, context, tile, raw, None, ()))
                # The sum must be a reduction, not a product with ones: only that makes it one loop.
                return (
                    state
                    + precision.einsum("cts,csh->cth", weights, v)
                    + jnp.sum(weights, axis=-1, keepdims=True) * of_sums
                )

            state = jnp.zeros_like(asking, wide, (items, rows, values.shape[-1]))
            state = walk.visit(context, chunk, row, visited, state)
            out, total = state[..., :-1], state[..., -1]
            nothing = total == 0
            total = jnp.where(nothing, 1, total)
            # As no logit is large, the whole may stand for the largest; weights that are computed again are then ≤ 1.
            log_sum = LogSumExp(jnp.log(total), jnp.where(nothing, -jnp.inf, jnp.zeros_like(total)))
            return out / total[..., None], log_sum

        return jax.tree.map(walk.joined, times(one_row, operands.q.shape[1] // rows))

    chunks = times(one_chunk, operands.q.shape[0] // items)
    out, log_sums = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks)
    return out, log_sums
