"""A stack of layers, scanned: the parameters of all layers are one pytree with a leading axis L, compiled once.

With a cache the layers are unrolled, and each has a cache of its own: a scan would copy all of them at every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import attention, block, norm
from mhajax import cache as caches
from mhajax.attention import KeysValues
from mhajax.block import Gates, Seen
from mhajax.cache import Cache

Caches = tuple[Cache, ...]  # of all layers


class Params(NamedTuple):
    """Layers stacked along a leading axis L, and the normalisation after the last."""

    layers: block.Params  # every leaf [L, ...]
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
        for name in ("num_layers", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def init_params(key: Array, config: Config, *, cross: bool = False) -> Params:
    """Parameters of L layers, each from its own key; `cross` adds attention to a memory to each."""
    one = partial(block.init_params, config=config, cross=cross)
    layers = jax.vmap(one)(jax.random.split(key, config.num_layers))
    return Params(layers, norm.init_params(config.d_model, config.norm))


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
    if params.layers.cross is None:
        raise ValueError(
            "transformer.keys_values: params have no cross attention; init_params(…, cross=True) makes it."
        )
    project = partial(attention.keys_values, memory=memory, config=config, masked=masked)
    return jax.vmap(project)(params.layers.cross)


def apply(params: Params, x: Array, config: Config, **options: Any) -> Array:
    """All layers and the last normalisation, [..., T, D] to [..., T, D]. The options are those of `run`."""
    return run(params, x, config, **options)[0]


def run(
    params: Params,
    x: Array,
    config: Config,
    *,
    memory: Array | KeysValues | None = None,
    gates: Gates = Gates(),  # noqa: B008 - an immutable tuple
    cache: Caches | None = None,
    dropout_key: Array | None = None,
    **options: Any,
) -> tuple[Array, Caches | None, Seen]:
    """All layers, with their new caches and what was captured.

    Args:
      params: from `init_params`.
      x: [..., T, D].
      config: the shape; static under jit.
      memory: [..., S, D], shared by all layers, or keys and values of every layer [L, ...].
      gates: [L, N] or [L, ..., N].
      cache: from `init_cache`.
      dropout_key: PRNG key; None is evaluation.
      **options: mask, memory_mask, positions, rotate, real and capture as in `block.run`.

    Returns:
      [..., T, D], the caches of the layers (None without), and the captured arrays [L, ...].
    """
    stacked = {leaf.shape[0] for leaf in jax.tree.leaves((params.layers, gates))}
    stacked |= set() if cache is None else {len(cache)}
    if stacked != {config.num_layers}:
        raise ValueError(
            f"transformer.run: params, gates and cache must be stacked for num_layers={config.num_layers}, "
            f"got {sorted(stacked)} layers; params and config do not belong together."
        )
    keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)
    projected = memory if isinstance(memory, KeysValues) else None

    def one_layer(x: Array, layer: tuple, cache: Cache | None = None) -> tuple[Array, tuple[Cache | None, Seen]]:
        params, key, gates, answers = layer
        x, cache, seen = block.run(
            params, x, config,
            memory=memory if answers is None else answers, gates=gates, cache=cache, dropout_key=key, **options,
        )  # fmt: skip
        return x, (cache, seen)

    layers = (params.layers, keys, gates, projected)
    if cache is None:
        x, (_, seen) = jax.lax.scan(one_layer, x, layers, unroll=min(config.unroll, config.num_layers))
    else:
        found = []
        for index, before in enumerate(cache):
            x, after = one_layer(x, jax.tree.map(itemgetter(index), layers), before)
            found.append(after)
        cache, seen = tuple(after for after, _ in found), jax.tree.map(lambda *a: jnp.stack(a), *(s for _, s in found))
    return norm.apply(params.norm, x), cache, seen
