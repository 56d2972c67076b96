"""Haiku: matrices [in, out] with the heads side by side in the columns, in modules that are named by their path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhajax.attention import Config, Params
from mhajax.convert import layout

WEIGHTS = {"query/w": "[D, N·H]", "key/w": "[D, N·H]", "value/w": "[D, N·Hv]", "linear/w": "[N·Hv, D]"}
BIASES = {"query/b": "[N·H]", "key/b": "[N·H]", "value/b": "[N·Hv]", "linear/b": "[D]"}


def from_haiku(
    params: Mapping[str, Any], *, num_heads: int, name: str = "multi_head_attention"
) -> tuple[Params, Config]:
    """Parameters of `haiku.MultiHeadAttention`.

    Args:
      params: {"multi_head_attention/query": {"w", "b"}, …/key, …/value, …/linear}; the parameters of a whole model will
        do.
      num_heads: N, which the shapes do not tell.
      name: the path of the module, such as "transformer/attention"; what is not below it is left alone.

    Returns:
      Our parameters, and their config.

    Raises:
      ValueError: for names that are missing or unknown, for sizes that our attention does not have, such as
        `model_size` other than the width of the input.

    >>> import numpy as np
    >>> linear = lambda rows, columns: {"w": np.ones((rows, columns)), "b": np.zeros(columns)}
    >>> tree = {"layer/query": linear(16, 6), "layer/key": linear(16, 6)}
    >>> tree |= {"layer/value": linear(16, 10), "layer/linear": linear(10, 16)}
    >>> params, config = from_haiku(tree, num_heads=2, name="layer")
    >>> params.w_v.shape, config.head_dim, config.value_dim
    ((2, 16, 5), 3, 5)
    """
    who = "convert.from_haiku"
    found = layout.under(who, layout.leaves(params, "/"), f"{name}/")
    return layout.from_matrices(who, *layout.read(who, found, WEIGHTS, BIASES), num_heads)


def to_haiku(params: Params, config: Config, *, name: str = "multi_head_attention") -> dict[str, dict[str, Any]]:
    """Parameters for `haiku.MultiHeadAttention(N, H, value_size=Hv, model_size=D, with_bias=…, w_init=…)`.

        model_params = {**model_params, **convert.to_haiku(params, config, name="transformer/attention")}

    Args:
      params: our parameters.
      config: their config.
      name: the path of the module.

    Returns:
      {"multi_head_attention/query": {"w", "b"}, …/key, …/value, …/linear}, without "b" if the config has no biases.

    Raises:
      ValueError: for num_kv_heads, which the layer does not have, and for params of another config.
    """
    who = "convert.to_haiku"
    layout.refuse_groups(who, config)
    weights, biases = layout.to_matrices(layout.checked(who, params, config))
    return layout.nest([f"{name}/{leaf}" for leaf in (*WEIGHTS, *BIASES)], [*weights, *biases], "/")
