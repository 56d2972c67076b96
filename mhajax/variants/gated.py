"""Gated attention: every channel of every head's output is let through as far as the query's token says, before w_o.

    head_n ← head_n · σ(x w_g[n])

The gate sees the query's token, not what was attended to, and gives every head a way to say nothing.

References:
  Qiu et al. 2025, "Gated Attention for Large Language Models", section 2.2 (their G1, one gate for every channel).
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments, attention, precision
from mhajax.options import Options
from mhajax.variants import between

Config = attention.Config


class Params(NamedTuple):
    """The parameters; heads lead."""

    attention: attention.Params
    w_g: Array  # [N, D, Hv]


def init_params(key: Array, config: Config) -> Params:
    """Those of `attention`, and gates with entries of variance 1/D, half open on average."""
    arguments.init("gated.init_params", key, config, Config)
    key_attention, key_gate = jax.random.split(key)
    shape = (config.num_heads, config.d_model, config.value_width)
    w_g = jax.random.normal(key_gate, shape) * config.d_model**-0.5
    return Params(attention.init_params(key_attention, config), w_g)


@arguments.shown
def apply(params: Params, x: Array, config: Config, **options: Unpack[Options]) -> Array:
    """Gated multi-head attention of x to itself, or to `memory`.

    Args:
      params: from `init_params`.
      x, config, gates: as in `attention.apply`, and so are all its other options.

    Returns:
      [..., T, D] in the dtype of x.

    Raises:
      ValueError, TypeError: as `attention.apply`.
    """
    between.check("gated", params, x, config, Params, options)
    gates = options.pop("gates", None)
    between.sized("gated", "w_g", params.w_g, "[N, D, Hv]", (config.num_heads, config.d_model, config.value_width))
    seen, nonfinite = between.look(params.attention, x, config, ("heads",), **options)
    gating = x if nonfinite is None else jnp.where(jnp.all(jnp.isfinite(x), axis=-1, keepdims=True), x, 0)
    opening = jax.nn.sigmoid(precision.einsum("...td,ndh->...nth", gating, params.w_g.astype(x.dtype)))
    return between.combine(params.attention, x, config, seen["heads"] * opening, nonfinite, gates)
