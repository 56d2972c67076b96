"""A stack of layers, scanned: the parameters of all layers are one pytree with a leading axis L, compiled once.

Layers of which nothing is captured stay in their scan: the stack is cut at the layers that are looked at.

With a cache the layers are unrolled, and each has a cache of its own: a scan would copy all of them at every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import arguments, attention, block, norm
from mhajax import cache as caches
from mhajax.attention import KeysValues
from mhajax.attentions import PerAttention
from mhajax.block import Captures, Options
from mhajax.cache import Cache
from mhajax.dropout import dropout
from mhajax.interventions import Capture, Intervention
from mhajax.kernels import Path

Caches = tuple[Cache, ...]  # of all layers


class Params(NamedTuple):
    """Layers stacked along a leading axis L, and the normalisation after the last, if there is one."""

    layers: Any  # block.Params, every leaf [L, ...]; or a tuple of L of them, see `unstack`
    norm: norm.Params | None


@dataclass(frozen=True, kw_only=True)
class Config(block.Config):
    """A stack.

    Attributes:
      num_layers: L.
      unroll: layers per iteration of the compiled loop. 1 keeps compile time flat in depth; num_layers is fastest on a
        CPU (no copies in and out of the stacked arrays) and changes no number.
      final_norm: normalise what the last layer gives.
    """

    num_layers: int
    unroll: int = 1
    final_norm: bool = True

    def __post_init__(self):
        block.Config.__post_init__(self)
        arguments.integers(self, "num_layers", "unroll")
        arguments.booleans(self, "final_norm")


def init_params(key: Array, config: Config, *, cross: bool = False) -> Params:
    """Parameters of L layers, each from its own key; `cross` adds attention to a memory to each."""
    arguments.init("transformer.init_params", key, config, Config)
    one = partial(block.init_params, config=config, cross=cross)
    layers = jax.vmap(one)(jax.random.split(key, config.num_layers))
    return Params(layers, norm.init_params(None, config) if config.final_norm else None)


def part(params: Params, config: Config, start: int, stop: int) -> tuple[Params, Config]:
    """The layers from `start` up to, not with, `stop`: a stack of its own, to go on from activations of layer `start`.

    `run` of the whole is `run` of [0, l] and then, of what that gives, of [l, L]. The last normalisation belongs to the
    last layer.

    Raises:
      ValueError: unless 0 ≤ start < stop ≤ L.

    >>> config = Config(d_model=8, num_heads=2, num_layers=3)
    >>> params, x = init_params(jax.random.key(0), config), jnp.ones((5, 8))
    >>> first, last = part(params, config, 0, 2), part(params, config, 2, 3)
    >>> x_2 = apply(first[0], x, first[1])
    >>> bool(jnp.allclose(apply(last[0], x_2, last[1]), apply(params, x, config), atol=1e-6))
    True
    """
    count = config.num_layers
    if not 0 <= start < stop <= count:
        raise ValueError(
            f"transformer.part: start and stop must be 0 ≤ start < stop ≤ num_layers={count}, got {start} and {stop}."
        )
    last = stop == count
    some = slice(start, stop)
    layers = params.layers[some] if _is_unstacked(params.layers) else jax.tree.map(itemgetter(some), params.layers)
    shape = replace(config, num_layers=stop - start, final_norm=config.final_norm and last)
    return Params(layers, params.norm if last else None), shape


class Stage(NamedTuple):
    """A stack of a model as it is run: all of it but what is changed and captured.

    A model's module gives those of its inputs, `stages(params, …, config)`, each after those that it reads; what the
    last one gives is what the model's logits are computed from.

    Attributes:
      params, config: of the stack.
      x: its input, [..., T, D].
      options: mask, memory_mask, score, positions and rotate, as far as there are any, as in `run`.
      names: what the model calls the attentions of a layer, by the layer's names: {"attention": "encoder"}.
      reads: which of the stages' output is the memory; None: there is none.
    """

    params: Params
    config: Config
    x: Array
    options: dict[str, Any]
    names: dict[str, str]
    reads: int | None = None

    def of_layers(self, given: Mapping[str, Any] | None) -> PerAttention | None:
        """What is given for attentions by the model's names, as `run` takes it."""
        if given is None:
            return None
        return PerAttention(**{ours: given[name] for ours, name in self.names.items() if name in given})

    def of_model(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What was found in attentions of the layers, by the model's names."""
        return {self.names[ours]: one for ours, one in found.items()}


def unstack(params: Params) -> Params:
    """The same parameters, every layer by itself, for a loop over tokens with a cache.

    Out of a stack the compiler copies every layer anew for every token. Write it before the loop, inside of jit.
    """
    return params._replace(layers=unstacked(params.layers))


def unstacked(tree: Any) -> tuple[Any, ...]:
    """What is stacked along a leading axis L, as a tuple of L."""
    return tuple(_part(tree, index) for index in range(_count(tree)))


def _is_unstacked(tree: Any) -> bool:
    return type(tree) is tuple  # and no NamedTuple


def _count(tree: Any) -> int:
    """L."""
    return len(tree) if _is_unstacked(tree) else jax.tree.leaves(tree)[0].shape[0]


def _part(tree: Any, index: int) -> Any:
    """What one layer has of it."""
    return tree[index] if _is_unstacked(tree) else jax.tree.map(itemgetter(index), tree)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree) if _is_unstacked(tree) else tree


def attentions(params: Params) -> dict[str, attention.Params]:
    """As `attention.attentions`: those of a layer, every leaf [L, ...]."""
    return block.attentions(_stacked(params.layers))


def with_attentions(params: Params, changed: dict[str, attention.Params]) -> Params:
    """The parameters with some attentions replaced."""
    return params._replace(layers=block.with_attentions(_stacked(params.layers), changed))


def init_cache(
    leading: tuple[int, ...], capacity: int, config: Config, dtype: Any = jnp.float32, *, rolling: bool = False
) -> Caches:
    """Empty caches, one for every layer; arguments as in `cache.init`."""
    return tuple(caches.init(leading, capacity, config, dtype, rolling=rolling) for _ in range(config.num_layers))


def select(cache: Caches, rows: Array) -> Caches:
    """The caches of these rows of the batch, in this order; rows may repeat. For inputs [B, T, D]."""
    return tuple(caches.select(one, rows) for one in cache)


def keys_values(params: Params, memory: Array, config: attention.Config, *, masked: bool = True) -> KeysValues:
    """The memory projected to keys and values for every layer's cross attention, every leaf [L, ...]."""
    layers = _stacked(params.layers)
    if layers.cross is None:
        raise ValueError(
            "transformer.keys_values: params have no cross attention; init_params(…, cross=True) makes it."
        )
    project = partial(attention.keys_values, memory=memory, config=config, masked=masked)
    return jax.vmap(project)(layers.cross)


@arguments.shown
def apply(params: Params, x: Array, config: Config, **options: Unpack[Options]) -> Array:
    """All layers and the last normalisation, [..., T, D] to [..., T, D].

    The options are those of `run`, which also takes a cache and captures.
    """
    instead = dict.fromkeys(("cache", "capture"), "write transformer.run, which returns it")
    arguments.named("transformer.apply", options, Options, **instead)
    return run(params, x, config, **options)[0]


@arguments.shown
def run(
    params: Params,
    x: Array,
    config: Config,
    *,
    cache: Caches | None = None,
    capture: Captures = (),
    **options: Unpack[Options],
) -> tuple[Array, Caches | None, PerAttention[dict[str, Array]]]:
    """All layers, with their new caches and what was captured.

    Args:
      params: from `init_params`, or `unstack`.
      x: [..., T, D].
      config: the shape; static under jit.
      memory: [..., S, D], shared by all layers, or keys and values of every layer, [L, ...] or a tuple of L.
      gates: `PerAttention` of [L, N], [L, ..., N] or [L, ..., N, T], for attention and cross.
      interventions: `PerAttention` whose every leaf has a leading L; a leaf without axes is shared by all layers.
      cache: from `init_cache`.
      capture: as in `block.run`; its layers, in their order, are the first axis of what is returned.
      dropout_key: PRNG key; None is evaluation.
      mask, memory_mask, score, positions, rotate, real, kernel: as in `block.run`.

    Returns:
      [..., T, D], the caches of the layers (None without), and the captured arrays [L, ...].

    Raises:
      ValueError: if params, gates, interventions, memory or cache are of another number of layers than the config;
        else as `block.run`.
    """
    arguments.named("transformer.run", options, Options)
    arguments.order("transformer.run(params, x, config)", params, config, Params, Config, x=x)
    names = tuple(block.attentions(params.layers[0] if _is_unstacked(params.layers) else params.layers))
    changed = block.changes("transformer.run", options.pop("gates", None), options.pop("interventions", None), names)
    gates, interventions = dict(changed[0]), dict(changed[1])
    memory, dropout_key = options.pop("memory", None), options.pop("dropout_key", None)
    if dropout_key is not None:
        arguments.key("transformer.run", dropout_key, "dropout_key")
    rest: Any = options  # the same for every layer
    leaves, structure = jax.tree.flatten(interventions)
    shared = [jnp.ndim(leaf) == 0 for leaf in leaves]
    own = [None if one else leaf for leaf, one in zip(leaves, shared, strict=True)]
    everything = (gates, own) if _is_unstacked(params.layers) else (params.layers, gates, own)
    stacked = {_count(params.layers)} | {leaf.shape[0] for leaf in jax.tree.leaves(everything)}
    stacked |= {_count(memory)} if _is_unstacked(memory) else set()
    stacked |= set() if cache is None else {len(cache)}
    if stacked != {config.num_layers}:
        raise ValueError(
            f"transformer.run: params, gates, interventions and cache must be stacked for "
            f"num_layers={config.num_layers}, got {sorted(stacked)} layers; params and config do not belong together."
        )
    keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)
    projected = memory if isinstance(memory, KeysValues) or _is_unstacked(memory) else None
    captures = block.captured("transformer.run", capture, names)
    counted = any("column_sums" in one.names for one in captures.values())
    if options.get("real") is not None and cache is None and not counted:
        raise ValueError(
            'transformer.run: real says what a cache keeps and what "column_sums" count, got real without a cache or '
            "that capture; what may be attended to is for mask, such as masks.lengths."
        )

    def one_layer(
        x: Array, layer: tuple, cache: Cache | None = None, *, capture: PerAttention[Capture]
    ) -> tuple[Array, tuple[Cache | None, PerAttention]]:
        params, key, gates, own, answers = layer
        merged = [leaf if one else mine for leaf, one, mine in zip(leaves, shared, own, strict=True)]
        x, cache, seen = block.run(
            params, x, config,
            memory=memory if answers is None else answers, gates=gates, cache=cache, dropout_key=key,
            interventions=jax.tree.unflatten(structure, merged), capture=capture, **rest,
        )  # fmt: skip
        return x, (cache, seen)

    count = config.num_layers
    layers = (params.layers, keys, gates, own, projected)
    asked = [PerAttention(**{name: _of_layer(one, at, count) for name, one in captures.items()}) for at in range(count)]
    found: list[PerAttention] = []
    after: list[Any] = []
    if cache is None:
        layers = tuple(_stacked(part) for part in layers)
        for wanted, group in groupby(range(count), key=asked.__getitem__):
            indices = list(group)
            some = slice(indices[0], indices[-1] + 1)
            part = layers if len(indices) == count else jax.tree.map(itemgetter(some), layers)
            step, unroll = partial(one_layer, capture=wanted), min(config.unroll, len(indices))
            x, (_, seen) = jax.lax.scan(step, x, part, unroll=unroll)
            found.append(seen)
    else:
        for index, before in enumerate(cache):
            x, (new, seen) = one_layer(x, tuple(_part(part, index) for part in layers), before, capture=asked[index])
            after.append(new)
            found.append(jax.tree.map(itemgetter(None), seen))
    seen = PerAttention(**{name: _joined([one[name] for one in found], captures[name]) for name in names})
    x = x if params.norm is None else norm.apply(params.norm, x, config)
    return x, None if cache is None else tuple(after), seen


def run_stage(
    stage: Stage, outputs: Sequence[Array], *, gates: Mapping[str, Any] | None = None,
    interventions: Mapping[str, Intervention] | None = None, capture: Captures = (), **options: Any,
) -> tuple[Array, Any, dict[str, dict[str, Array]]]:  # fmt: skip
    """`run` of a stage, with gates, interventions and captures by the model's names.

    Args:
      stage: of a model.
      outputs: what the stages before it gave.
      gates, interventions, capture: as in `run`, by the model's names; those of other stages' attentions are left out.
      **options: the others of `run`; a memory that is given is read instead of a stage's output.

    Returns:
      As `run`, what was captured by the model's names.
    """
    if isinstance(capture, Mapping):
        capture = stage.of_layers(capture) or PerAttention()
    own: Any = {**stage.options, **options}
    if stage.reads is not None and "memory" not in own:
        own["memory"] = outputs[stage.reads]
    x, cache, seen = run(
        stage.params, stage.x, stage.config, **own,
        gates=stage.of_layers(gates), interventions=stage.of_layers(interventions), capture=capture,
    )  # fmt: skip
    return x, cache, stage.of_model(seen)


def run_stages(
    who: str, stages: Sequence[Stage], *, gates: Mapping[str, Any] | None = None,
    interventions: Mapping[str, Intervention] | None = None, capture: Captures = (), kernel: str | Path = "auto",
    dropout_key: Array | None = None, cache: Caches | None = None, real: Array | None = None,
) -> tuple[Array, Caches | None, PerAttention[dict[str, Array]]]:  # fmt: skip
    """A model: its stages one after the other, their inputs dropped out.

    Args:
      who: the function, for errors.
      stages: of the model.
      gates, interventions, capture: by the model's names, as in `run_stage`.
      kernel, dropout_key: as in `run`.
      cache, real: of the last stage, as in `run`.

    Returns:
      What the last stage gives, its cache, and what was captured, by the model's names.

    Raises:
      TypeError, ValueError: for attentions that the model does not have; else as `run`.
    """
    names = [name for stage in stages for name in stage.names.values()]
    block.changes(who, gates, interventions, names)
    captures = block.captured(who, capture, names)
    if dropout_key is not None:
        arguments.key(who, dropout_key, "dropout_key")
    keys: Any = [dropout_key] * len(stages)
    if dropout_key is not None and len(stages) > 1:
        keys = jax.random.split(dropout_key, len(stages))
    outputs, after, found = [], None, {}
    for stage, key in zip(stages, keys, strict=True):
        key_input, key_layers = (None, None) if key is None else jax.random.split(key)
        own = {"cache": cache, "real": real} if stage is stages[-1] else {}
        x, after, seen = run_stage(
            stage._replace(x=dropout(stage.x, stage.config.dropout, key_input)), outputs, gates=gates,
            interventions=interventions, capture=captures, kernel=kernel, dropout_key=key_layers, **own,
        )  # fmt: skip
        outputs.append(x)
        found |= seen
    return outputs[-1], after, PerAttention(**found)


def _of_layer(capture: Capture, index: int, num_layers: int) -> Capture:
    """What is captured of one layer."""
    wanted = capture.layers
    if wanted is not None and max(wanted) >= num_layers:
        raise ValueError(
            f"transformer.run: capture.layers must be below num_layers={num_layers}, got {wanted}; "
            "a PerAttention asks each kind of attention for its own layers."
        )
    return replace(capture, layers=None, names=capture.names if wanted is None or index in wanted else ())


def _joined(parts: list[dict[str, Array]], capture: Capture) -> dict[str, Array]:
    """What some runs of layers captured, [L, ...], in the order that is asked for."""
    some = [part for part in parts if part]
    if not some:
        return {}
    whole = some[0] if len(some) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *some)
    layers = capture.layers
    if layers is None or list(layers) == sorted(layers):
        return whole
    return jax.tree.map(itemgetter(np.argsort(np.argsort(layers))), whole)
