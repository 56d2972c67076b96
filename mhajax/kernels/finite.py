"""What is not finite stays where it may be seen.

Zero times NaN is NaN, so a weight of 0 does not keep a bad key away from the sums, and least of all from the gradients.
Bad entries are taken out before a kernel runs, and what they spoil is marked after. Of queries and keys those are bad
too whose products might overflow, 2^55 or more in float32: what is hidden is then a finite logit plus -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax.masks import Mask, Tokens
from mhajax.masks.static import aligned


class Spoilt(NamedTuple):
    """Tokens with an entry that is not finite."""

    queries: Array  # bool [..., N, T]
    keys: Array  # bool [..., N, S], of the key or the value


def guarded(product: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """A product of activations and weights, in whose derivative activations that are not finite count as 0.

    A token that nobody may see has a cotangent of 0, and 0 times NaN would be a gradient of NaN for the weights.
    """
    guarded = jax.custom_jvp(product)

    @guarded.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        (x, w), (d_x, d_w) = primals, tangents
        return product(x, w), product(d_x, w) + product(jnp.where(jnp.isfinite(x), x, 0), d_w)

    return lambda x, w: guarded(own(x), own(w))


def own(array: Array) -> Array:
    """The array, made by JAX: its custom derivatives refuse NumPy's, and `vmap` may hide one."""
    return jnp.squeeze(jnp.expand_dims(array, 0), 0)


def heal(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array, Spoilt]:
    """q, k and v with 0 in place of what is bad, and where there was any."""
    (q, queries), (k, keys), (v, values) = healed(q, limit(q)), healed(k, limit(k)), healed(v)
    keys = jnp.repeat(keys | values, q.shape[-3] // k.shape[-3], axis=-2)
    return q, k, v, Spoilt(queries, keys)


def healed(rows: Array, limit: float = math.inf) -> tuple[Array, Array]:
    """Tokens [..., t, H] with 0 in place of what is not below a limit, and which had any, [..., t]."""
    good = jnp.abs(rows) < limit
    return jnp.where(good, rows, 0), ~jnp.all(good, axis=-1)


def limit(array: Array) -> float:
    """What numbers of queries and keys are below, so that no sum of up to 2^17 of their products overflows."""
    most = _most(array.dtype)
    return most if most < float(jnp.finfo(array.dtype).max) else math.inf


def _most(dtype: Any) -> float:
    """The limit in the dtype of the products: 2^55 in float32."""
    return 2.0 ** (jnp.finfo(jnp.promote_types(dtype, jnp.float32)).maxexp // 2 - 9)


def moderate(q: Array, k: Array, v: Array) -> Array:
    """Whether nothing is bad, bool []: one look at each array, which may say no too often, never yes."""

    def good(array: Array) -> Array:
        wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
        return jnp.all(jnp.sum(wide * wide, axis=-1) < _most(array.dtype) ** 2)

    return good(q) & good(k) & good(v)


def pairs(spoilt: Spoilt, mask: Mask | None, bias: Array | None, queries: Tokens, keys: Tokens) -> Array:
    """Pairs that may attend and are spoilt, bool [..., N, T, S]."""
    seen = spoilt.queries[..., :, None] | spoilt.keys[..., None, :]
    if mask is not None:
        seen, allowed = aligned(seen, mask.block(queries, keys))
        seen = seen & allowed
    if bias is not None:
        seen, bias = aligned(seen, bias)
        seen = seen & (bias != -jnp.inf)
    return seen


def reached(
    spoilt: Spoilt, mask: Mask | None, bias: Array | None, queries: Tokens, keys: Tokens, shape: tuple[int, ...]
) -> Array:
    """Queries that see something spoilt, bool [..., N, T]. Pairs are looked at only if there is anything."""
    look = lambda: jnp.any(pairs(spoilt, mask, bias, queries, keys), axis=-1)  # noqa: E731
    anything = jnp.any(spoilt.queries) | jnp.any(spoilt.keys)
    return jax.lax.cond(anything, look, lambda: jnp.zeros_like(anything, shape=shape[:-1]))


def mark(
    heads: Array, captured: dict[str, Any], rows: Array, spoilt: Spoilt, mask: Mask | None, bias: Array | None,
    queries: Tokens, keys: Tokens,
) -> tuple[Array, dict[str, Any]]:  # fmt: skip
    """Outputs and captured arrays with NaN where they are spoilt; no gradient passes there."""
    marks = {
        "log_sum_exp": lambda sums: sums._replace(log_total=nan_where(rows, sums.log_total)),
        "weights": lambda weights: nan_where(rows[..., None], weights),
        "logits": lambda logits: nan_where(pairs(spoilt, mask, bias, queries, keys), logits),
    }
    return nan_where(rows[..., None], heads), {name: marks[name](array) for name, array in captured.items()}


def nan_where(where: Array, array: Array) -> Array:
    """NaN there, and no gradient; else the array."""
    return jnp.where(where, jnp.asarray(jnp.nan, array.dtype), array)
