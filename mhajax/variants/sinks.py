"""Attention with sinks: every head has one more key to look at, with a learned logit and a value of 0.

References: see `scores.with_sinks`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from mhajax import attention, scores
from mhajax.variants import between

Config = attention.Config


class Params(NamedTuple):
    """The parameters; heads lead."""

    attention: attention.Params
    sinks: Array  # [N], logits


def init_params(key: Array, config: Config) -> Params:
    """Those of `attention`, and sinks of 0: 1 is added to the sum of every softmax."""
    return Params(attention.init_params(key, config), jnp.zeros(config.num_heads))


def apply(params: Params, x: Array, config: Config, *, gates: Array | None = None, **options: Any) -> Array:
    """Multi-head attention of x to itself, or to `memory`, with a sink for every head.

    Args:
      params: from `init_params`.
      x, config, gates: as in `attention.apply`, and so are all its other options.

    Returns:
      [..., T, D] in the dtype of x.

    Raises:
      ValueError, TypeError: as `attention.apply`.
    """
    seen, spoilt = between.look(params.attention, x, config, ("heads", "log_sum_exp"), **options)
    heads = scores.with_sinks(seen["heads"], seen["log_sum_exp"], params.sinks)
    return between.combine(params.attention, x, config, heads, spoilt, gates)
