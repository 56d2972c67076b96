"""Normalisation of a token's channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments

Kind = Literal["rms", "layer"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A normalisation.

    Attributes:
      d_model: D, the number of channels.
      norm: "rms" or "layer".
      norm_epsilon: what is added to the mean square, or the variance, before its root is taken.
    """

    d_model: int
    norm: Kind = "rms"
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        arguments.integers(self, "d_model")
        if self.norm not in get_args(Kind):
            raise ValueError(f"norm must be one of {', '.join(get_args(Kind))}, got {self.norm!r}.")
        arguments.positive(self, "norm_epsilon")


class Params(NamedTuple):
    """Scale [D], and shift [D] for "layer" (None for "rms")."""

    scale: Array
    shift: Array | None


def init_params(key: Array | None, config: Config) -> Params:
    """Scale 1, shift 0: nothing is drawn, and the key may be None."""
    del key
    width = config.d_model
    return Params(jnp.ones(width), jnp.zeros(width) if config.norm == "layer" else None)


def apply(params: Params, x: Array, config: Config) -> Array:
    """x [..., D] with unit mean square ("rms"), or zero mean and unit variance ("layer"), scaled and shifted.

    Statistics are float32 (float64 for float64), the result has the dtype of x.

    References:
      Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; Ba et al. 2016, "Layer Normalization".
    """
    return normalise(params, x, config.norm_epsilon)


def normalise(params: Params, x: Array, epsilon: float) -> Array:
    """`apply` for parameters of any width, [D] or what broadcasts to x: "layer" is where there is a shift."""
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
