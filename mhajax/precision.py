"""Products that are summed in float32, whatever they are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def narrow(weights: Array, values: Array) -> Array:
    """Attention weights or their gradients in the dtype in which they meet the values.

    That is the values' own on accelerators, whose matrix units want equal factors. A CPU widens half precision anyway,
    and rounding before would cost accuracy for nothing.
    """
    return weights if jax.default_backend() == "cpu" else weights.astype(values.dtype)


def einsum(equation: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays, summed and returned in float32 (float64 for float64).

    On accelerators the factors stay as they are, which is what their matrix units want. On a CPU half-precision factors
    are widened first: that is exact, it is what XLA does there anyway, and older versions refuse the mixed product.
    """
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    if jax.default_backend() == "cpu":
        a, b = a.astype(wide), b.astype(wide)
    return jnp.einsum(equation, a, b, preferred_element_type=wide)
