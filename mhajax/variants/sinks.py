"""Attention with sinks: every head has one more key to look at, with a learned logit and a value of 0.

References: see `scores.with_sinks`.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array

from mhajax import arguments, attention, scores
from mhajax.options import Options
from mhajax.variants import between

Config = attention.Config


class Params(NamedTuple):
    """The parameters; heads lead."""

    attention: attention.Params
    sinks: Array  # [N], logits


def init_params(key: Array, config: Config) -> Params:
    """Those of `attention`, and sinks of 0: 1 is added to the sum of every softmax."""
    arguments.init("sinks.init_params", key, config, Config)
    return Params(attention.init_params(key, config), jnp.zeros(config.num_heads))


@arguments.shown
def apply(params: Params, x: Array, config: Config, **options: Unpack[Options]) -> Array:
    """Multi-head attention of x to itself, or to `memory`, with a sink for every head.

    Args:
      params: from `init_params`.
      x, config, gates: as in `attention.apply`, and so are all its other options.

    Returns:
      [..., T, D] in the dtype of x.

    Raises:
      ValueError, TypeError: as `attention.apply`.
    """
    between.check("sinks", params, x, config, Params, options)
    gates = options.pop("gates", None)
    seen, nonfinite = between.look(params.attention, x, config, ("heads", "log_sum_exp"), **options)
    heads = scores.with_sinks(seen["heads"], seen["log_sum_exp"], params.sinks)
    return between.combine(params.attention, x, config, heads, nonfinite, gates)
