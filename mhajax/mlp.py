"""The position-wise feed-forward network between two attentions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "geglu_tanh", "swiglu"]

_EXACT_GELU = partial(jax.nn.gelu, approximate=False)
_PLAIN = {"relu": jax.nn.relu, "gelu": _EXACT_GELU, "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu}
_GATED = {"reglu": jax.nn.relu, "geglu": _EXACT_GELU, "geglu_tanh": jax.nn.gelu, "swiglu": jax.nn.silu}
_ACTIVATIONS = _PLAIN | _GATED


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the network.

    Attributes:
      d_model: D, width of input and output.
      d_ff: width of the hidden layer. None: 4 D.
      activation: "relu", "gelu" (by the error function), "gelu_tanh" (its usual approximation), "silu"; or "reglu",
        "geglu", "geglu_tanh", "swiglu", which multiply that of one projection by a second one.
      mlp_bias: add a bias after each projection.
    """

    d_model: int
    d_ff: int | None = None
    activation: Activation = "gelu_tanh"
    mlp_bias: bool = True

    def __post_init__(self):
        arguments.integers(self, "d_model")
        arguments.integers(self, "d_ff", optional=True)
        arguments.booleans(self, "mlp_bias")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {self.activation!r}.")

    @property
    def hidden(self) -> int:
        """Width of the hidden layer."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


class Params(NamedTuple):
    """Weights and biases; those of the gate only for a gated activation, biases only with `mlp_bias`."""

    w_in: Array  # [D, F]
    b_in: Array | None  # [F]
    w_out: Array  # [F, D]
    b_out: Array | None  # [D]
    w_gate: Array | None = None  # [D, F]
    b_gate: Array | None = None  # [F]


def activation(name: Activation) -> Callable[[Array], Array]:
    """The function of one channel; of a gated one that which is multiplied."""
    return _ACTIVATIONS[name]


def init_params(key: Array, config: Config) -> Params:
    """Normal weights of variance 1/fan_in, zero biases."""
    arguments.init("mlp.init_params", key, config, Config)
    d, f = config.d_model, config.hidden
    keys = jax.random.split(key, 3)[: 3 if config.activation in _GATED else 2]
    w_in, w_out, *w_gate = jax.vmap(lambda key: jax.random.normal(key, (d * f,)))(keys)  # one program for all
    return Params(
        w_in.reshape(d, f) * d**-0.5,
        jnp.zeros(f) if config.mlp_bias else None,
        w_out.reshape(f, d) * f**-0.5,
        jnp.zeros(d) if config.mlp_bias else None,
        w_gate[0].reshape(d, f) * d**-0.5 if w_gate else None,
        jnp.zeros(f) if w_gate and config.mlp_bias else None,
    )


def apply(params: Params, x: Array, config: Config) -> Array:
    """activation(x w_in + b_in) w_out + b_out for every token, [..., D] to [..., D].

    A gated activation multiplies before the last projection: activation(x w_in + b_in) · (x w_gate + b_gate).

    References:
      Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    arguments.order("mlp.apply(params, x, config)", params, config, Params, Config, x=x)
    params = jax.tree.map(lambda w: w.astype(x.dtype), params)
    bent = jax.checkpoint(activation(config.activation))  # its steps are cheaper to do again than to keep
    wide = _widen(x, params.w_in)
    hidden = bent(wide if params.b_in is None else wide + params.b_in)
    if params.w_gate is not None:
        wide = _widen(x, params.w_gate)
        hidden = hidden * (wide if params.b_gate is None else wide + params.b_gate)
    out = hidden @ params.w_out
    return out if params.b_out is None else out + params.b_out


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
