"""One layer: attention, attention to a memory if there is one, feed-forward; each normalised and added to x.

Where the normalisation stands is the config's, `placement`:

    pre        x + part(norm(x))
    post       norm(x + part(x))
    parallel   x + attention(norm(x)) + feed-forward(another norm(x))

References:
  post: Vaswani et al. 2017, section 3.1. pre: Xiong et al. 2020, "On Layer Normalization in the Transformer
  Architecture". parallel: Wang & Komatsuzaki 2021, "GPT-J-6B"; Black et al. 2022, "GPT-NeoX-20B", section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import jax
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, attention, mlp, norm
from mhajax import attentions as per_attention
from mhajax import cache as caches
from mhajax.attention import KeysValues
from mhajax.attentions import PerAttention
from mhajax.cache import Cache
from mhajax.dropout import check_rate, dropout
from mhajax.interventions import Capture, Intervention, as_capture
from mhajax.kernels import Path
from mhajax.masks import Mask

Placement = Literal["pre", "post", "parallel"]
NAMES = ("attention", "cross")  # of the attentions of a layer: to x, and to a memory
Captures = Sequence[str] | Capture | Mapping[str, Sequence[str] | Capture]


@dataclass(frozen=True, kw_only=True)
class Config(attention.Config, mlp.Config, norm.Config):
    """A layer: an attention's shape and a feed-forward network's, and what joins them.

    Attributes:
      placement: where x is normalised, "pre", "post" or "parallel".
      dropout: rate at which each part's output is dropped before it is added.
      attention_dropout: rate at which attention weights are dropped.
    """

    placement: Placement = "pre"
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        attention.Config.__post_init__(self)
        mlp.Config.__post_init__(self)
        norm.Config.__post_init__(self)
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement must be one of {', '.join(get_args(Placement))}, got {self.placement!r}.")
        check_rate("block.Config", "dropout", self.dropout)
        check_rate("block.Config", "attention_dropout", self.attention_dropout)


class Params(NamedTuple):
    """The parameters of the parts; the two of cross attention are None in a layer without memory."""

    attention_norm: norm.Params
    attention: attention.Params
    cross_norm: norm.Params | None
    cross: attention.Params | None
    mlp_norm: norm.Params
    mlp: mlp.Params


class CommonOptions(TypedDict, total=False):
    """The keywords of a layer that those of a stack and of a language model are too; what they are, `run` says."""

    mask: Mask | ArrayLike | None
    score: Callable[[Any, Any, Any, Any], Any] | None
    gates: Mapping[str, ArrayLike | None] | None
    interventions: Mapping[str, Intervention] | None
    kernel: str | Path
    dropout_key: Array | None


class ModelOptions(CommonOptions, total=False):
    """The keywords of the models here; each takes those that its own `apply` names, and refuses the others."""

    positions: Array | None
    types: Array | None
    source_lengths: Array | None


class Options(CommonOptions, total=False):
    """All keywords of `apply`."""

    memory: Array | KeysValues | None
    memory_mask: Mask | ArrayLike | None
    positions: Array | None
    rotate: Callable[[Array, Array], Array] | None
    real: Array | None


def init_params(key: Array, config: Config, *, cross: bool = False) -> Params:
    """Parameters of a layer; `cross` adds attention to a memory."""
    arguments.init("block.init_params", key, config, Config)
    key_attention, key_cross, key_mlp = jax.random.split(key, 3)
    new_norm = partial(norm.init_params, None, config)
    return Params(
        new_norm(),
        attention.init_params(key_attention, config),
        new_norm() if cross else None,
        attention.init_params(key_cross, config) if cross else None,
        new_norm(),
        mlp.init_params(key_mlp, config),
    )


def attentions(params: Params) -> dict[str, attention.Params]:
    """As `attention.attentions`: "attention" and, where there is one, "cross"."""
    found = {"attention": params.attention, "cross": params.cross}
    return {name: one for name, one in found.items() if one is not None}


def with_attentions(params: Params, changed: dict[str, attention.Params]) -> Params:
    """The parameters with some attentions replaced."""
    return params._replace(**changed)


@arguments.shown
def apply(params: Params, x: Array, config: Config, **options: Unpack[Options]) -> Array:
    """One layer, [..., T, D] to [..., T, D]. The options are those of `run`, which also takes a cache and captures."""
    instead = dict.fromkeys(("cache", "capture"), "write block.run, which returns it")
    arguments.named("block.apply", options, Options, **instead)
    return run(params, x, config, **options)[0]


def run(
    params: Params,
    x: Array,
    config: Config,
    *,
    memory: Array | KeysValues | None = None,
    mask: Mask | ArrayLike | None = None,
    memory_mask: Mask | ArrayLike | None = None,
    score: Callable[[Any, Any, Any, Any], Any] | None = None,
    positions: Array | None = None,
    rotate: Callable[[Array, Array], Array] | None = None,
    gates: Mapping[str, ArrayLike | None] | None = None,
    interventions: Mapping[str, Intervention] | None = None,
    cache: Cache | None = None,
    real: Array | None = None,
    capture: Captures = (),
    kernel: str | Path = "auto",
    dropout_key: Array | None = None,
) -> tuple[Array, Cache | None, PerAttention[dict[str, Array]]]:
    """One layer, with its new cache and what was captured.

    Args:
      params: from `init_params`.
      x: [..., T, D].
      config: the shape; static under jit.
      memory: [..., S, D], or its keys and values; needs parameters with cross attention.
      mask: for the attention to x (and to the cache).
      memory_mask: for the attention to the memory.
      score: of the attention to x, as in `attention.apply`.
      positions: [T] or [..., T].
      rotate: for queries and keys of the attention to x; a memory is not rotated.
      gates: `PerAttention` of factors of the heads' outputs, [N], [..., N] or [..., N, T]; attention and cross.
      interventions: `PerAttention` of what else is changed in the heads.
      cache: keys and values of earlier tokens; x is appended and attends to all of it. It knows the positions.
      real: bool [..., T], False for padding: "column_sums" do not count it, and a cache does not keep it, as in
        `cache.extend`. It masks nothing. None: as in `attention.apply`.
      capture: names of `attention.CAPTURES`, or a Capture, of both attentions; or a `PerAttention` of them.
      kernel: of both attentions, as in `attention.apply`.
      dropout_key: PRNG key; None is evaluation.

    Returns:
      [..., T, D], the cache with x appended (None without a cache), and the captured arrays of each attention.

    Raises:
      TypeError, ValueError: for gates, interventions and captures that do not say for which attention they are, or for
        one that is not there; for a memory without cross attention, or the reverse; else as `attention.apply`.
    """
    arguments.order("block.apply(params, x, config)", params, config, Params, Config, x=x)
    names = tuple(attentions(params))
    gates, interventions = changes("block.apply", gates, interventions, names)
    if (memory is None) != (params.cross is None):
        raise ValueError(
            f"block.apply: memory is {'missing' if memory is None else 'given'}, but params have "
            f"{'no ' if params.cross is None else ''}cross attention; init_params(…, cross=True) makes it."
        )
    if cache is not None and positions is not None:
        raise ValueError(
            "block.apply: positions are for calls without a cache, which has its own; got positions and a cache."
        )
    captures = captured("block.apply", capture, names)
    if dropout_key is not None:
        arguments.key("block.apply", dropout_key, "dropout_key")
    keys = [None] * 5 if dropout_key is None else jax.random.split(dropout_key, 5)
    common: dict[str, Any] = {
        "dropout_rate": 0.0 if dropout_key is None else config.attention_dropout, "kernel": kernel, "real": real,
    }  # fmt: skip
    part = "attention"
    given: dict[str, Any] = {
        **common, "mask": mask, "score": score, "rotate": rotate, "gates": gates.get(part),
        "intervention": interventions.get(part, Intervention()), "dropout_key": keys[0], "capture": captures[part],
    }  # fmt: skip
    y = before(params.attention_norm, x, config)
    if cache is None:
        y, seen = attention.apply_captured(params.attention, y, config, positions=positions, **given)
    else:
        y, cache, seen = caches.extend(params.attention, y, cache, config, **given)
    found = {part: seen}
    residual, x = x, after(params.attention_norm, x, dropout(y, config.dropout, keys[1]), config)

    if params.cross is not None and params.cross_norm is not None and memory is not None:
        part = "cross"
        y, found[part] = attend_across(
            params, x, memory, config, memory_mask=memory_mask, gates=gates.get(part),
            intervention=interventions.get(part, Intervention()), dropout_key=keys[2], capture=captures[part], **common,
        )  # fmt: skip
        residual, x = x, after(params.cross_norm, x, dropout(y, config.dropout, keys[3]), config)
    return feed_forward(params, residual, x, config, keys[4]), cache, PerAttention(**found)


def before(params: norm.Params, x: Array, config: Config) -> Array:
    """What a part of a layer is computed from, given x."""
    return x if config.placement == "post" else norm.apply(params, x, config)


def after(params: norm.Params, x: Array, y: Array, config: Config) -> Array:
    """x with the output y of a part whose normalisation this is."""
    return norm.apply(params, x + y, config) if config.placement == "post" else x + y


def attend_across(
    params: Params, x: Array, memory: Array | KeysValues, config: Config, *, memory_mask: Mask | ArrayLike | None,
    **options: Any,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """Attention of x to the memory, before it is added to x, and what was captured; options of `attention.apply_to`."""
    assert params.cross is not None and params.cross_norm is not None
    if not isinstance(memory, KeysValues):
        memory = attention.keys_values(params.cross, memory, config, masked=memory_mask is not None)
    x = before(params.cross_norm, x, config)
    return attention.apply_to(params.cross, x, memory, config, mask=memory_mask, **options)


def feed_forward(params: Params, residual: Array, x: Array, config: Config, dropout_key: Array | None = None) -> Array:
    """The last part of a layer: x with the output of the feed-forward network.

    Args:
      residual: what x was before the last attention, which is what the network is given if it is parallel to that.
      params, x, config, dropout_key: as in `run`.
    """
    given = before(params.mlp_norm, residual if config.placement == "parallel" else x, config)
    y = mlp.apply(params.mlp, given, config)
    return after(params.mlp_norm, x, dropout(y, config.dropout, dropout_key), config)


def changes(
    who: str, gates: Any, interventions: Any, names: Sequence[str]
) -> tuple[Mapping[str, Any], Mapping[str, Intervention]]:
    """What is changed in attentions of these names; nothing in those that are left out.

    Raises:
      TypeError, ValueError: unless gates and interventions say for which attention they are, and it is there.
    """
    per_attention.check(who, "gates", gates, names)
    per_attention.check(who, "interventions", interventions, names)
    for name, one in ({} if interventions is None else interventions).items():
        write = "a function of mhajax.interventions, such as zero(…)"
        arguments.instance(who, f"interventions.{name}", one, Intervention, write)
    return {} if gates is None else gates, {} if interventions is None else interventions


def captured(who: str, given: Captures, names: Sequence[str]) -> PerAttention[Capture]:
    """What is captured of attentions of these names: the same of all, unless it says which.

    Raises:
      TypeError, ValueError: for an attention that is not there; else as `interventions.Capture`.
    """
    if not isinstance(given, Mapping):
        return PerAttention(**dict.fromkeys(names, as_capture(given)))
    per_attention.check(who, "capture", given, names)
    return PerAttention(**{name: as_capture(given.get(name, ())) for name in names})
