"""What kernels from outside have in common: what they cannot do, and what they do not promise.

That is zeros for fully masked queries, and NaN that stays where it is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import masks
from mhajax.kernels import finite
from mhajax.kernels.contract import CACHED, Inputs, Request
from mhajax.masks import Mask, Tokens

ROWS = 512  # queries at a time, lest all pairs are in memory


def refusal(who: str, request: Request) -> str:
    """Why a kernel that knows masks by index only, and nothing that changes the logits, cannot do it."""
    if request.cached:
        return CACHED
    asked = {"bias": request.bias, "score function": request.score, "dropout of our kind": request.dropout}
    for what, wanted in asked.items():
        if wanted:
            return f"{who} has no {what}"
    if request.log_sum_exp:
        return f"{who} gives no log_sum_exp"
    found, queries, keys = masks.conditions(request.mask), request.queries, request.keys
    if found.rest:
        return f"{who} has no mask like {found.rest[0]!r}"
    if found.window is not None and not all(isinstance(side, int) for side in found.window):
        return f"{who} needs a window that is known when the program is traced"
    if (found.causal or found.window is not None) and (queries.origin is None or queries.origin != keys.origin):
        return f"{who} compares indices, and positions are not known to be the same as indices"
    looked_up = found.lengths is not None or found.segments is not None
    if looked_up and not all(isinstance(t.start, int) and t.start == 0 for t in (queries, keys)):
        return f"{who} needs queries and keys that start at index 0"
    return ""


def around(kernel: Callable[[Array, Array, Array], Array], inputs: Inputs) -> Array:
    """The heads' outputs of a kernel that knows a mask by index, [..., N, T, Hv], made to keep the promises.

    Args:
      kernel: (q, k, v) → heads; whatever it gives for a fully masked query must be finite.
      inputs: with a mask of causal, window, lengths and segments, all of which may be asked by index.
    """
    q, k, v, *_ = inputs
    if inputs.mask is None:
        return kernel(q, k, v)
    mask, queries, keys = inputs.mask, masks.tokens(q.shape[-2]), masks.tokens(k.shape[-2])
    q, k, v, nonfinite = finite.replace_nonfinite(q, k, v)
    heads = kernel(q, k, v)
    found = masks.conditions(mask)
    if found.lengths is not None or found.segments is not None or queries.size > keys.size:
        visible = _any_key(lambda part, _: mask.block(part, keys), queries)  # [T] or [..., 1 or N, T]
        heads = jnp.where(visible[..., None], heads, 0)
    rows = reached(nonfinite, mask, queries, keys)
    return finite.mark(heads, {}, rows, nonfinite, inputs)[0]


def reached(nonfinite: finite.NonFinite, mask: Mask, queries: Tokens, keys: Tokens) -> Array:
    """Queries that see something non-finite, bool [..., N, T]. Pairs are looked at only if there is anything."""

    def pairs(part: Tokens, start: Array) -> Array:
        queries = jax.lax.dynamic_slice_in_dim(nonfinite.queries, start, part.size, axis=-1)
        return (queries[..., :, None] | nonfinite.keys[..., None, :]) & mask.block(part, keys)

    anything = jnp.any(nonfinite.queries) | jnp.any(nonfinite.keys)
    return jax.lax.cond(anything, lambda: _any_key(pairs, queries), lambda: jnp.zeros(nonfinite.queries.shape, bool))


def _any_key(pairs: Callable[[Tokens, Array], Array], queries: Tokens) -> Array:
    """Whether any key of (some queries, which) → [..., t, s] is True, a few queries at a time: [..., T]."""
    size = min(ROWS, queries.size)
    position = jnp.asarray(queries.position)

    def some(i: Array | int) -> tuple[Array, Array]:
        start = jnp.minimum(i * size, queries.size - size)  # the last ones are looked at twice
        part = Tokens(queries.start + start, jax.lax.dynamic_slice_in_dim(position, start, size, axis=-1))
        return start, jnp.any(pairs(part, start), axis=-1)

    def body(i: Array, found: Array) -> Array:
        start, rows = some(i)
        return jax.lax.dynamic_update_slice_in_dim(found, jnp.broadcast_to(rows, (*rows.shape[:-1], size)), start, -1)

    shape = jax.eval_shape(lambda: some(0)[1]).shape
    return jax.lax.fori_loop(0, -(-queries.size // size), body, jnp.zeros((*shape[:-1], queries.size), bool))
