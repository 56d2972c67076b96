"""The position-wise feed-forward network between two attentions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments

_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "swiglu": jax.nn.silu}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the network.

    Attributes:
      d_model: D, width of input and output.
      d_ff: width of the hidden layer. None: 4 D.
      activation: "relu", "gelu", or "swiglu", which multiplies silu of one projection by a second one.
    """

    d_model: int
    d_ff: int | None = None
    activation: Literal["relu", "gelu", "swiglu"] = "gelu"

    def __post_init__(self):
        arguments.integers(self, "d_model")
        arguments.integers(self, "d_ff", optional=True)
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}.")

    @property
    def hidden(self) -> int:
        """Width of the hidden layer."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


class Params(NamedTuple):
    """Weights and biases; w_gate only for a gated activation."""

    w_in: Array  # [D, F]
    b_in: Array  # [F]
    w_out: Array  # [F, D]
    b_out: Array  # [D]
    w_gate: Array | None = None  # [D, F]


def init_params(key: Array, config: Config) -> Params:
    """Normal weights of variance 1/fan_in, zero biases."""
    arguments.init("mlp.init_params", key, config, Config)
    d, f = config.d_model, config.hidden
    keys = jax.random.split(key, 3)[: 3 if config.activation == "swiglu" else 2]
    w_in, w_out, *w_gate = jax.vmap(lambda key: jax.random.normal(key, (d * f,)))(keys)  # one program for all
    return Params(
        w_in.reshape(d, f) * d**-0.5,
        jnp.zeros(f),
        w_out.reshape(f, d) * f**-0.5,
        jnp.zeros(d),
        w_gate[0].reshape(d, f) * d**-0.5 if w_gate else None,
    )


def apply(params: Params, x: Array, config: Config) -> Array:
    """activation(x w_in + b_in) w_out + b_out for every token, [..., D] to [..., D].

    References:
      Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    arguments.order("mlp.apply(params, x, config)", params, config, Params, Config, x=x)
    params = jax.tree.map(lambda w: w.astype(x.dtype), params)
    activation = jax.checkpoint(_ACTIVATIONS[config.activation])  # its steps are cheaper to do again than to keep
    hidden = activation(_widen(x, params.w_in) + params.b_in)
    if params.w_gate is not None:
        hidden = hidden * _widen(x, params.w_gate)
    return hidden @ params.w_out + params.b_out


@jax.custom_jvp
def _widen(x: Array, weights: Array) -> Array:
    """x [..., D] by [D, F], more than D."""
    return x @ weights


@_widen.defjvp
def _derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, weights), (d_x, d_weights) = primals, tangents
    # The gradient of the weights is a product over tokens, for which XLA on CPU would turn the wide side.
    turned = jax.lax.optimization_barrier(jnp.swapaxes(x.reshape(-1, x.shape[-1]), 0, 1))
    of_weights = jnp.swapaxes(turned, 0, 1) @ d_weights
    return x @ weights, d_x @ weights + of_weights.reshape(*x.shape[:-1], weights.shape[-1])
