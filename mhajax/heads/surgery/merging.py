"""Fewer heads, or fewer key heads, that do what there was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import attention
from mhajax.attentions import PerAttention
from mhajax.heads.surgery import parts, pruning
from mhajax.heads.surgery.parts import Config, Model

Sets = Sequence[Sequence[int]]


class Lost(NamedTuple):
    """What a set of heads of an attention [N, …] lost when it was made one head, relative to what there was."""

    attention: str  # name of the attention as in the gates, "" for a single one
    layer: tuple[int, ...]  # place in its leading axes, () for a single one
    heads: tuple[int, ...]
    pattern: float  # largest ‖query-key circuit - that of the head that stays‖ / ‖that of the head that stays‖
    value: float  # ‖what the truncation took from the summed value-output circuit‖ / ‖the sum‖


def merge(params: Model, config: Config, sets: Any) -> tuple[Model, Config, list[Lost]]:
    """One head in place of each set of heads that do (almost) the same.

    The head of a set that writes most, by ‖w_v w_o‖, stays with its queries and keys. Its values and output become
    those of the sum of the set's value-output circuits Σ w_v[n] w_o[n] (biases included), cut to rank Hv by a singular
    value decomposition. Exact if the heads look at the same places and the sum has rank Hv, as for duplicates. The
    patterns of rotated heads are not their circuits' alone: there `Lost.pattern` is 0 for duplicates, else a hint.

    Args:
      params: of an attention, a layer, a stack or a model.
      config: its shape.
      sets: heads that become one, such as [(0, 3), (4, 5, 6)], for an attention; no head twice, the others stay as
        they are. In the form of the gates for a model, a list of them for every layer:
        PerAttention(attention=[[(0, 3)], []]).

    Returns:
      Parameters and config, as pruned by `prune`, but with a key head for every head (K = N), and what every set lost.

    Raises:
      ValueError: for heads that do not exist, sets of less than two, a head in two sets, not as many lists as layers.

    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> params = attention.init_params(jax.random.key(0), config)
    >>> twice = jax.tree.map(lambda w: w.at[3].set(w[0]), params)
    >>> merged, config, lost = merge(twice, config, [(0, 3)])
    >>> merged.w_v.shape, lost[0].pattern < 1e-6, lost[0].value < 1e-6
    ((3, 16, 4), True, True)
    """
    found = parts.attentions("merge", params)
    parts.belong("merge", found, config)
    shared = np.arange(config.num_heads) // (config.num_heads // config.kv_heads)
    for name, one in found.items():
        queries, keys = (np.broadcast_to(h, one.w_q.shape[:-2]) for h in (np.arange(config.num_heads), shared))
        found[name] = parts.taken(one, queries, keys)
    config = dataclasses.replace(config, num_kv_heads=config.num_heads)
    keep, lost = {}, []
    for name, given in parts.asked("merge", "sets", found, sets).items():
        one = found[name]
        keep[name] = np.ones(one.w_q.shape[:-2], bool)
        arrays = jax.tree.map(lambda w: np.array(w, np.float64), one)
        for layer in np.ndindex(one.w_q.shape[:-3]):
            of_layer = jax.tree.map(lambda w: w[layer], arrays)  # noqa: B023 - views, written in place
            for heads in _checked(name, given, layer, one):
                stays, pattern, value = _merged(of_layer, heads)
                keep[name][layer][[head for head in heads if head != stays]] = False
                lost.append(Lost(name, layer, heads, pattern, value))
        found[name] = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), arrays, one)
    whole = keep.get("", None) if "" in found else PerAttention(**keep)
    return *pruning.prune(parts.replaced(params, found), config, whole), lost


def group_kv(params: Model, config: Config, num_kv_heads: int) -> tuple[Model, Config]:
    """Fewer key and value heads, each the mean of neighbouring ones: where training of grouped heads can start from.

    Exact if the heads that become one are equal; else train on. `permute` first to make neighbours of heads that belong
    together.

    Args:
      params: of an attention, a layer, a stack or a model.
      config: its shape.
      num_kv_heads: the new K, a divisor of the old one.

    Raises:
      ValueError: if num_kv_heads does not divide K.

    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> params, config = group_kv(attention.init_params(jax.random.key(0), config), config, 2)
    >>> params.w_q.shape, params.w_k.shape, config.kv_heads
    ((4, 16, 4), (2, 16, 4), 2)

    References:
      Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
      section 2.1.
    """
    if num_kv_heads < 1 or config.kv_heads % num_kv_heads:
        raise ValueError(
            f"surgery.group_kv: num_kv_heads must divide K={config.kv_heads}, the heads of keys and values that are "
            f"there, got {num_kv_heads}."
        )
    found = parts.attentions("group_kv", params)
    parts.belong("group_kv", found, config)

    def pooled(w: Array, heads: int) -> Array:  # heads: the axis
        return jnp.mean(w.reshape(*w.shape[:heads], num_kv_heads, -1, *w.shape[heads + 1 :]), axis=heads + 1)

    grouped = {}
    for name, one in found.items():
        old = {field: getattr(one, field) for field in ("w_k", "w_v", "b_k", "b_v")}
        axis = one.w_k.ndim - 3
        grouped[name] = one._replace(**{f: pooled(jnp.asarray(w), axis) for f, w in old.items() if w is not None})
    return parts.replaced(params, grouped), dataclasses.replace(config, num_kv_heads=num_kv_heads)


def _checked(name: str, given: Any, layer: tuple[int, ...], one: attention.Params) -> list[tuple[int, ...]]:
    """The sets of heads of a layer."""
    num_heads, what = one.w_q.shape[-3], f"sets{parts.of(name)}"
    for place, layers in zip(layer, one.w_q.shape[:-3], strict=True):
        if len(given) != layers:
            raise ValueError(f"surgery.merge: {what} must have a list for each of {layers} layers, got {len(given)}.")
        given = given[place]
    sets = [tuple(int(head) for head in heads) for heads in given]
    named = [head for heads in sets for head in heads]
    outside = [head for head in named if not 0 <= head < num_heads]
    if outside or len(set(named)) < len(named) or any(len(heads) < 2 for heads in sets):
        raise ValueError(
            f"surgery.merge: {what} must be sets of two or more of the heads 0 … {num_heads - 1}, none of them twice, "
            f"got {sets}."
        )
    return sets


def _merged(one: Any, heads: tuple[int, ...]) -> tuple[int, float, float]:
    """Write the sum of some heads into one of them, in place: which one, and what was lost."""
    q, k, v = ({n: _circuit(w, b, n) for n in heads} for w, b in zip(one[:3], one[4:7], strict=True))
    writes = {n: v[n] @ one.w_o[n] for n in heads}  # [D, D], or [D + 1, D]
    stays = max(heads, key=lambda n: np.linalg.norm(writes[n]))
    looks = q[stays] @ k[stays].T
    pattern = _share(max(np.linalg.norm(q[n] @ k[n].T - looks) for n in heads), np.linalg.norm(looks))
    left, sizes, right = np.linalg.svd(sum(writes.values()), full_matrices=False)
    width = one.w_o.shape[-2]
    rank = min(width, len(sizes))
    fill = [(0, 0), (0, width - rank)]  # Hv may be more than D
    values = np.pad(left[:, :rank] * sizes[:rank] ** 0.5, fill)
    one.w_o[stays] = np.pad(sizes[:rank, None] ** 0.5 * right[:rank], fill[::-1])
    one.w_v[stays] = values[: one.w_v.shape[-2]]
    if one.b_v is not None:
        one.b_v[stays] = values[-1]
    return stays, pattern, _share(np.linalg.norm(sizes[rank:]), np.linalg.norm(sizes))


def _circuit(w: np.ndarray, b: np.ndarray | None, head: int) -> np.ndarray:
    """A head's linear map, [D, H]; with its bias as a last row, for inputs with a last entry of 1."""
    return w[head] if b is None else np.concatenate([w[head], b[head, None]])


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0
