"""Attention in tiles: a few hundred queries by a few hundred keys at a time, so that memory grows with T, not T².

The grid of queries × keys is cut into tiles. For each block of queries a loop runs over the tiles that the mask does
not rule out, first over those in which every pair is allowed (no mask is evaluated there), then over the others, and
keeps a running maximum, sum and output. The backward pass computes the weights again from the saved maximum and sum.

How the loops are laid out (how many heads at a time, how large a tile) is a `Tiling`, which `plan` picks; the loops are
those of `passes`, over what `layout` and `tile` make. Where no gradient is taken, whole rows of many heads may be one
tile: XLA's library for CPUs takes both products and the softmax between them as one loop, which writes no logits down,
if all that is between is maximum, exponential, sums and products. A choice between two values breaks that loop: so a
mask adds 0 or -inf, and a fully masked query is no special case.

References:
  Rabe & Staats 2021, "Self-attention Does Not Need O(n²) Memory"; Dao 2023, "FlashAttention-2", sections 2.3 and 3.1
  (their L is our log-sum-exp, their D our delta); lists of full and partial tiles: Dong et al. 2024, "Flex Attention",
  section 4.1 (their BlockMask).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import masks
from mhajax.kernels.blockwise import layout, passes
from mhajax.kernels.contract import CACHED, FEW, Inputs, Plan, Request, Tiling
from mhajax.kernels.log_sum_exp import LogSumExp


def refusal(request: Request) -> str:
    """It copies keys and values to whole tiles."""
    return CACHED if request.cached else ""


def reluctance(request: Request) -> str:
    """It is for what the dense path would hold."""
    return FEW if request.few else ""


def plan(request: Request) -> Plan:
    """The tiles, and what a mask that is known leaves of them."""
    why = "memory grows with T" + ", and the logits stay in the cache" * (request.platform == "cpu")
    tiling = _tiling(request)
    nonempty, _ = masks.known_tiles(request.mask, request.queries, request.keys, tiling.block_q, tiling.block_k)
    return Plan(why, tiling, _values_at_once(request), float(np.mean(nonempty)))


def attend(inputs: Inputs) -> tuple[Array, LogSumExp]:
    """The heads' outputs [..., N, T, Hv] in the dtype of v, and the log-sum-exp of every query, float32 [..., N, T].

    Forward-mode derivatives are not defined for this path: `jax.jvp`, `jax.jacfwd`, `jax.hessian` need the dense one.
    Gradients of gradients hold every logit, as the dense path does. The tiling changes no result beyond rounding.
    """
    q, v = inputs.q, inputs.v
    *leading, num_heads, length, _ = q.shape
    if 0 in leading:  # no examples, no tiles
        nothing = jnp.zeros(q.shape[:-1], jnp.promote_types(q.dtype, jnp.float32))
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype), LogSumExp(nothing, nothing - jnp.inf)
    static, operands, context = layout.lay_out(inputs)
    known, arrays = layout.split(context)
    results: Any = passes.attend((static, inputs.values_at_once, known), operands, arrays)
    heads, log_sums = results
    shape = (*leading, num_heads)
    heads = heads[:, :length].astype(v.dtype).reshape(*shape, length, v.shape[-1])
    return heads, jax.tree.map(lambda a: a[:, :length].reshape(*shape, length), log_sums)


def _tiling(request: Request) -> Tiling:
    length, num_keys = request.q.shape[-2], request.k.shape[-2]
    if request.platform == "cpu":  # logits stay in the cache; 16 heads are enough, or an eighth of the logits
        most, logits = request.rules.masked_tile_tokens, request.rules.tile_logits
        most = request.rules.tile_tokens if request.mask is None else most
        block_q, block_k = _even(length, most), _even(num_keys, most)
        room = max(1, min(logits // (block_q * block_k), max(16, logits // 8 // (block_q * block_k))))
    else:  # fill the machine: all heads at once, as far as their logits stay below 256 MiB
        block_q, block_k = _even(length, 512), _even(num_keys, 512)
        room = max(1, 2**26 // (block_q * block_k))
    return Tiling(_fit(request.batch_heads, room, request.q.shape[-3] // request.k.shape[-3]), block_q, block_k)


def _fit(batch_heads: int, most: int, group: int) -> int:
    """The largest number up to `most` that divides the batch-heads, and the group or is a multiple of it."""
    fits = lambda n: batch_heads % n == 0 and (group % n == 0 or n % group == 0)  # noqa: E731
    return max(filter(fits, range(1, min(batch_heads, most) + 1)), default=1)


def _values_at_once(request: Request) -> int:
    """All heads, if rows are short enough for the compiler to take both products and the softmax as one loop."""
    plain = not (request.bias or request.score or request.dropout or request.log_sum_exp)
    fuses = request.platform == "cpu" and not request.spread
    return request.batch_heads if plain and fuses and request.k.shape[-2] <= request.rules.keys_at_once else 0


def _even(size: int, most: int) -> int:
    """Size of the fewest equal parts of at most so many tokens."""
    return -(-size // -(-size // most))
