"""One layer: attention, attention to a memory if there is one, feed-forward; each normalised before, added after.

References:
  Vaswani et al. 2017, section 3.1, with the normalisation before each part as in Xiong et al. 2020, "On Layer
  Normalization in the Transformer Architecture".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypedDict, Unpack, get_args

import jax
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, attention, mlp, norm
from mhajax import cache as caches
from mhajax.attention import KeysValues
from mhajax.cache import Cache
from mhajax.dropout import check_rate, dropout
from mhajax.interventions import Capture, Intervention, as_capture
from mhajax.masks import Mask


@dataclass(frozen=True, kw_only=True)
class Config(attention.Config, mlp.Config):
    """A layer: an attention's shape and a feed-forward network's, and what joins them.

    Attributes:
      norm: "rms" or "layer".
      dropout: share of each part's output that is dropped before it is added.
      attention_dropout: share of the attention weights that is dropped.
    """

    norm: norm.Kind = "rms"
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        attention.Config.__post_init__(self)
        mlp.Config.__post_init__(self)
        if self.norm not in get_args(norm.Kind):
            raise ValueError(f"norm must be one of {', '.join(get_args(norm.Kind))}, got {self.norm!r}.")
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


class Interventions(NamedTuple):
    """What is changed in the two attentions; in a stack every leaf has a leading L, or no axes at all."""

    attention: Intervention = Intervention()
    cross: Intervention = Intervention()


class Captures(NamedTuple):
    """What is looked at in the two attentions."""

    attention: Sequence[str] | Capture = ()
    cross: Sequence[str] | Capture = ()


class Gates(NamedTuple):
    """A factor for every head's output: [N], [..., N] or [..., N, T], None for 1. The short form of `Interventions`."""

    attention: Array | None = None
    cross: Array | None = None


class CommonOptions(TypedDict, total=False):
    """The keywords of a layer that those of a stack and of a language model are too; what they are, `run` says."""

    mask: Mask | ArrayLike | None
    gates: Gates
    interventions: Interventions
    kernel: str
    dropout_key: Array | None


class Options(CommonOptions, total=False):
    """All keywords of `apply`."""

    memory: Array | KeysValues | None
    memory_mask: Mask | ArrayLike | None
    positions: Array | None
    rotate: Callable[[Array, Array], Array] | None
    real: Array | None


class Seen(NamedTuple):
    """What was captured in the two attentions."""

    attention: dict[str, Array]
    cross: dict[str, Array]


def init_params(key: Array, config: Config, *, cross: bool = False) -> Params:
    """Parameters of a layer; `cross` adds attention to a memory."""
    arguments.init("block.init_params", key, config, Config)
    key_attention, key_cross, key_mlp = jax.random.split(key, 3)
    new_norm = partial(norm.init_params, config.d_model, config.norm)
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
    positions: Array | None = None,
    rotate: Callable[[Array, Array], Array] | None = None,
    gates: Gates = Gates(),  # noqa: B008 - an immutable tuple
    interventions: Interventions = Interventions(),  # noqa: B008
    cache: Cache | None = None,
    real: Array | None = None,
    capture: Sequence[str] | Capture | Captures = (),
    kernel: str = "auto",
    dropout_key: Array | None = None,
) -> tuple[Array, Cache | None, Seen]:
    """One layer, with its new cache and what was captured.

    Args:
      params: from `init_params`.
      x: [..., T, D].
      config: the shape; static under jit.
      memory: [..., S, D], or its keys and values; needs parameters with cross attention.
      mask: for the attention to x (and to the cache).
      memory_mask: for the attention to the memory.
      positions: [T] or [..., T].
      rotate: for queries and keys of the attention to x; a memory is not rotated.
      gates: factors of the heads' outputs.
      interventions: what else is changed in the heads.
      cache: keys and values of earlier tokens; x is appended and attends to all of it. It knows the positions.
      real: bool [..., T], False for padding: "column_sums" do not count it, and a cache does not keep it, as in
        `cache.extend`. It masks nothing. None: as in `attention.apply`.
      capture: names of `attention.CAPTURES`, or a Capture, of both attentions; or `Captures`.
      kernel: of both attentions, as in `attention.apply`.
      dropout_key: PRNG key; None is evaluation.

    Returns:
      [..., T, D], the cache with x appended (None without a cache), and the captured arrays.
    """
    arguments.order("block.apply(params, x, config)", params, config, Params, Config, x=x)
    check_changes("block.apply", gates, interventions)
    if (memory is None) != (params.cross is None):
        raise ValueError(
            f"block.apply: memory is {'missing' if memory is None else 'given'}, but params have "
            f"{'no ' if params.cross is None else ''}cross attention; init_params(…, cross=True) makes it."
        )
    if cache is not None and positions is not None:
        raise ValueError(
            "block.apply: positions are for calls without a cache, which has its own; got positions and a cache."
        )
    captures = as_captures(capture)
    if dropout_key is not None:
        arguments.key("block.apply", dropout_key, "dropout_key")
    keys = [None] * 5 if dropout_key is None else jax.random.split(dropout_key, 5)
    weights_rate = 0.0 if dropout_key is None else config.attention_dropout

    y = norm.apply(params.attention_norm, x)
    given: dict[str, Any] = {
        "mask": mask, "rotate": rotate, "gates": gates.attention,
        "intervention": interventions.attention, "kernel": kernel,
        "dropout_rate": weights_rate, "dropout_key": keys[0], "capture": captures.attention,
    }  # fmt: skip
    if cache is None:
        y, seen = attention.apply_captured(params.attention, y, config, positions=positions, real=real, **given)
    else:
        y, cache, seen = caches.extend(params.attention, y, cache, config, real=real, **given)
    x = x + dropout(y, config.dropout, keys[1])

    seen_across = {}
    if params.cross is not None and params.cross_norm is not None and memory is not None:
        if not isinstance(memory, KeysValues):
            memory = attention.keys_values(params.cross, memory, config, masked=memory_mask is not None)
        y, seen_across = attention.apply_to(
            params.cross, norm.apply(params.cross_norm, x), memory, config,
            mask=memory_mask, gates=gates.cross, intervention=interventions.cross, kernel=kernel,
            dropout_rate=weights_rate, dropout_key=keys[2], capture=captures.cross, real=real,
        )  # fmt: skip
        x = x + dropout(y, config.dropout, keys[3])

    y = mlp.apply(params.mlp, norm.apply(params.mlp_norm, x), config)
    return x + dropout(y, config.dropout, keys[4]), cache, Seen(seen, seen_across)


def check_changes(who: str, gates: Any, interventions: Any) -> None:
    """Raise a TypeError unless gates and interventions say which attention they are for."""
    arguments.instance(who, "gates", gates, Gates, "block.Gates(attention=…)")
    write = "block.Interventions(attention=…)"
    arguments.instance(who, "interventions", interventions, Interventions, write)


def as_captures(given: Sequence[str] | Capture | Captures) -> Captures:
    """What is looked at in either attention: the same in both, unless it says which."""
    if isinstance(given, Captures):
        return Captures(*map(as_capture, given))
    return Captures(as_capture(given), as_capture(given))
