"""Equinox: matrices [out, in] with the heads side by side in the rows, and a bias for each projection or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mhajax.attention import Config, Params
from mhajax.convert import layout

PROJECTIONS = ("query_proj", "key_proj", "value_proj", "output_proj")
WEIGHTS = dict(
    zip((f"{name}.weight" for name in PROJECTIONS), ("[N·H, D]", "[N·H, D]", "[N·Hv, D]", "[D, N·Hv]"), strict=True)
)
BIASES = dict(zip((f"{name}.bias" for name in PROJECTIONS), ("[N·H]", "[N·H]", "[N·Hv]", "[D]"), strict=True))


def from_equinox(module: Any, *, num_heads: int | None = None) -> tuple[Params, Config]:
    """Parameters of `equinox.nn.MultiheadAttention`.

    Args:
      module: the module itself, or a dict {"query_proj": {"weight", "bias"}, "key_proj", "value_proj", "output_proj"}.
      num_heads: N, which the shapes do not tell; None: the module's own.

    Returns:
      Our parameters, and their config. If only some of the projections have a bias, the others get zeros.

    Raises:
      ValueError: for names that are missing or unknown, for a num_heads that is not the module's, for sizes that our
        attention does not have, such as `key_size` other than `query_size`.

    >>> import numpy as np
    >>> tree = {name: {"weight": np.ones((16, 16))} for name in PROJECTIONS}
    >>> params, config = from_equinox(tree, num_heads=2)
    >>> params.w_q.shape, config
    ((2, 16, 8), Config(d_model=16, num_heads=2, num_kv_heads=None, head_dim=None, value_dim=None, use_bias=False))
    """
    who = "convert.from_equinox"
    if isinstance(module, Mapping):
        found = layout.leaves(module)
    else:
        leaf = lambda name: getattr(getattr(module, name.split(".")[0], None), name.split(".")[1], None)  # noqa: E731
        found = {name: leaf(name) for name in (*WEIGHTS, *BIASES) if leaf(name) is not None}
    weights, biases = layout.read(who, found, WEIGHTS, BIASES, some=True)
    if any(bias is not None for bias in biases):
        biases = [np.zeros(len(w), w.dtype) if b is None else b for w, b in zip(weights, biases, strict=True)]
    heads = layout.heads_of(who, module, num_heads)
    return layout.from_matrices(who, [w.T for w in weights], biases, heads)


def to_equinox(params: Params, config: Config) -> dict[str, dict[str, Any]]:
    """Parameters for `equinox.nn.MultiheadAttention(N, D, qk_size=H, vo_size=Hv, use_query_bias=…, …)`.

        for name, new in convert.to_equinox(params, config).items():
            where = lambda m: (getattr(m, name).weight, getattr(m, name).bias)
            new = (new["weight"], new.get("bias"))
            module = eqx.tree_at(where, module, new, is_leaf=lambda leaf: leaf is None)

    Args:
      params: our parameters.
      config: their config.

    Returns:
      {"query_proj": {"weight", "bias"}, "key_proj", "value_proj", "output_proj"}: a bias for each of them, or for none,
      as the config says.

    Raises:
      ValueError: for num_kv_heads, which the layer does not have, and for params of another config.
    """
    who = "convert.to_equinox"
    layout.refuse_groups(who, config)
    weights, biases = layout.to_matrices(layout.checked(who, params, config))
    return layout.nest([*WEIGHTS, *BIASES], [*(w.T for w in weights), *biases])
