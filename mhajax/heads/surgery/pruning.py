"""Heads cut out."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mhajax import attention
from mhajax.attentions import PerAttention
from mhajax.heads.surgery import parts
from mhajax.heads.surgery.parts import Attentions, Config, Model


class Places(NamedTuple):
    """The old head in each new place, -1 for a head of zeros."""

    queries: np.ndarray  # [..., N]
    keys: np.ndarray  # [..., K]


def prune(params: Model, config: Config, keep: Any) -> tuple[Model, Config]:
    """Parameters without the heads that are not kept, and their shape: what gates of 0 compute, smaller and faster.

    Layers that are stacked, and attentions that share a config, have one shape. So N becomes the largest number of
    heads that any of them keeps; the others have heads of zeros in the places that are left, which add exactly nothing.
    At least one place stays, so an attention can lose all its heads: it then gives its bias b_o, or zeros.

    Key heads that nobody asks any more go too. Where heads that share a key head (K < N) lose different numbers, the
    groups are cut to the size that needs fewest weights: key heads are repeated for a group that is cut, and groups
    that are not full are filled with queries of zeros. So the result has never more weights than before. (A query of
    zeros whose key head is in use can come alive if the model is trained on; other heads of zeros cannot.)

    Args:
      params: of an attention, a layer, a stack or a model.
      config: its shape.
      keep: bool [..., N] for every attention, in the form of the gates; for a single attention also a list of heads.

    Returns:
      The parameters, and the config with num_heads, num_kv_heads, head_dim and value_dim set. Kept heads stay in order.

    Raises:
      ValueError: for shapes that do not fit, heads that do not exist or are named twice.
      TypeError: for what is neither bool nor, for one attention, integers.

    >>> import jax
    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> params, config = prune(attention.init_params(jax.random.key(0), config), config, [0, 3])
    >>> params.w_q.shape, config.num_heads, config.width
    ((2, 16, 4), 2, 4)

    References:
      Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4. Voita et al. 2019, "Analyzing
      Multi-Head Self-Attention", section 6.
    """
    found = parts.attentions("prune", params)
    arranged = _arranged("prune", found, config, keep)
    first = next(iter(arranged.values()))
    smaller = dataclasses.replace(
        config,
        num_heads=first.queries.shape[-1], num_kv_heads=first.keys.shape[-1],
        head_dim=config.width, value_dim=config.value_width,
    )  # fmt: skip
    return parts.replaced(params, {name: parts.taken(found[name], *where) for name, where in arranged.items()}), smaller


def places(params: Any, config: attention.Config, keep: Any) -> Any:
    """Which old head stands in each place after `prune`: integers [..., N] in the form of `keep`, -1 for zeros.

    >>> import jax
    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> places(attention.init_params(jax.random.key(0), config), config, [3, 1])
    array([1, 3])
    """
    arranged = _arranged("places", parts.attentions("places", params), config, keep)
    queries = {name: where.queries for name, where in arranged.items()}
    return queries[""] if "" in queries else PerAttention(**queries)


def _arranged(who: str, found: Attentions, config: attention.Config, keep: Any) -> dict[str, Places]:
    """Where every head goes, one N and one K for all attentions."""
    parts.belong(who, found, config)
    asked = parts.asked(who, "keep", found, keep)
    kept = {
        name: parts.chosen(who, f"keep{parts.of(name)}", asked[name], one)
        if name in asked
        else np.ones(one.w_q.shape[:-2], bool)
        for name, one in found.items()
    }
    size = config.num_heads // config.kv_heads
    groups = {name: heads.reshape(*heads.shape[:-1], config.kv_heads, size) for name, heads in kept.items()}
    counts = np.concatenate([heads.sum(-1).reshape(-1, config.kv_heads) for heads in groups.values()])
    needed = [max(1, int((-(-counts // new)).sum(-1).max())) for new in range(1, size + 1)]  # key heads, for each size
    # A key head has as many weights as a query head; of equals, fewer query heads are less work.
    num_keys, new = min(
        zip(needed, range(1, size + 1), strict=True), key=lambda kg: (kg[0] * (1 + kg[1]), kg[0] * kg[1])
    )
    return {name: _placed(heads, num_keys, new) for name, heads in groups.items()}


def _placed(kept: np.ndarray, num_keys: int, size: int) -> Places:
    """Heads [..., K, N/K] put into `num_keys` groups of `size`."""
    leading = kept.shape[:-2]
    queries, keys = np.full((*leading, num_keys, size), -1), np.full((*leading, num_keys), -1)
    for where in np.ndindex(leading):
        group = 0
        for key, heads in enumerate(kept[where]):
            mine = key * len(heads) + np.flatnonzero(heads)
            for part in np.split(mine, range(size, len(mine), size)) if len(mine) else ():
                queries[*where, group, : len(part)], keys[*where, group] = part, key
                group += 1
    return Places(queries.reshape(*leading, num_keys * size), keys)
