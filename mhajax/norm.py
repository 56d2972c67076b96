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
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon) * params.scale
    if params.shift is not None:
        wide = wide + params.shift
    return wide.astype(x.dtype)
