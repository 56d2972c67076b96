"""Attention of short sequences: every query with all its keys at once, in products that the compiler fuses.

XLA's library for CPUs takes a product, the softmax and the product after it as one loop over heads and queries, which
never writes the logits down and uses all cores, if there is nothing in between that it does not know: it knows minimum,
maximum, exponential, sums, products and broadcasts, but no choice between two values. So a mask is a bound of +inf or
-inf here, and there is no `where`. The backward pass writes the weights down, of a few heads at a time; for very few
keys the forward pass does, since they are not larger than the queries then.

References:
  Dao et al. 2022, "FlashAttention", section 3.1, for the backward pass that computes the weights again; rows are whole
  here, so that nothing of the softmax has to be kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from mhajax.kernels import bands, finite
from mhajax.kernels.bands import Bands
from mhajax.kernels.dense import full_rank
from mhajax.kernels.fused_products import flat, gradients, gradients_of_kept, outputs, outputs_and_weights
from mhajax.masks import Mask, Tokens

MOST_KEYS = 384  # that a query is compared with under a mask; more are faster in tiles
MOST_KEYS_OF_VALUES = 512  # without a mask; where a gradient is taken, tiles are faster
MANY_ROWS = 8192  # queries of all heads, from which on more than TASK keys are worth it
MOST_PAIRS = 2**20  # logits of one head; the backward pass holds them
_FEW_KEYS, _WIDE = 64, 32  # of more keys, or narrower heads, the weights are computed again


def attend(
    q: Array, k: Array, v: Array, *, mask: Mask | None = None, queries: Tokens, keys: Tokens, scale: float
) -> Array:
    """The heads' outputs [..., N, T, Hv] in the dtype of v; the contract is that of `kernels.attend`.

    Forward-mode derivatives are not defined for this path: `jax.jvp`, `jax.jacfwd`, `jax.hessian` need the dense one.

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      mask, queries, keys, scale: as in `kernels.attend`.
    """
    *leading, num_heads, length, _ = q.shape
    if 0 in leading:  # no examples
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)
    bound = None
    if mask is not None:
        allowed = full_rank("mask", mask.block(queries, keys), (*leading, num_heads, length, k.shape[-2]))
        bound = _lay_out_bound(allowed, q.shape, k.shape[-3])
    batch, num_kv_heads = math.prod(leading), k.shape[-3]
    lay_out = lambda a: a.reshape(batch, num_kv_heads, a.shape[-3] // num_kv_heads * a.shape[-2], a.shape[-1])  # noqa: E731
    cut = bands.cut(mask, queries, keys, batch * num_kv_heads, num_heads // num_kv_heads)
    heads: Any = _attend(scale, cut, lay_out(q), lay_out(k), lay_out(v), bound)
    return heads.reshape(*leading, num_heads, length, v.shape[-1]).astype(v.dtype)


def _lay_out_bound(allowed: Array, shape: tuple[int, ...], num_kv_heads: int) -> Array:
    """[..., 1 or N, 1 or T, 1 or S] to [B or 1, K or 1, G·T, S]: +inf where a pair may attend, -inf where not."""
    *leading, num_heads, length, _ = shape
    *have, heads, _, num_keys = allowed.shape
    group = num_heads // num_kv_heads
    if math.prod(have) != 1:  # only some of the leading axes may be shared
        have = leading
    allowed = jnp.broadcast_to(allowed, (*have, heads, length, num_keys))
    split = (1, 1) if heads == 1 else (num_kv_heads, group)
    allowed = allowed.reshape(-1, *split, length, num_keys)
    allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], group, length, num_keys))
    return jnp.where(allowed, jnp.inf, -jnp.inf).reshape(*allowed.shape[:2], group * length, num_keys)


class Harm(NamedTuple):
    """What is not finite, where there is a mask."""

    anything: Array  # bool [B, K], the same everywhere
    queries: Array  # bool [B, K, T], those that see some of it


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None) -> Array:
    """Outputs [B, K, T, Hv] of q [B, K, T, H], k [B, K, S, H] and v [B, K, S, Hv]; T counts all heads of a group."""
    return _folded(partial(_heads, scale, cut))(q, k, v, bound)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_and_keep(scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None) -> tuple:
    """The outputs, and what the backward pass needs: `Harm`, and the weights of few keys.

    It is what `_attend` does where a gradient is taken, and has one itself for the sake of second derivatives.
    """
    return _folded(partial(_heads, scale, cut, keep=_keeps(k)))(q, k, v, bound)


def _keeps(k: Array) -> bool:
    """Whether the backward pass gets the weights: they are not larger than the queries, and that is faster."""
    *_, num_keys, width = k.shape
    return width >= _WIDE and num_keys <= min(_FEW_KEYS, width)


def _forward(scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None) -> tuple[Array, tuple]:
    kept, saved = _keeping_forward(scale, cut, q, k, v, bound)
    return kept[0], saved


def _keeping_forward(scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None) -> tuple:
    kept: Any = _attend_and_keep(scale, cut, q, k, v, bound)
    return kept, (q, k, v, *kept[1:], bound)


def _backward(scale: float, cut: Bands, saved: tuple, d_heads: Array) -> tuple:
    q, k, v, harm, weights, bound = saved
    return *_pull(scale, cut, q, k, v, d_heads, harm, weights, bound), None


_attend.defvjp(_forward, _backward)
_attend_and_keep.defvjp(
    _keeping_forward, lambda scale, cut, saved, cotangents: _backward(scale, cut, saved, cotangents[0])
)


# Second derivatives: a function under `custom_vmap` has none of its own, so these are those of `_gradients` without it.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pull(scale: float, cut: Bands, *arguments: Any) -> tuple[Array, Array, Array]:
    return _folded(partial(_gradients, scale, cut))(*arguments)


def _pull_forward(scale: float, cut: Bands, *arguments: Any) -> tuple[tuple, tuple]:
    return _pull(scale, cut, *arguments), arguments


def _pull_backward(scale: float, cut: Bands, arguments: tuple, cotangents: tuple) -> tuple:
    q, k, v, d_heads, harm, _, bound = arguments  # of the weights too, so they are computed again
    _, pull = jax.vjp(lambda q, k, v, d: _gradients(scale, cut, q, k, v, d, harm, None, bound), q, k, v, d_heads)
    return *pull(cotangents), None, None, None


_pull.defvjp(_pull_forward, _pull_backward)


def _folded(function: Callable) -> Callable:
    """A function of trees of arrays [B, K, …], and then a bound [B or 1, K or 1, …] or None; `vmap` makes B longer.

    Under a plain `vmap` a branch that is hardly ever taken would be computed always, and the products would have
    another axis.
    """

    @custom_vmap
    def folded(*arguments):
        return function(*arguments)

    @folded.def_vmap
    def rule(size, batched, *arguments):
        *arrays, bound = arguments
        batch = arrays[0].shape[1 if batched[0] else 0]

        def fold(a: Array, is_batched: bool, length: int) -> Array:
            a = a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            return jnp.broadcast_to(a, (size, length, *a.shape[2:])).reshape(size * length, *a.shape[2:])

        arrays = jax.tree.map(lambda a, b: fold(a, b, batch), arrays, list(batched[:-1]))
        if bound is not None and (batched[-1] or bound.shape[0] > 1):
            bound = fold(bound, batched[-1], batch)
        out = folded(*arrays, bound)
        unfold = lambda a: a.reshape(size, batch, *a.shape[1:])  # noqa: E731
        return jax.tree.map(unfold, out), jax.tree.map(lambda _: True, out)

    return folded


def _heads(
    scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None, keep: bool = False
) -> tuple[Array, Harm | None, Array | None]:
    """Outputs [B, K, T, Hv], NaN for queries that are harmed; what harms; the weights [B, K, T, S] if they are kept."""
    shape = (*q.shape[:-1], v.shape[-1])
    arrays = flat(q), flat(k), flat(v)
    products: Any = partial(outputs_and_weights, scale) if keep else partial(outputs, scale, cut, q.shape[1])
    unflat = lambda a: None if a is None else a.reshape(*shape[:2], *a.shape[1:])  # noqa: E731
    if bound is None:  # everybody sees everything
        heads, weights = products(*arrays, None)
        return heads.reshape(shape), None, unflat(weights)
    sums = [jnp.sum(a, axis=-1) for a in arrays]  # they may overflow, then it is looked at twice
    sound = jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in sums]))

    def looked_at() -> tuple[Array, Array | None, Array]:
        bad_q, bad_k, bad_v = (finite.healed(a)[1] for a in arrays)
        of_queries, of_keys = (a.reshape(*shape[:2], -1) for a in (bad_q, bad_k | bad_v))

        def reached(given: Any) -> Array:
            example, queries, keys = given
            seen = bound[example if bound.shape[0] > 1 else 0] > 0
            return jnp.any((queries[..., None] | keys[..., None, :]) & seen, axis=-1)

        # The pairs of one example at a time.
        harmed = jax.lax.map(reached, (jnp.arange(shape[0]), of_queries, of_keys))
        # Else the same program as below, so that no bit is another.
        heads, weights = products(*arrays, bound, sound=False)
        return jnp.where(flat(harmed)[..., None], jnp.nan, heads), weights, harmed

    nobody = jnp.broadcast_to(~sound, shape[:-1])  # not zeros: it varies over devices as the rest does
    heads, weights, harmed = jax.lax.cond(sound, lambda: (*products(*arrays, bound), nobody), looked_at)
    return heads.reshape(shape), Harm(jnp.broadcast_to(~sound, shape[:2]), harmed), unflat(weights)


def _gradients(
    scale: float, cut: Bands, q: Array, k: Array, v: Array, d_heads: Array, harm: Harm | None,
    weights: Array | None, bound: Array | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Those of q, k and v; from the weights, if they were kept. A query that is harmed passes none."""
    queries = None if harm is None else harm.queries
    if weights is None:
        return gradients(scale, cut, q, k, v, d_heads, queries, bound)
    if harm is None:
        return gradients_of_kept(scale, weights, q, k, v, d_heads, None, masked=False)
    of_kept = partial(gradients_of_kept, scale, weights, q, k, v, d_heads, masked=True)
    return jax.lax.cond(jnp.any(harm.anything), lambda: of_kept(queries), lambda: of_kept(None))
