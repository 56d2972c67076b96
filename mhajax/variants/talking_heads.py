"""Talking-heads attention: logits are mixed between heads before the softmax, and weights after it.

    logits_n ← Σ_m before[n, m] logits_m,   weights_n ← Σ_m after[n, m] weights_m

A mix needs the logits of all heads at once, so memory is N · T · S. A head that is cut out has a row and a column in
both matrices.

References:
  Shazeer et al. 2020, "Talking-Heads Attention", section 4 (their P_l and P_w, all three numbers of heads our N).
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments, attention, checks, dropout
from mhajax.options import Options
from mhajax.variants import between

Config = attention.Config


class Params(NamedTuple):
    """The parameters; heads lead."""

    attention: attention.Params
    before: Array  # [N, N]: to this head's logits, from every head's
    after: Array  # [N, N]: to this head's weights, from every head's


def init_params(key: Array, config: Config) -> Params:
    """Those of `attention`, and heads that do not talk yet: both matrices are the identity."""
    arguments.init("talking_heads.init_params", key, config, Config)
    return Params(attention.init_params(key, config), jnp.eye(config.num_heads), jnp.eye(config.num_heads))


@arguments.shown
def apply(
    params: Params,
    x: Array,
    config: Config,
    **options: Unpack[Options],
) -> Array:
    """Talking-heads attention of x to itself, or to `memory`.

    Masks are best shared by all heads. Where heads have masks of their own, the logit of a hidden pair adds nothing to
    the mixes of others and a hidden pair has no weight; but how others share out their weights, which are mixed into a
    head's, depends on what *they* may see.

    Args:
      params: from `init_params`.
      dropout_rate, dropout_key: as in `attention.apply`, of the mixed weights.
      x, config, gates: as in `attention.apply`, and so are all its other options; `kernel` can be "dense" only.

    Returns:
      [..., T, D] in the dtype of x.

    Raises:
      ValueError, TypeError: as `attention.apply`, and for another kernel.
    """
    between.check("talking_heads", params, x, config, Params, options)
    gates, dropout_rate = options.pop("gates", None), options.pop("dropout_rate", 0.0)
    dropout_key = options.pop("dropout_key", None)
    checks.dropped(dropout_rate, dropout_key)
    for name, matrix in (("before", params.before), ("after", params.after)):
        between.sized("talking_heads", name, matrix, "[N, N]", (config.num_heads, config.num_heads))
    pairs = between.pairs("talking_heads", params.attention, x, config, **options)
    mixed = lambda matrix, a: jnp.einsum("nm,...mts->...nts", matrix.astype(a.dtype), a)  # noqa: E731
    logits = jnp.where(pairs.allowed, mixed(params.before, pairs.logits), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    weights = jnp.where(pairs.allowed, mixed(params.after, weights), 0)
    heads = between.weigh(dropout.dropout(weights, dropout_rate, dropout_key), pairs.values)
    return between.combine(params.attention, x, config, heads, pairs.nonfinite, gates)
