"""Differential attention: the difference of two softmaxes, so that what both give to everything cancels.

    head_n = (softmax(q₁ k₁ᵀ / √H) − λ_n softmax(q₂ k₂ᵀ / √H)) v
    head_n ← (1 − λ_init) · RMSNorm(head_n),   λ_n = exp(a₁·b₁) − exp(a₂·b₂) + λ_init

The two share the values, so the difference of the weights is the difference of two attentions, on any kernel. The paper
has values of twice the width (`value_dim=2 * head_dim`, with half the heads), and one λ and one scale for all heads;
here every head has its own.

References:
  Ye et al. 2024, "Differential Transformer", section 2.1 (their λ_q1, λ_k1, λ_q2, λ_k2 are our a₁, b₁, a₂, b₂).
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, attention, norm
from mhajax.options import Options
from mhajax.variants import between

Config = attention.Config


class Params(NamedTuple):
    """The parameters; heads lead."""

    attention: attention.Params
    subtracted: attention.Params  # queries and keys of the second softmax; its values and output are the first's
    lambdas: Array  # [N, 4, H]: a₁, b₁, a₂, b₂
    scale: Array  # [N, Hv]


def init_params(key: Array, config: Config) -> Params:
    """Those of `attention` and as many queries and keys again, λ near λ_init, scales of 1."""
    arguments.init("differential.init_params", key, config, Config)
    key_first, key_second, key_lambdas = jax.random.split(key, 3)
    first, second = attention.init_params(key_first, config), attention.init_params(key_second, config)
    lambdas = 0.1 * jax.random.normal(key_lambdas, (config.num_heads, 4, config.width))
    second = second._replace(w_v=None, w_o=None, b_v=None, b_o=None)
    return Params(first, second, lambdas, jnp.ones((config.num_heads, config.value_width)))


def initial_lambda(layer: ArrayLike) -> Array:
    """The paper's λ_init of a layer, 0.8 − 0.6 exp(−0.3 · layer), layers counted from 0; may be traced.

    >>> round(float(initial_lambda(0)), 3), round(float(initial_lambda(11)), 3)
    (0.2, 0.778)
    """
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer))


@arguments.shown
def apply(
    params: Params,
    x: Array,
    config: Config,
    *,
    lambda_init: ArrayLike = 0.8,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> Array:
    """Differential multi-head attention of x to itself, or to `memory`.

    Args:
      params: from `init_params`.
      lambda_init: one number, such as `initial_lambda(layer)`.
      epsilon: added to the mean square of a head's output.
      x, config, gates: as in `attention.apply`, and so are all its other options. Dropout drops the same pairs from
        both softmaxes.

    Returns:
      [..., T, D] in the dtype of x.

    Raises:
      ValueError, TypeError: as `attention.apply`.
    """
    between.check("differential", params, x, config, Params, options)
    gates = options.pop("gates", None)
    n, h, hv = config.num_heads, config.width, config.value_width
    between.sized("differential", "lambdas", params.lambdas, "[N, 4, H]", (n, 4, h))
    between.sized("differential", "scale", params.scale, "[N, Hv]", (n, hv))
    first, second = params.attention, params.subtracted
    second = first._replace(w_q=second.w_q, w_k=second.w_k, b_q=second.b_q, b_k=second.b_k)
    (kept, nonfinite), (subtracted, also) = (
        between.look(one, x, config, ("heads",), **options) for one in (first, second)
    )
    a1, b1, a2, b2 = jnp.moveaxis(params.lambdas, 1, 0)  # [N, H]
    factor = jnp.exp(jnp.sum(a1 * b1, axis=-1)) - jnp.exp(jnp.sum(a2 * b2, axis=-1)) + lambda_init
    wide = jnp.promote_types(x.dtype, jnp.float32)
    heads = kept["heads"].astype(wide) - factor[:, None, None] * subtracted["heads"]
    heads = norm.normalise(norm.Params(params.scale[:, None], None), heads, epsilon) * (1 - lambda_init)
    if nonfinite is not None and also is not None:
        nonfinite = nonfinite | also
    return between.combine(first, x, config, heads, nonfinite, gates)
