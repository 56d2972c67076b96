"""What is non-finite stays where it may be seen.

Zero times NaN is NaN, so a weight of 0 does not keep a bad key away from the sums, and least of all from the gradients.
Bad entries are taken out before a kernel runs, and what they reach is marked after. Of queries and keys those are bad
too whose products might overflow, 2^55 or more in float32: what is hidden is then a finite logit plus -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax.kernels.contract import Inputs
from mhajax.masks.static import aligned


class NonFinite(NamedTuple):
    """Tokens with a non-finite entry."""

    queries: Array  # bool [..., N, T]
    keys: Array  # bool [..., N, S], of the key or the value


def guarded(product: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """A product of activations and weights, in whose derivative non-finite activations count as 0.

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


def replace_nonfinite(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array, NonFinite]:
    """q, k and v with 0 in place of non-finite numbers, and where there were any."""
    (q, queries), (k, keys), (v, values) = replace_rows(q, limit(q)), replace_rows(k, limit(k)), replace_rows(v)
    keys = jnp.repeat(keys | values, q.shape[-3] // k.shape[-3], axis=-2)
    return q, k, v, NonFinite(queries, keys)


def replace_rows(rows: Array, limit: float = math.inf) -> tuple[Array, Array]:
    """Tokens [..., t, H] with 0 in place of what is not below a limit, and which had any, [..., t]."""
    below = jnp.abs(rows) < limit
    return jnp.where(below, rows, 0), ~jnp.all(below, axis=-1)


def limit(array: Array) -> float:
    """What numbers of queries and keys are below, so that no sum of up to 2^17 of their products overflows."""
    most = _most(array.dtype)
    return most if most < float(jnp.finfo(array.dtype).max) else math.inf


def _most(dtype: Any) -> float:
    """The limit in the dtype of the products: 2^55 in float32."""
    return 2.0 ** (jnp.finfo(jnp.promote_types(dtype, jnp.float32)).maxexp // 2 - 9)


def all_finite(q: Array, k: Array, v: Array) -> Array:
    """Whether all is finite, bool []: one look at each array, which may say no too often, never yes."""

    def finite(array: Array) -> Array:
        wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
        return jnp.all(jnp.sum(wide * wide, axis=-1) < _most(array.dtype) ** 2)

    return finite(q) & finite(k) & finite(v)


def pairs(nonfinite: NonFinite, inputs: Inputs) -> Array:
    """Pairs that may attend and are non-finite, bool [..., N, T, S]."""
    seen = nonfinite.queries[..., :, None] | nonfinite.keys[..., None, :]
    if inputs.mask is not None:
        seen, allowed = aligned(seen, inputs.mask.block(inputs.queries, inputs.keys))
        seen = seen & allowed
    if inputs.bias is not None:
        seen, bias = aligned(seen, inputs.bias)
        seen = seen & (bias != -jnp.inf)
    return seen


def reached(nonfinite: NonFinite, inputs: Inputs) -> Array:
    """Queries that see something non-finite, bool [..., N, T]. Pairs are looked at only if there is anything."""
    search = lambda: jnp.any(pairs(nonfinite, inputs), axis=-1)  # noqa: E731
    anything = jnp.any(nonfinite.queries) | jnp.any(nonfinite.keys)
    return jax.lax.cond(anything, search, lambda: jnp.zeros_like(anything, shape=inputs.q.shape[:-1]))


def mark(
    heads: Array, captured: dict[str, Any], rows: Array, nonfinite: NonFinite, inputs: Inputs
) -> tuple[Array, dict[str, Any]]:
    """Outputs and captured arrays with NaN for what sees something non-finite; no gradient passes there."""
    marks = {
        "log_sum_exp": lambda sums: sums._replace(log_total=nan_where(rows, sums.log_total)),
        "weights": lambda weights: nan_where(rows[..., None], weights),
        "logits": lambda logits: nan_where(pairs(nonfinite, inputs), logits),
    }
    return nan_where(rows[..., None], heads), {name: marks[name](array) for name, array in captured.items()}


def nan_where(where: Array, array: Array) -> Array:
    """NaN there, and no gradient; else the array."""
    return jnp.where(where, jnp.asarray(jnp.nan, array.dtype), array)
