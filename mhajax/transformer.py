"""A stack of layers, scanned: the parameters of all layers are one pytree with a leading axis L, compiled once.

Layers of which nothing is captured stay in their scan: the stack is cut at the layers that are looked at.

With a cache the layers are unrolled, and each has a cache of its own: a scan would copy all of them at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from mhajax.block import Captures, Gates, Interventions, Options, Seen
from mhajax.cache import Cache
from mhajax.interventions import Capture, as_capture

Caches = tuple[Cache, ...]  # of all layers


class Params(NamedTuple):
    """Layers stacked along a leading axis L, and the normalisation after the last."""

    layers: Any  # block.Params, every leaf [L, ...]; or a tuple of L of them, see `unstack`
    norm: norm.Params


@dataclass(frozen=True, kw_only=True)
class Config(block.Config):
    """A stack.

    Attributes:
      num_layers: L.
      unroll: layers per iteration of the compiled loop. 1 keeps compile time flat in depth; num_layers is fastest on a
        CPU (no copies in and out of the stacked arrays) and changes no number.
    """

    num_layers: int
    unroll: int = 1

    def __post_init__(self):
        block.Config.__post_init__(self)
        arguments.integers(self, "num_layers", "unroll")


def init_params(key: Array, config: Config, *, cross: bool = False) -> Params:
    """Parameters of L layers, each from its own key; `cross` adds attention to a memory to each."""
    arguments.init("transformer.init_params", key, config, Config)
    one = partial(block.init_params, config=config, cross=cross)
    layers = jax.vmap(one)(jax.random.split(key, config.num_layers))
    return Params(layers, norm.init_params(config.d_model, config.norm))


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
    capture: Sequence[str] | Capture | Captures = (),
    **options: Unpack[Options],
) -> tuple[Array, Caches | None, Seen]:
    """All layers, with their new caches and what was captured.

    Args:
      params: from `init_params`, or `unstack`.
      x: [..., T, D].
      config: the shape; static under jit.
      memory: [..., S, D], shared by all layers, or keys and values of every layer, [L, ...] or a tuple of L.
      gates: [L, N], [L, ..., N] or [L, ..., N, T].
      interventions: every leaf with a leading L; a leaf without axes is shared by all layers.
      cache: from `init_cache`.
      capture: as in `block.run`; its layers, in their order, are the first axis of what is returned.
      dropout_key: PRNG key; None is evaluation.
      mask, memory_mask, positions, rotate, real, kernel: as in `block.run`.

    Returns:
      [..., T, D], the caches of the layers (None without), and the captured arrays [L, ...].
    """
    arguments.named("transformer.run", options, Options)
    arguments.order("transformer.run(params, x, config)", params, config, Params, Config, x=x)
    gates, interventions = options.pop("gates", Gates()), options.pop("interventions", Interventions())
    block.check_changes("transformer.run", gates, interventions)
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
    captures = block.as_captures(capture)
    counted = any("column_sums" in as_capture(one).names for one in captures)
    if options.get("real") is not None and cache is None and not counted:
        raise ValueError(
            'transformer.run: real says what a cache keeps and what "column_sums" count, got real without a cache or '
            "that capture; what may be attended to is for mask, such as masks.lengths."
        )

    def one_layer(
        x: Array, layer: tuple, cache: Cache | None = None, *, capture: Captures
    ) -> tuple[Array, tuple[Cache | None, Seen]]:
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
    asked = [Captures(*(_of_layer(one, index, count) for one in captures)) for index in range(count)]
    found: list[Seen] = []
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
    attention, cross = ([getattr(seen, kind) for seen in found] for kind in Seen._fields)
    seen = Seen(_joined(attention, captures.attention), _joined(cross, captures.cross))
    return norm.apply(params.norm, x), None if cache is None else tuple(after), seen


def _of_layer(given: Sequence[str] | Capture, index: int, num_layers: int) -> Capture:
    """What is looked at in one layer."""
    capture = as_capture(given)
    wanted = capture.layers
    if wanted is not None and max(wanted) >= num_layers:
        raise ValueError(
            f"transformer.run: capture.layers must be below num_layers={num_layers}, got {wanted}; "
            "block.Captures and translator.Captures ask each kind of attention for its own layers."
        )
    return replace(capture, layers=None, names=capture.names if wanted is None or index in wanted else ())


def _joined(parts: list[dict[str, Array]], capture: Sequence[str] | Capture) -> dict[str, Array]:
    """What some runs of layers saw, [L, ...], in the order that is asked for."""
    some = [part for part in parts if part]
    if not some:
        return {}
    whole = some[0] if len(some) == 1 else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *some)
    layers = as_capture(capture).layers
    if layers is None or list(layers) == sorted(layers):
        return whole
    return jax.tree.map(itemgetter(np.argsort(np.argsort(layers))), whole)
