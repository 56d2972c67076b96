"""A decoder-only Transformer: the next token from the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments, attention, embedding, masks, transformer
from mhajax import cache as caches
from mhajax.block import Captures, CommonOptions, Seen
from mhajax.dropout import dropout
from mhajax.interventions import Capture
from mhajax.transformer import Caches


@dataclass(frozen=True, kw_only=True)
class Config(transformer.Config):
    """A stack of layers, and the words it is about.

    Attributes:
      vocab_size: V. An experiment fills it in from its data.
      positions: "rotary" (in every attention), "sinusoidal" (added to the embedding) or "none" (causality alone).
    """

    vocab_size: int | None = None
    positions: embedding.Positions = "rotary"

    def __post_init__(self):
        transformer.Config.__post_init__(self)
        arguments.integers(self, "vocab_size", optional=True)
        embedding.check_kind(self.positions)
        embedding.check_width(self.positions, self.width)


class Params(NamedTuple):
    """The table of embeddings, which also gives the logits, and the layers."""

    embedding: Array  # [V, D]
    stack: transformer.Params


class Options(CommonOptions, total=False):
    """All keywords of `apply`."""

    positions: Array | None


def init_params(key: Array, config: Config) -> Params:
    """Parameters of the model.

    Raises:
      TypeError: if key is no PRNG key.
      ValueError: if config.vocab_size is not set.
    """
    arguments.init("language_model.init_params", key, config, Config)
    if config.vocab_size is None:
        raise ValueError("language_model.init_params: config.vocab_size must be a number, got None; set it.")
    key_embedding, key_stack = jax.random.split(key)
    return Params(
        embedding.init_params(key_embedding, config.vocab_size, config.d_model),
        transformer.init_params(key_stack, config),
    )


def attentions(params: Params) -> dict[str, attention.Params]:
    """As `attention.attentions`: "attention", every leaf [L, ...]."""
    return transformer.attentions(params.stack)


def with_attentions(params: Params, changed: dict[str, attention.Params]) -> Params:
    """The parameters with some attentions replaced."""
    return params._replace(stack=transformer.with_attentions(params.stack, changed))


@arguments.shown
def apply(params: Params, tokens: Array, config: Config, **options: Unpack[Options]) -> Array:
    """Logits of the next token at every place.

    Args:
      params: from `init_params`.
      tokens: integers [..., T], from 0 to V - 1. Others are refused; under jit, where they are not known, they give NaN
        wherever they are seen, as in `embedding.embed`.
      config: the shape; static under jit.
      mask: a Mask, or booleans, as in `attention.apply`, combined with the causal one.
      positions: integers [T] or [..., T]; 0, 1, 2, … if None.
      gates: of `block.Gates`, [L, N] or [L, ..., N].
      interventions: of `block.Interventions`, every leaf [L, ...].
      kernel: as in `attention.apply`.
      dropout_key: PRNG key; None is evaluation.

    Returns:
      float32 [..., T, V].

    Raises:
      ValueError, TypeError: for tokens that are not in the vocabulary; else as `attention.apply`.
    """
    instead = {
        "capture": "write language_model.apply_captured, which returns it",
        "cache": "write language_model.extend",
    }
    arguments.named("language_model.apply", options, Options, **instead)
    x = features(params, tokens, config, **options)
    return embedding.logits(params.embedding, x)


@arguments.shown
def apply_captured(
    params: Params,
    tokens: Array,
    config: Config,
    *,
    capture: Sequence[str] | Capture | Captures = ("weights",),
    real: Array | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Seen]:
    """`apply`, and the arrays named in `attention.CAPTURES`, [L, ..., N, …].

    Args:
      params, tokens, config: as in `apply`, and so are its options.
      capture: names, of every layer, head and row; an `interventions.Capture` chooses some, and nothing else is
        computed.
      real: bool [..., T], False for padding, whose queries "column_sums" do not count. None: as in `attention.apply`.
    """
    arguments.named("language_model.apply_captured", options, Options)
    x, _, seen = run(params, tokens, config, capture=capture, real=real, **options)
    return embedding.logits(params.embedding, x), seen


@arguments.shown
def features(params: Params, tokens: Array, config: Config, **options: Unpack[Options]) -> Array:
    """What the logits are computed from, [..., T, D]: for losses that never hold [..., T, V]. Options as in `apply`."""
    arguments.named("language_model.features", options, Options)
    return run(params, tokens, config, **options)[0]


def init_cache(
    leading: tuple[int, ...], capacity: int, config: Config, dtype: Any = jnp.float32, *, rolling: bool = False
) -> Caches:
    """Room for `capacity` tokens in every layer; dtype is best that of the parameters. `rolling` as in `cache.init`."""
    return transformer.init_cache(leading, capacity, config, dtype, rolling=rolling)


def unstack(params: Params) -> Params:
    """The same parameters for a loop over tokens with `extend`: `transformer.unstack` of its layers.

    >>> config = Config(vocab_size=11, d_model=16, num_heads=4, num_layers=3)
    >>> len(unstack(init_params(jax.random.key(0), config)).stack.layers)
    3
    """
    return params._replace(stack=transformer.unstack(params.stack))


@arguments.shown
def extend(
    params: Params,
    tokens: Array,
    cache: Caches,
    config: Config,
    *,
    real: Array | None = None,
    **options: Unpack[CommonOptions],
) -> tuple[Array, Caches]:
    """Logits [..., t, V] of t more tokens [..., t] after those in the cache, and the cache with them.

    Prompt and single tokens are the same call; the logits equal those of `apply` on the whole text (with
    `masks.window(capacity - 1)` if the cache is rolling).

    Args:
      params: as in `apply`; in a loop over tokens best those of `unstack`, made before the loop.
      tokens, config: as in `apply`.
      cache: from `init_cache`, or of the last call. More tokens than it has room for give NaN under jit; whether that
        has happened, `cache.overflowed` of the new cache says.
      real: bool [..., t], False for padding, as in `cache.extend`: prompts of different lengths, rows that stand still.
      mask, gates, interventions, kernel, dropout_key: as in `apply`.

    Raises:
      ValueError: if the tokens do not fit and the lengths are known, as `cache.extend`.
    """
    arguments.named("language_model.extend", options, CommonOptions, positions="leave it out: the cache knows them")
    x, cache, _ = run(params, tokens, config, cache=cache, real=real, **options)
    return embedding.logits(params.embedding, x), cache


@arguments.shown
def run(
    params: Params,
    tokens: Array,
    config: Config,
    *,
    cache: Caches | None = None,
    real: Array | None = None,
    capture: Sequence[str] | Capture | Captures = (),
    **options: Unpack[Options],
) -> tuple[Array, Any, Seen]:
    """Features, cache and captured arrays; `apply`, `apply_captured`, `features` and `extend` are views of it."""
    arguments.named("language_model.run", options, Options)
    call = "language_model.apply(params, tokens, config)"
    arguments.order(call, params, config, Params, Config, tokens=tokens)
    mask, positions = masks.as_mask(options.get("mask"), "language_model.apply"), options.get("positions")
    dropout_key = options.get("dropout_key")
    if dropout_key is not None:
        arguments.key("language_model.apply", dropout_key, "dropout_key")
    key_embedding, key_stack = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    if cache is not None:
        places = caches.positions(cache[0], tokens.shape[-1], real)
    else:
        places = positions = jnp.arange(tokens.shape[-1]) if positions is None else positions
    x = dropout(embedding.embed(params.embedding, tokens, places, config.positions), config.dropout, key_embedding)
    causal = masks.causal()
    own: Options = {
        **options, "mask": causal if mask is None else causal & mask, "positions": positions, "dropout_key": key_stack,
    }  # fmt: skip
    rotate = embedding.rotation(config.positions)
    return transformer.run(params.stack, x, config, rotate=rotate, cache=cache, real=real, capture=capture, **own)
