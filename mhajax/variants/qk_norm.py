"""Attention whose queries and keys have unit mean square, times a learned scale, before they are turned.

The logits can then not grow without bound, which keeps large models and high learning rates stable.

References:
  Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2 (layer norm instead of root
  mean square); as here, with one scale for all heads: Qwen Team 2025, "Qwen3 Technical Report", section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array

from mhajax import arguments, attention, checks, norm
from mhajax.masks import as_mask, tokens
from mhajax.options import Options
from mhajax.variants import between

Config = attention.Config


class Params(NamedTuple):
    """The parameters; heads lead. Models with one scale for all heads: `jnp.broadcast_to(scale, (N, H))`."""

    attention: attention.Params
    q_scale: Array  # [N, H]
    k_scale: Array  # [K, H]


def init_params(key: Array, config: Config) -> Params:
    """Those of `attention`, and scales of 1."""
    arguments.init("qk_norm.init_params", key, config, Config)
    ones = [jnp.ones((count, config.width)) for count in (config.num_heads, config.kv_heads)]
    return Params(attention.init_params(key, config), *ones)


@arguments.shown
def apply(
    params: Params,
    x: Array,
    config: Config,
    *,
    epsilon: float = 1e-6,
    **options: Unpack[Options],
) -> Array:
    """Multi-head attention of x to itself, or to `memory`, with normalised queries and keys.

    Args:
      params: from `init_params`.
      x, config, memory, mask, positions, memory_positions: as in `attention.apply`, and so are all its other options.
      rotate: as in `attention.apply`; applied after the normalisation.
      epsilon: added to the mean square.

    Returns:
      [..., T, D] in the dtype of x.

    Raises:
      ValueError, TypeError: as `attention.apply`.
    """
    between.check("qk_norm", params, x, config, Params, options)
    memory, places = options.pop("memory", None), options.pop("memory_positions", None)
    rotate = options.get("rotate")
    checks.stream("x", x, config)
    between.sized("qk_norm", "q_scale", params.q_scale, "[N, H]", (config.num_heads, config.width))
    between.sized("qk_norm", "k_scale", params.k_scale, "[K, H]", (config.kv_heads, config.width))
    mask = options["mask"] = as_mask(options.get("mask"))
    if memory is None:
        memory, places = x, options.get("positions") if places is None else places
    else:
        checks.stream("memory", memory, config)
        checks.same_leading(x, memory)

    def normed(scale: Array) -> Callable[[Array, Array], Array]:
        def prepare(heads: Array, positions: Array) -> Array:
            heads = norm.normalise(norm.Params(scale[:, None], None), heads, epsilon)
            return heads if rotate is None else rotate(heads, positions)

        return prepare

    answers = attention.keys_values(
        params.attention, memory, config,
        positions=places, rotate=normed(params.k_scale),
        masked=mask is not None or options.get("bias") is not None,
    )  # fmt: skip
    return attention.apply_to(
        params.attention, x, answers, config,
        keys=tokens(memory.shape[-2], places), **{**options, "rotate": normed(params.q_scale)},
    )[0]  # fmt: skip
