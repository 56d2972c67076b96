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
from mhajax.kernels import finite, grid
from mhajax.kernels.grid import Context, Operands, Static, Tile

LARGEST = 40.0  # logit; a weight of exp(-40) times a value is lost in float32 only if the value is below 1e-20


def suits(static: Static, operands: Operands, longest: Array) -> Array:
    """Whether no logit can be large, what is not finite aside: bool []. The lengths are those of `grid.longest`."""

    def without() -> Array:
        q, k, v = (finite.healed(a)[0] for a in (operands.q, operands.k, operands.v))
        return grid.longest(operands._replace(q=q, k=k, v=v))

    q, k, v = jax.lax.cond(jnp.all(jnp.isfinite(longest)), lambda: longest, without)
    largest = q * k * abs(static.scale)  # Cauchy-Schwarz
    of_sums = largest + jnp.log(jnp.maximum(v, 1)) + math.log(max(1, static.num_keys))
    return (largest < LARGEST) & (of_sums < 2 * LARGEST)


def forward(static: Static, operands: Operands, context: Context) -> tuple[Array, Array]:
    """[B·N, T, Hv] and log-sum-exp [B·N, T], both wide, as `blockwise` has them; for logits that are small."""
    items, rows, columns = static.tiling
    wide = jnp.promote_types(operands.q.dtype, jnp.float32)
    # One more column, in which the sums of the weights ride along.
    values = jnp.pad(operands.v, ((0, 0), (0, 0), (0, 1)))
    of_sums = jnp.zeros(values.shape[-1], wide).at[-1].set(1)

    def one_chunk(index: Array) -> tuple[Array, Array]:
        chunk = grid.chunk_of(static, operands._replace(v=values), index)
        q = grid.of_chunk(static, operands.q, chunk)

        def one_row(row: Array) -> tuple[Array, Array]:
            asking, rest = grid.scaled(static, grid.cut_tokens(static, q, row, rows))

            def visited(tile: Tile, state: Array) -> Array:
                k, v = jax.lax.optimization_barrier(
                    tuple(grid.cut_tokens(static, a, tile.column, columns) for a in (chunk.k, chunk.v))
                )
                raw = precision.einsum("cth,csh->cts", asking, k) * rest
                weights = jnp.exp(grid.logits(static, context, tile, raw, None, ()))
                # The sum must be a reduction, not a product with ones: only that makes it one loop.
                return (
                    state
                    + precision.einsum("cts,csh->cth", weights, v)
                    + jnp.sum(weights, axis=-1, keepdims=True) * of_sums
                )

            state = grid.visit(context, chunk, row, visited, jnp.zeros((items, rows, values.shape[-1]), wide))
            out, total = state[..., :-1], state[..., -1]
            nothing = total == 0
            log_sum = jnp.where(nothing, -jnp.inf, jnp.log(jnp.where(nothing, 1, total)))
            return out / jnp.where(nothing, 1, total)[..., None], log_sum

        out, log_sum = grid.times(one_row, operands.q.shape[1] // rows)
        return grid.joined(out), grid.joined(log_sum)

    chunks = grid.times(one_chunk, operands.q.shape[0] // items)
    out, log_sums = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks)
    return out, log_sums
