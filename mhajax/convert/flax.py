"""Flax: the same names in Linen and NNX, and kernels in which the heads are an axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhajax.attention import Config, Params
from mhajax.convert import layout

WEIGHTS = {
    "query.kernel": "[D, N, H]",
    "key.kernel": "[D, K, H]",
    "value.kernel": "[D, K, H]",
    "out.kernel": "[N, H, D]",
}
BIASES = {"query.bias": "[N, H]", "key.bias": "[K, H]", "value.bias": "[K, H]", "out.bias": "[D]"}


def from_linen(tree: Mapping[str, Any]) -> tuple[Params, Config]:
    """Parameters of `flax.linen.MultiHeadDotProductAttention`.

    Args:
      tree: {"query": {"kernel", "bias"}, "key", "value", "out"}, the layer's part of variables["params"].

    Returns:
      Our parameters, and their config, which follows from the shapes.

    Raises:
      ValueError: for names that are missing or unknown (those of `normalize_qk` among them), for sizes that our
        attention does not have, such as `out_features` other than the width of the input.

    >>> import numpy as np
    >>> kernels = {name: {"kernel": np.ones((16, 2, 5))} for name in ("query", "key", "value")}
    >>> params, config = from_linen({**kernels, "out": {"kernel": np.ones((2, 5, 16))}})
    >>> params.w_q.shape, config.head_dim, config.use_bias
    ((2, 16, 5), 5, False)
    """
    return _from_kernels("convert.from_linen", tree)


def to_linen(params: Params, config: Config) -> dict[str, dict[str, Any]]:
    """Parameters for `flax.linen.MultiHeadDotProductAttention(num_heads=N, qkv_features=N·H, use_bias=…)`.

        layer.apply({"params": convert.to_linen(params, config)}, x)

    Args:
      params: our parameters.
      config: their config.

    Returns:
      {"query": {"kernel", "bias"}, "key", "value", "out"}, without "bias" if the config has none.

    Raises:
      ValueError: for num_kv_heads and value_dim, which the layer does not have, and for params of another config.
    """
    who = "convert.to_linen"
    layout.refuse_groups(who, config)
    return _to_kernels(who, params, config)


def from_nnx(state: Mapping[str, Any]) -> tuple[Params, Config]:
    """Parameters of `flax.nnx.MultiHeadAttention`.

        params, config = convert.from_nnx(nnx.state(module, nnx.Param))

    Args:
      state: {"query": {"kernel", "bias"}, "key", "value", "out"}: the State, or a pure dict of it.

    Returns:
      Our parameters, and their config, which follows from the shapes.

    Raises:
      ValueError: for names that are missing or unknown (those of `normalize_qk` among them; rngs and caches are not
        parameters), for sizes that our attention does not have, such as `in_kv_features` other than `in_features`.
    """
    return _from_kernels("convert.from_nnx", state)


def to_nnx(params: Params, config: Config) -> dict[str, dict[str, Any]]:
    """Parameters for `flax.nnx.MultiHeadAttention(num_heads=N, num_kv_heads=K, in_features=D, qkv_features=N·H, …)`.

        state = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(state, convert.to_nnx(params, config))
        nnx.update(module, state)

    Args:
      params: our parameters.
      config: their config.

    Returns:
      {"query": {"kernel", "bias"}, "key", "value", "out"}, without "bias" if the config has none.

    Raises:
      ValueError: for value_dim, which the layer does not have, and for params of another config.
    """
    return _to_kernels("convert.to_nnx", params, config)


def _from_kernels(who: str, tree: Mapping[str, Any]) -> tuple[Params, Config]:
    found = layout.leaves(tree)
    norms = sorted(name for name in found if name.split(".")[0] in ("query_ln", "key_ln"))
    if norms:
        raise ValueError(
            f"{who}: {', '.join(norms)} are the scales of normalize_qk, which are not part of attention.Params; they "
            "belong to the function that normalises queries and keys after their projection. Without it the attention "
            "is another one, so it is not converted; take them out of the tree only if you apply them yourself."
        )
    weights, biases = layout.read(who, found, WEIGHTS, BIASES)
    params = Params(*[*(w.transpose(1, 0, 2) for w in weights[:3]), weights[3], *biases])
    return params, layout.config_of(who, params)


def _to_kernels(who: str, params: Params, config: Config) -> dict[str, dict[str, Any]]:
    layout.refuse_value_dim(who, config)
    params = layout.checked(who, params, config)
    kernels = [*(w.transpose(1, 0, 2) for w in params[:3]), params.w_o]
    return layout.nest([*WEIGHTS, *BIASES], [*kernels, *params[4:]])
