"""The products of the fused path, and their gradients, for heads that are laid out as [c, T, H].

A forward pass that nobody differentiates writes no weights down; the backward pass writes those of a few heads at a
time, unless they were kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import precision
from mhajax.kernels import finite
from mhajax.kernels.bands import LEAST_ROWS, Band, Bands, bound_of, compared, part
from mhajax.kernels.grid import fitting
from mhajax.kernels.loops import times

TASK = 256  # keys, and queries, whose logits one task of XLA's library has room for
_BLOCK = 64  # queries of a task that has more keys
_PAIRS = 3 * 2**18  # logits at a time in the backward pass: of one band, of several heads


def flat(a: Array) -> Array:
    """[B, K, …] to [B·K, …]. Forward and backward pass do it alike, or the compiler lays out an array for each."""
    return a.reshape(-1, *a.shape[2:])


def outputs(
    scale: float, bands: Bands, num_heads: int, q: Array, k: Array, v: Array, bound: Array | None, sound: bool = True
) -> tuple[Array, None]:
    """Outputs [c, T, Hv] of q [c, T, H], k [c, S, H] and v [c, S, Hv], band by band.

    The bound is [B or 1, K or 1, T, S], with c = B·K and K = num_heads. What is not finite counts as 0 if not sound.
    """
    items = q.shape[0]
    if len(bands) == 1 and sound:  # all heads at once
        whole = None if bound is None else bound[:, :, bands[0].rows, bands[0].columns]
        return _of_band(scale, *part(bands[0], q, k, v), whole), None
    enough = -(-LEAST_ROWS // min(band.end - band.first for band in bands))
    some = min(n for n in range(1, items + 1) if items % n == 0 and (n >= enough or n == items))

    def one_chunk(i: Array) -> Array:
        few = [jax.lax.dynamic_slice_in_dim(a, i * some, some) for a in (q, k, v)]
        few = few if sound else [finite.healed(a)[0] for a in few]
        bounds = (bound_of(bound, i, some, num_heads, band) for band in bands)
        of_bands = [_of_band(scale, *part(band, *few), seen) for band, seen in zip(bands, bounds, strict=True)]
        return of_bands[0] if len(bands) == 1 else jnp.concatenate(of_bands, axis=1)

    return times(one_chunk, items // some).reshape(*q.shape[:2], v.shape[-1]), None


def outputs_and_weights(
    scale: float, q: Array, k: Array, v: Array, bound: Array | None, sound: bool = True
) -> tuple[Array, Array]:
    """As `outputs`, and the weights [c, T, S]."""
    if not sound:
        q, k, v = (finite.healed(a)[0] for a in (q, k, v))
    weights = _shares(*_weights(scale, q, k, bound))
    return precision.einsum("cts,csh->cth", precision.narrow(weights, v), v), weights


def _of_band(scale: float, q: Array, k: Array, v: Array, bound: Array | None) -> Array:
    """Outputs [c, t, Hv] of the queries of a band."""
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
    heads = precision.einsum("...ts,...sh->...th", precision.narrow(weights, v), v)
    # As in `_shares`, but from an array that is large enough for XLA's library even if there are few queries.
    heads = heads / jnp.maximum(totals[..., None], jnp.minimum(heads, 0.25) + 0.25)
    return heads if blocks == 1 else heads.reshape(heads.shape[0], -1, heads.shape[-1])[:, :length]


def _weights(scale: float, q: Array, k: Array, bound: Array | None) -> tuple[Array, Array]:
    """Weights [c, …, T, S] that are not yet divided by their sums, and the sums [c, …, T]; 0 where nothing is seen.

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
    return weights, jnp.sum(weights, axis=-1)


def _shares(weights: Array, totals: Array) -> Array:
    """The weights divided by their sums, written down; 0 where nothing is seen, else the largest was 1."""
    return jax.lax.optimization_barrier(weights / jnp.maximum(totals, 0.5)[..., None])


def _sound(q: Array, k: Array, v: Array, d_heads: Array, harmed: Array | None) -> tuple[Array, Array, Array, Array]:
    """With 0 in place of what is not finite, and of the gradients of queries that are harmed, [c, T]."""
    if harmed is None:
        return q, k, v, d_heads
    q, k, v = (finite.healed(a)[0] for a in (q, k, v))
    return q, k, v, jnp.where(harmed[..., None], 0, d_heads)


def gradients_of_kept(
    scale: float, weights: Array, q: Array, k: Array, v: Array, d_heads: Array, harmed: Array | None, masked: bool
) -> tuple[Array, Array, Array]:
    """Gradients of q [B, K, T, H], k [B, K, S, H] and v [B, K, S, Hv] from the weights [B, K, T, S].

    If any queries are harmed, [B, K, T], what is not finite counts as 0. If masked, some pairs may be hidden.
    """
    like, weights = (q, k, v), flat(weights)
    q, k, v, d_heads = _sound(flat(q), flat(k), flat(v), flat(d_heads), None if harmed is None else flat(harmed))
    d_weights = _of_weights(d_heads, v, weights if masked else None)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_products = precision.narrow(weights * (d_weights - mean) * scale, k)
    d_q = precision.einsum("cts,csh->cth", d_products, k)
    d_k = precision.einsum("cts,cth->csh", d_products, q)
    d_v = precision.einsum("cts,cth->csh", precision.narrow(weights, v), d_heads)
    d_q, d_k, d_v = (d.reshape(a.shape).astype(a.dtype) for d, a in zip((d_q, d_k, d_v), like, strict=True))
    return d_q, d_k, d_v


def gradients(
    scale: float, bands: Bands, q: Array, k: Array, v: Array, d_heads: Array, harmed: Array | None, bound: Array | None
) -> tuple[Array, Array, Array]:
    """As `gradients_of_kept`, with the weights computed again, a few heads at a time."""
    batch, num_heads = q.shape[:2]
    items = batch * num_heads
    of_band = max(1, bands[-1].end * compared(bands) / len(bands))
    some = fitting(items, max(1, int(_PAIRS / of_band)))

    chunk = lambda a, i: jax.lax.dynamic_slice_in_dim(a, i * some, some)  # noqa: E731
    put = lambda a, i, d: jax.lax.dynamic_update_slice_in_dim(a, d.astype(a.dtype), i * some, 0)  # noqa: E731
    flat_q, flat_k, flat_v, flat_d = map(flat, (q, k, v, d_heads))
    # The gradient of the values is known after the keys are read, and that of the keys after the values: so each takes
    # the place of the other, chunk by chunk, and nothing is copied.
    in_place = k.shape == v.shape and k.dtype == v.dtype

    def one_chunk(i: Array, state: Any) -> Any:
        d_q, d_k, d_v = state
        keys, values = (d_v, d_k) if in_place else (flat_k, flat_v)
        mine = chunk(flat_q, i), chunk(keys, i), chunk(values, i), chunk(flat_d, i)
        given = _sound(*mine, None if harmed is None else chunk(flat(harmed), i))
        found = _gradients_of_bands(scale, bands, *given, partial(bound_of, bound, i, some, num_heads))
        return tuple(put(a, i, d) for a, d in zip(state, found, strict=True))

    new = jnp.zeros_like
    start = (new(flat_q), *((flat_v, flat_k) if in_place else (new(flat_k), new(flat_v))))
    found = jax.lax.fori_loop(0, items // some, one_chunk, start)
    d_q, d_k, d_v = (d.reshape(a.shape) for d, a in zip(found, (q, k, v), strict=True))
    return d_q, d_k, d_v


def _gradients_of_bands(
    scale: float, bands: Bands, q: Array, k: Array, v: Array, d_heads: Array, bound_of: Callable[[Band], Array | None]
) -> tuple[Array, Array, Array]:
    """Gradients of q [c, T, H], k [c, S, H] and v [c, S, Hv], summed over bands of queries."""
    d_q, (d_k, d_v) = [], (jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)) for a in (k, v))
    for band in bands:
        asking, keys, values = part(band, q, k, v)
        of_queries, of_keys, of_values = _gradients_of_band(
            scale, asking, keys, values, d_heads[:, band.rows], bound_of(band)
        )
        if len(bands) == 1 and of_keys.shape == k.shape:
            return of_queries, of_keys, of_values
        d_q.append(of_queries)
        d_k, d_v = d_k.at[:, band.columns].add(of_keys), d_v.at[:, band.columns].add(of_values)
    return jnp.concatenate(d_q, axis=1), d_k, d_v


def _gradients_of_band(
    scale: float, q: Array, k: Array, v: Array, d_heads: Array, bound: Array | None
) -> tuple[Array, Array, Array]:
    """Gradients of the queries of one band, and its part of those of keys and values."""
    weights = _shares(*_weights(scale, q, k, bound))
    d_weights = _of_weights(d_heads, v, None if bound is None else weights)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_logits = jax.lax.optimization_barrier(weights * (d_weights - mean))
    weights, d_logits = precision.narrow(weights, v), precision.narrow(d_logits, k)
    # A product whose left side is transposed is slow on CPU: turn the thin side, not the weights.
    turned_q, turned_d = jax.lax.optimization_barrier(tuple(jnp.swapaxes(a, 1, 2) for a in (q, d_heads)))
    d_q = precision.einsum("cts,csh->cth", d_logits, k) * _each(scale, q)
    d_k = precision.einsum("cht,cts->chs", turned_q, d_logits) * _each(scale, turned_q)
    d_v = precision.einsum("cht,cts->chs", turned_d, weights) * _each(1, turned_d)
    return d_q, jnp.swapaxes(d_k, 1, 2), jnp.swapaxes(d_v, 1, 2)


def _of_weights(d_heads: Array, v: Array, weights: Array | None) -> Array:
    """Gradients of the weights [c, T, S]; if those are given, 0 where they are, as a hidden value may make it inf."""
    d_weights = precision.einsum("cth,csh->cts", d_heads, v)
    return d_weights if weights is None else jnp.where(weights > 0, d_weights, 0)


def _each(factor: float, a: Array) -> Array:
    """The factor for each row of an array [c, t, h], as [c, t, 1].

    It is the maximum of a row that is made to hold nothing else: beside a reduction of rows, the compiler's library
    shares a batch of small products between the cores, and without one it gives them all to one core.
    """
    wide = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    return jnp.max(wide * 0 + factor, axis=-1, keepdims=True)
