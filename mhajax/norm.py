"""Normalisation of a token's channels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Kind = Literal["rms", "layer"]


class Params(NamedTuple):
    """Scale [D], and shift [D] for "layer" (None for "rms")."""

    scale: Array
    shift: Array | None


def init_params(width: int, kind: Kind) -> Params:
    """Scale 1, shift 0."""
    return Params(jnp.ones(width), jnp.zeros(width) if kind == "layer" else None)


def apply(params: Params, x: Array, *, epsilon: float = 1e-6) -> Array:
    """x [..., D] with unit mean square ("rms"), or zero mean and unit variance ("layer"), scaled and shifted.

    Statistics are float32 (float64 for float64), the result has the dtype of x.

    References:
      Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; Ba et al. 2016, "Layer Normalization".
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if params.shift is not None:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = _times(wide, jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon))
    wide = _times(wide, params.scale)
    if params.shift is not None:
        wide = wide + params.shift
    return wide.astype(x.dtype)


@jax.custom_jvp
def _times(x: Array, factor: Array) -> Array:
    """x [..., D] times a factor that is spread over it, [D] or [..., 1]."""
    return x * factor


@_times.defjvp
def _derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, factor), (d_x, d_factor) = primals, tangents
    # One factor for both passes would be written out over x, since XLA computes nothing twice; so each has its own.
    own = jax.lax.optimization_barrier(factor)
    return x * factor, d_x * own + x * d_factor
