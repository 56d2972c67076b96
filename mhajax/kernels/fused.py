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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap

from mhajax import masks, precision
from mhajax.kernels import finite
from mhajax.kernels.dense import full_rank
from mhajax.kernels.grid import fitting, times
from mhajax.masks import Mask, Tokens

MOST_KEYS = 384  # that a query is compared with; more are faster in tiles
MOST_PAIRS = 2**20  # logits of one head; the backward pass holds them
_LEAST_ROWS = 4096  # queries of all heads; the library leaves smaller arrays to others
TASK = 256  # keys, and queries, whose logits one task of the library has room for
MANY_ROWS = 8192  # queries of all heads, from which on more keys than that are worth it
_BLOCK = 64  # queries of a task that has more keys
_PAIRS = 3 * 2**18  # logits at a time in the backward pass: of one band, of several heads
_BAND, _RUN = 128, 32  # queries of a band, if there are enough heads; its keys are a multiple


class Band(NamedTuple):
    """Queries that are computed together, and the run of keys that the mask leaves to them."""

    first: int
    end: int
    first_key: int
    end_key: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.end)

    @property
    def columns(self) -> slice:
        return slice(self.first_key, self.end_key)


Bands = tuple[Band, ...]


def bands(mask: Mask | None, queries: Tokens, keys: Tokens, items: int, group: int = 1) -> Bands:
    """How the queries are cut, so that keys which the mask is known to hide are not computed.

    Args:
      mask, queries, keys: as in `attend`.
      items: B·K, heads that are computed together.
      group: N/K; heads that share a key head are not cut.
    """
    height = max(_BAND, -(-_LEAST_ROWS // max(items, 1)))
    count = queries.size // height
    if mask is None or group > 1 or count < 2:
        return (Band(0, group * queries.size, 0, keys.size),)
    height = -(-queries.size // count)
    some, _ = masks.known_tiles(mask, queries, keys, height, _RUN)
    seen = some.reshape(-1, *some.shape[-2:]).any(0)
    found: list[Band] = []
    for i, row in enumerate(seen):
        there = np.flatnonzero(row) if row.any() else np.zeros(1, int)
        columns = int(there[0]) * _RUN, min(int(there[-1] + 1) * _RUN, keys.size)
        band = Band(i * height, min((i + 1) * height, queries.size), *columns)
        if found and found[-1][2:] == columns:
            band = band._replace(first=found.pop().first)
        found.append(band)
    return tuple(found)


def compared(cut: Bands) -> float:
    """Keys that a query is compared with, in the mean."""
    return sum((b.end - b.first) * (b.end_key - b.first_key) for b in cut) / cut[-1].end


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
    cut = bands(mask, queries, keys, batch * num_kv_heads, num_heads // num_kv_heads)
    outputs: Any = _attend(scale, cut, lay_out(q), lay_out(k), lay_out(v), bound)
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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None) -> tuple[Array, Array | None]:
    """`_heads` from q [B, K, T, H], k [B, K, S, H] and v [B, K, S, Hv]; T counts all heads of a group."""
    return _folded(partial(_heads, scale, cut))(q, k, v, bound)


def _forward(scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None) -> tuple[tuple, tuple]:
    outputs: Any = _attend(scale, cut, q, k, v, bound)
    return outputs, (q, k, v, outputs[1], bound)


def _backward(scale: float, cut: Bands, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, spoilt, bound = saved
    return *_pull(scale, cut, q, k, v, cotangents[0], spoilt, bound), None


_attend.defvjp(_forward, _backward)


# Second derivatives: a function under `custom_vmap` has none of its own, so these are those of `_gradients` without it.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pull(scale: float, cut: Bands, *arguments: Any) -> tuple[Array, Array, Array]:
    return _folded(partial(_gradients, scale, cut))(*arguments)


def _pull_forward(scale: float, cut: Bands, *arguments: Any) -> tuple[tuple, tuple]:
    return _pull(scale, cut, *arguments), arguments


def _pull_backward(scale: float, cut: Bands, arguments: tuple, cotangents: tuple) -> tuple:
    q, k, v, d_heads, spoilt, bound = arguments
    _, pull = jax.vjp(lambda q, k, v, d: _gradients(scale, cut, q, k, v, d, spoilt, bound), q, k, v, d_heads)
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


def _heads(scale: float, cut: Bands, q: Array, k: Array, v: Array, bound: Array | None) -> tuple[Array, Array | None]:
    """Outputs [B, K, T, Hv], NaN for queries that see something that is not finite; which these are, [B, K, T]."""
    shape = (*q.shape[:-1], v.shape[-1])
    arrays = _flat(q), _flat(k), _flat(v)
    products = partial(_products, scale, cut, q.shape[1])
    if bound is None:  # everybody sees everything
        return products(*arrays, None).reshape(shape), None
    sums = [jnp.sum(a, axis=-1) for a in arrays]  # they may overflow, then it is looked at twice
    sound = jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in sums]))

    def looked_at() -> tuple[Array, Array]:
        bad_q, bad_k, bad_v = (finite.healed(a)[1] for a in arrays)
        of_queries, of_keys = (a.reshape(*shape[:2], -1) for a in (bad_q, bad_k | bad_v))

        def reached(given: Any) -> Array:
            example, queries, keys = given
            seen = bound[example if bound.shape[0] > 1 else 0] > 0
            return jnp.any((queries[..., None] | keys[..., None, :]) & seen, axis=-1)

        # The pairs of one example at a time.
        spoilt = jax.lax.map(reached, (jnp.arange(shape[0]), of_queries, of_keys))
        heads = products(*arrays, bound, sound=False)  # else the same program as below, so that no bit is another
        return jnp.where(_flat(spoilt)[..., None], jnp.nan, heads), _flat(spoilt)

    nobody = jnp.broadcast_to(~sound, arrays[0].shape[:-1])  # not zeros: it varies over devices as the rest does
    heads, spoilt = jax.lax.cond(sound, lambda: (products(*arrays, bound), nobody), looked_at)
    return heads.reshape(shape), spoilt.reshape(shape[:-1])


def _flat(a: Array) -> Array:
    """[B, K, …] to [B·K, …]. Forward and backward pass do it alike, or the compiler lays out an array for each."""
    return a.reshape(-1, *a.shape[2:])


def _products(
    scale: float, cut: Bands, num_heads: int, q: Array, k: Array, v: Array, bound: Array | None, sound: bool = True
) -> Array:
    """Outputs [c, T, Hv] of q [c, T, H], k [c, S, H] and v [c, S, Hv]; what is not finite counts as 0 if not sound."""
    healed = lambda arrays: arrays if sound else [finite.healed(a)[0] for a in arrays]  # noqa: E731
    items = q.shape[0]
    if len(cut) == 1:  # all heads at once
        band = cut[0]
        seen = None if bound is None else bound[:, :, band.rows, band.columns]
        return _of_band(scale, *healed(_part(band, q, k, v)), seen)
    enough = -(-_LEAST_ROWS // min(band.end - band.first for band in cut))
    some = min(n for n in range(1, items + 1) if items % n == 0 and (n >= enough or n == items))

    def one_chunk(i: Array) -> Array:
        few = healed([jax.lax.dynamic_slice_in_dim(a, i * some, some) for a in (q, k, v)])
        bound_of = partial(_bound_of, bound, i, some, num_heads)
        return jnp.concatenate([_of_band(scale, *_part(band, *few), bound_of(band)) for band in cut], axis=1)

    return times(one_chunk, items // some).reshape(*q.shape[:2], v.shape[-1])


def _part(band: Band, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return q[:, band.rows], k[:, band.columns], v[:, band.columns]


def _of_band(scale: float, q: Array, k: Array, v: Array, bound: Array | None) -> Array:
    length, num_keys = q.shape[1], k.shape[1]
    blocks = 1 if num_keys <= TASK else -(-length // _BLOCK)
    if blocks > 1:  # the queries in blocks, each with all the keys
        rows = -(-length // blocks)
        more = blocks * rows - length
        q = jnp.pad(q, ((0, 0), (0, more), (0, 0))).reshape(-1, blocks, rows, q.shape[-1])
        k, v = jax.lax.optimization_barrier((k, v))  # what is broadcast is not written down
        k, v = (jnp.broadcast_to(a[:, None], (a.shape[0], blocks, *a.shape[1:])) for a in (k, v))
        if bound is not None:
            bound = jnp.pad(bound, ((0, 0), (0, 0), (0, more), (0, 0))).reshape(
                *bound.shape[:2], blocks, rows, num_keys
            )
    weights, totals = _weights(scale, q, k, bound)
    heads = precision.einsum("...ts,...sh->...th", precision.narrow(weights, v), v) / totals[..., None]
    return heads if blocks == 1 else heads.reshape(heads.shape[0], -1, heads.shape[-1])[:, :length]


def _weights(scale: float, q: Array, k: Array, bound: Array | None) -> tuple[Array, Array]:
    """Weights [c, …, T, S] that are not yet divided by their sums, and the sums [c, …, T]; 0.5 where nothing is seen.

    The bound is that of all heads, [B or 1, K or 1, …, T, S], or of some, [c or 1, 1, …, T, S].
    """
    logits = precision.einsum("...th,...sh->...ts", q, k) * scale
    if bound is not None:
        split = (bound.shape[0], -1) if bound.shape[0] > 1 else (-1, bound.shape[1])
        bounded = jnp.minimum(logits.reshape(*split, *logits.shape[1:]), bound.astype(logits.dtype))
        logits = bounded.reshape(logits.shape)
    lowest = jnp.finfo(logits.dtype).min  # of a query that sees nothing: -inf less -inf would be NaN
    shown = jax.lax.stop_gradient(logits)  # a shift by the largest changes nothing
    top = jax.lax.reduce(shown, logits.dtype.type(lowest), jax.lax.max, (logits.ndim - 1,))
    weights = jnp.exp(logits - top[..., None])
    return weights, jnp.maximum(jnp.sum(weights, axis=-1), 0.5)  # the largest weight is 1 if there is one


def _gradients(
    scale: float, cut: Bands, q: Array, k: Array, v: Array, d_heads: Array, spoilt: Array | None, bound: Array | None
) -> tuple[Array, Array, Array]:
    """Those of q, k and v; a few heads at a time. A query that is spoilt passes none."""
    batch, num_heads = q.shape[:2]
    items = batch * num_heads
    some = fitting(items, max(1, int(_PAIRS / (cut[-1].end * compared(cut) / len(cut)))))

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
        if spoilt is not None and bound is not None:
            asking, keys, values = (finite.healed(a)[0] for a in (asking, keys, values))
            d_out = jnp.where(chunk(_flat(spoilt), i)[..., None], 0, d_out)
        gradients = _of_bands(scale, cut, asking, keys, values, d_out, partial(_bound_of, bound, i, some, num_heads))
        return tuple(put(a, i, d) for a, d in zip(state, gradients, strict=True))

    new = jnp.zeros_like
    start = (new(flat_q), *((flat_v, flat_k) if in_place else (new(flat_k), new(flat_v))))
    gradients = jax.lax.fori_loop(0, items // some, one_chunk, start)
    d_q, d_k, d_v = (d.reshape(a.shape) for d, a in zip(gradients, (q, k, v), strict=True))
    return d_q, d_k, d_v


def _bound_of(bound: Array | None, index: Array, some: int, num_heads: int, band: Band) -> Array | None:
    """A band of the bound of the chunk with this number, of `some` heads of examples: [c or 1, 1, t, s]."""
    if bound is None:
        return None
    bound = bound[:, :, band.rows, band.columns]
    if bound.shape[:2] == (1, 1):
        return bound
    items = index * some + jnp.arange(some)
    of_items = bound[items // num_heads if bound.shape[0] > 1 else 0, items % num_heads if bound.shape[1] > 1 else 0]
    return of_items[:, None]


def _of_bands(
    scale: float, cut: Bands, q: Array, k: Array, v: Array, d_heads: Array, bound_of: Callable[[Band], Array | None]
) -> tuple[Array, Array, Array]:
    """Gradients of q [c, T, H], k [c, S, H] and v [c, S, Hv], summed over bands of queries."""
    d_q, d_k, d_v = [], jnp.zeros(k.shape, k.dtype), jnp.zeros(v.shape, v.dtype)
    for band in cut:
        asking, keys, values = _part(band, q, k, v)
        of_queries, of_keys, of_values = _of_band_pulled(
            scale, asking, keys, values, d_heads[:, band.rows], bound_of(band)
        )
        if len(cut) == 1:
            return of_queries, of_keys, of_values
        d_q.append(of_queries)
        d_k, d_v = d_k.at[:, band.columns].add(of_keys), d_v.at[:, band.columns].add(of_values)
    return jnp.concatenate(d_q, axis=1), d_k, d_v


def _of_band_pulled(
    scale: float, q: Array, k: Array, v: Array, d_heads: Array, bound: Array | None
) -> tuple[Array, Array, Array]:
    """Gradients of the queries of one band, and its part of those of keys and values."""
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
