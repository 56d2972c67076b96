"""Attention of short sequences: every query with all its keys at once, in products that the compiler fuses.

XLA's library for CPUs takes a product, the softmax and the product after it as one loop over heads and queries, which
never writes the logits down and uses all cores, if there is nothing in between that it does not know: it knows minimum,
maximum, exponential, sums, products and broadcasts, but no choice between two values. So a mask is a bound of +inf or
-inf here, and there is no `where`. The backward pass writes the weights down, of a few heads at a time.

References:
  Dao et al. 2022, "FlashAttention", section 3.1, for the backward pass that computes the weights again; rows are whole
  here, so that nothing of the softmax has to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from mhajax import precision
from mhajax.kernels import finite
from mhajax.kernels.dense import full_rank
from mhajax.kernels.grid import fitting
from mhajax.masks import Mask, Tokens

MOST_KEYS = 256  # of more keys the library writes the logits of all heads down
MOST_PAIRS = 2**20  # logits of one head; the backward pass holds them
_ROWS = 2048  # queries at a time in the backward pass, of one head or of several
_PAIRS = 2**19  # logits that it takes all at once


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
    outputs: Any = _attend(scale, lay_out(q), lay_out(k), lay_out(v), bound)
    return outputs[0].reshape(*leading, num_heads, length, v.shape[-1]).astype(v.dtype)


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q: Array, k: Array, v: Array, bound: Array | None) -> tuple[Array, Array | None]:
    """`_heads` from q [B, K, T, H], k [B, K, S, H] and v [B, K, S, Hv]; T counts all heads of a group."""
    return _folded(partial(_heads, scale))(q, k, v, bound)


def _forward(scale: float, q: Array, k: Array, v: Array, bound: Array | None) -> tuple[tuple, tuple]:
    outputs: Any = _attend(scale, q, k, v, bound)
    return outputs, (q, k, v, outputs[1], bound)


def _backward(scale: float, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, spoilt, bound = saved
    return *_pull(scale, q, k, v, cotangents[0], spoilt, bound), None


_attend.defvjp(_forward, _backward)


# Second derivatives: a function under `custom_vmap` has none of its own, so these are those of `_gradients` without it.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pull(scale: float, *arguments: Any) -> tuple[Array, Array, Array]:
    return _folded(partial(_gradients, scale))(*arguments)


def _pull_forward(scale: float, *arguments: Any) -> tuple[tuple, tuple]:
    return _pull(scale, *arguments), arguments


def _pull_backward(scale: float, arguments: tuple, cotangents: tuple) -> tuple:
    q, k, v, d_heads, spoilt, bound = arguments
    _, pull = jax.vjp(lambda q, k, v, d: _gradients(scale, q, k, v, d, spoilt, bound), q, k, v, d_heads)
    return *pull(cotangents), None, None


_pull.defvjp(_pull_forward, _pull_backward)


def _folded(function: Callable) -> Callable:
    """A function of arrays [B, K, …] or None and then a bound [B or 1, K or 1, …] or None; `vmap` makes B longer.

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

        arrays = [a if a is None else fold(a, b, batch) for a, b in zip(arrays, batched, strict=False)]
        if bound is not None and (batched[-1] or bound.shape[0] > 1):
            bound = fold(bound, batched[-1], batch)
        out = folded(*arrays, bound)
        unfold = lambda a: a.reshape(size, batch, *a.shape[1:])  # noqa: E731
        return jax.tree.map(unfold, out), jax.tree.map(lambda _: True, out)

    return folded


def _heads(scale: float, q: Array, k: Array, v: Array, bound: Array | None) -> tuple[Array, Array | None]:
    """Outputs [B, K, T, Hv], NaN for queries that see something that is not finite; which these are, [B, K, T]."""
    shape = (*q.shape[:-1], v.shape[-1])
    arrays = _flat(q), _flat(k), _flat(v)
    if bound is None:  # everybody sees everything
        return _products(scale, *arrays, None).reshape(shape), None
    sums = [jnp.sum(a, axis=-1) for a in arrays]  # they may overflow, then it is looked at twice
    sound = jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in sums]))

    def looked_at() -> tuple[Array, Array]:
        (q, bad_q), (k, bad_k), (v, bad_v) = map(finite.healed, arrays)
        of_queries, of_keys = (a.reshape(*shape[:2], -1) for a in (bad_q, bad_k | bad_v))

        def reached(given: Any) -> Array:
            example, queries, keys = given
            seen = bound[example if bound.shape[0] > 1 else 0] > 0
            return jnp.any((queries[..., None] | keys[..., None, :]) & seen, axis=-1)

        # The pairs of one example at a time.
        spoilt = jax.lax.map(reached, (jnp.arange(shape[0]), of_queries, of_keys))
        heads = _products(scale, q, k, v, bound)  # by the same program as below, so that no bit is another
        return jnp.where(_flat(spoilt)[..., None], jnp.nan, heads), _flat(spoilt)

    nobody = jnp.broadcast_to(~sound, arrays[0].shape[:-1])  # not zeros: it varies over devices as the rest does
    heads, spoilt = jax.lax.cond(sound, lambda: (_products(scale, *arrays, bound), nobody), looked_at)
    return heads.reshape(shape), spoilt.reshape(shape[:-1])


def _flat(a: Array) -> Array:
    """[B, K, …] to [B·K, …]. Forward and backward pass do it alike, or the compiler lays out an array for each."""
    return a.reshape(-1, *a.shape[2:])


def _products(scale: float, q: Array, k: Array, v: Array, bound: Array | None) -> Array:
    weights, totals = _weights(scale, q, k, bound)
    return precision.einsum("cts,csh->cth", precision.narrow(weights, v), v) / totals[..., None]


def _weights(scale: float, q: Array, k: Array, bound: Array | None) -> tuple[Array, Array]:
    """Weights [c, T, S] that are not yet divided by their sums, and the sums [c, T]; 1 where nothing is visible.

    The bound is that of all heads, [B or 1, K or 1, T, S], or of some, [c or 1, T, S].
    """
    logits = precision.einsum("cth,csh->cts", q, k) * scale
    if bound is not None:
        split = (bound.shape[0], -1) if bound.shape[0] > 1 else (-1, bound.shape[1])
        logits = logits.reshape(*(split if bound.ndim == 4 else (-1,)), *logits.shape[1:])
        logits = jnp.minimum(logits, bound.astype(logits.dtype)).reshape(-1, *logits.shape[-2:])
    lowest = jnp.finfo(logits.dtype).min  # of a query that sees nothing: -inf less -inf would be NaN
    top = jax.lax.reduce(logits, logits.dtype.type(lowest), jax.lax.max, (logits.ndim - 1,))
    weights = jnp.exp(logits - top[..., None])
    return weights, jnp.maximum(jnp.sum(weights, axis=-1), 1)  # the largest weight is 1 if there is one


def _gradients(
    scale: float, q: Array, k: Array, v: Array, d_heads: Array, spoilt: Array | None, bound: Array | None
) -> tuple[Array, Array, Array]:
    """Those of q, k and v; a few heads at a time. A query that is spoilt passes none."""
    batch, num_heads, length, _ = q.shape
    items = batch * num_heads
    some = items if items * length * k.shape[-2] <= _PAIRS else fitting(items, max(1, _ROWS // length))

    chunk = lambda a, i: jax.lax.dynamic_slice_in_dim(a, i * some, some)  # noqa: E731
    put = lambda a, i, d: jax.lax.dynamic_update_slice_in_dim(a, d.astype(a.dtype), i * some, 0)  # noqa: E731
    flat_q, flat_k, flat_v, flat_d = map(_flat, (q, k, v, d_heads))
    # The gradient of the values is known after the keys are read, and that of the keys after the values: so each takes
    # the place of the other, chunk by chunk, and nothing is copied.
    in_place = k.shape == v.shape and k.dtype == v.dtype

    def one_chunk(i: Array, state: Any) -> Any:
        d_q, d_k, d_v = state
        keys, values = (d_v, d_k) if in_place else (flat_k, flat_v)
        asking, keys, values, d_out = (chunk(a, i) for a in (flat_q, keys, values, flat_d))
        of_chunk = None
        if spoilt is not None and bound is not None:
            asking, keys, values = (finite.healed(a)[0] for a in (asking, keys, values))
            d_out = jnp.where(chunk(_flat(spoilt), i)[..., None], 0, d_out)
            of_chunk = _bound_of(bound, i * some + jnp.arange(some), num_heads)
        gradients = _of_chunk(scale, asking, keys, values, d_out, of_chunk)
        return tuple(put(a, i, d) for a, d in zip(state, gradients, strict=True))

    new = jnp.zeros_like
    start = (new(flat_q), *((flat_v, flat_k) if in_place else (new(flat_k), new(flat_v))))
    gradients = jax.lax.fori_loop(0, items // some, one_chunk, start)
    d_q, d_k, d_v = (d.reshape(a.shape) for d, a in zip(gradients, (q, k, v), strict=True))
    return d_q, d_k, d_v


def _bound_of(bound: Array, items: Array, num_heads: int) -> Array:
    """That of some heads of examples, [c or 1, T, S]."""
    if bound.shape[:2] == (1, 1):
        return bound[0]
    return bound[items // num_heads if bound.shape[0] > 1 else 0, items % num_heads if bound.shape[1] > 1 else 0]


def _of_chunk(
    scale: float, q: Array, k: Array, v: Array, d_heads: Array, bound: Array | None
) -> tuple[Array, Array, Array]:
    """Gradients of q [c, T, H], k [c, S, H] and v [c, S, Hv]."""
    weights, totals = _weights(scale, q, k, bound)
    weights = jax.lax.optimization_barrier(weights / totals[..., None])
    d_weights = precision.einsum("cth,csh->cts", d_heads, v)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_logits = jax.lax.optimization_barrier(weights * (d_weights - mean))
    weights, d_logits = precision.narrow(weights, v), precision.narrow(d_logits, k)
    # A product whose left side is transposed is slow on CPU: turn the thin side, not the weights.
    turned_q, turned_d = jax.lax.optimization_barrier(tuple(jnp.swapaxes(a, 1, 2) for a in (q, d_heads)))
    d_q = precision.einsum("cts,csh->cth", d_logits, k) * _each(scale, q)
    d_k = precision.einsum("cht,cts->chs", turned_q, d_logits) * _each(scale, turned_q)
    d_v = precision.einsum("cht,cts->chs", turned_d, weights) * _each(1, turned_d)
    return d_q, jnp.swapaxes(d_k, 1, 2), jnp.swapaxes(d_v, 1, 2)


def _each(factor: float, a: Array) -> Array:
    """The factor for each row of an array [c, t, h], as [c, t, 1].

    It is the maximum of a row that is made to hold nothing else: beside a reduction of rows, the compiler's library
    shares a batch of small products between the cores, and without one it gives them all to one core.
    """
    wide = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    return jnp.max(wide * 0 + factor, axis=-1, keepdims=True)
