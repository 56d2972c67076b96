"""Sigmoid attention: every pair has a weight of its own, and the weights of a query need not sum to 1.

    head_n = σ(q kᵀ / √H + offset) v,   offset = −log S

With the offset the weights sum to about 1 at the start. All logits are held: memory is N · T · S.

References:
  Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", section 3 (their b).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, attention, checks, dropout
from mhajax.options import Options
from mhajax.variants import between

Config = attention.Config


class Params(NamedTuple):
    """The parameters, those of `attention`."""

    attention: attention.Params


def init_params(key: Array, config: Config) -> Params:
    """Those of `attention`."""
    arguments.init("sigmoid.init_params", key, config, Config)
    return Params(attention.init_params(key, config))


@arguments.shown
def apply(
    params: Params,
    x: Array,
    config: Config,
    *,
    offset: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Array:
    """Sigmoid attention of x to itself, or to `memory`. A query with nothing to attend to gives zeros.

    Args:
      params: from `init_params`.
      offset: added to the logits, one number, or one for every head [N]; −log S if None. S counts keys that are hidden
        and padding too, so give one number where that should not change the output.
      dropout_rate, dropout_key: as in `attention.apply`.
      x, config, gates: as in `attention.apply`, and so are all its other options; `kernel` can be "dense" only.

    Returns:
      [..., T, D] in the dtype of x.

    Raises:
      ValueError, TypeError: as `attention.apply`, and for another kernel, or an offset of another shape.
    """
    between.check("sigmoid", params, x, config, Params, options)
    gates, dropout_rate = options.pop("gates", None), options.pop("dropout_rate", 0.0)
    dropout_key = options.pop("dropout_key", None)
    checks.dropped(dropout_rate, dropout_key)
    if offset is not None and jnp.shape(offset) not in ((), (config.num_heads,)):
        raise ValueError(
            f"sigmoid.apply: offset must be one number or [N] = ({config.num_heads},), got {jnp.shape(offset)}."
        )
    pairs = between.pairs("sigmoid", params.attention, x, config, **options)
    offset = jnp.asarray(-math.log(pairs.logits.shape[-1]) if offset is None else offset, pairs.logits.dtype)
    weights = jnp.where(pairs.allowed, jax.nn.sigmoid(pairs.logits + offset[..., None, None]), 0)
    heads = between.weigh(dropout.dropout(weights, dropout_rate, dropout_key), pairs.values)
    return between.combine(params.attention, x, config, heads, pairs.nonfinite, gates)
