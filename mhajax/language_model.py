"""A decoder-only Transformer: the next token from the tokens before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, attention, embedding, masks, transformer
from mhajax import cache as caches
from mhajax.attentions import PerAttention
from mhajax.block import Captures, CommonOptions
from mhajax.masks import Mask
from mhajax.transformer import Caches, Stage


@dataclass(frozen=True, kw_only=True)
class Config(transformer.Config, embedding.Config):
    """A stack of layers, and the tokens that it is about.

    Attributes:
      window: a token attends to this many tokens before it and to itself (Mistral's sliding window is window + 1).
        None: to all.
      tied: the table of the tokens also gives the logits; else there is another for them.
    """

    window: int | None = None
    tied: bool = True

    def __post_init__(self):
        transformer.Config.__post_init__(self)
        embedding.Config.__post_init__(self)
        arguments.integers(self, "window", optional=True)
        arguments.booleans(self, "tied")
        embedding.check_width(self, self.width)
        if self.tied and self.token_width != self.d_model:
            raise ValueError(
                f"tied must be False for tokens of another width than the model, got embedding_width="
                f"{self.embedding_width} and d_model={self.d_model}."
            )


class Params(NamedTuple):
    """The vectors of tokens, which also give the logits unless there is a table of their own, and the layers."""

    embedding: embedding.Params
    stack: transformer.Params
    output: Array | None = None  # [V, D]

    @property
    def table(self) -> Array:
        """What features are compared with for the logits, [V, D]."""
        return self.embedding.tokens if self.output is None else self.output


NAMES = ("attention",)


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
    size = (config.vocab_size, config.d_model)
    return Params(
        embedding.init_params(key_embedding, config),
        transformer.init_params(key_stack, config),
        None if config.tied else jax.random.normal(jax.random.fold_in(key, 2), size) * config.d_model**-0.5,
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
      score: as in `attention.apply`, of all layers.
      gates: `PerAttention(attention=…)`, [L, N] or [L, ..., N].
      interventions: `PerAttention(attention=…)`, every leaf [L, ...].
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
    return embedding.logits(params.table, x)


@arguments.shown
def apply_captured(
    params: Params,
    tokens: Array,
    config: Config,
    *,
    capture: Captures = ("weights",),
    real: Array | None = None,
    **options: Unpack[Options],
) -> tuple[Array, PerAttention[dict[str, Array]]]:
    """`apply`, and the arrays named in `attention.CAPTURES`, [L, ..., N, …].

    Args:
      params, tokens, config: as in `apply`, and so are its options.
      capture: names, of every layer, head and row; an `interventions.Capture` chooses some, and nothing else is
        computed.
      real: bool [..., T], False for padding, whose queries "column_sums" do not count. None: as in `attention.apply`.
    """
    arguments.named("language_model.apply_captured", options, Options)
    x, _, seen = run(params, tokens, config, capture=capture, real=real, **options)
    return embedding.logits(params.table, x), seen


@arguments.shown
def features(params: Params, tokens: Array, config: Config, **options: Unpack[Options]) -> Array:
    """What the logits are computed from, [..., T, D]: for losses that never hold [..., T, V]. Options as in `apply`."""
    arguments.named("language_model.features", options, Options)
    return run(params, tokens, config, **options)[0]


def logits(params: Params, features: Array, config: Config) -> Array:
    """Of the token after every one, float32 [..., T, V], from features [..., T, D]."""
    del config  # the table is all that it takes; other models need more
    return embedding.logits(params.table, features)


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
      mask, score, gates, interventions, kernel, dropout_key: as in `apply`.

    Raises:
      ValueError: if the tokens do not fit and the lengths are known, as `cache.extend`.
    """
    arguments.named("language_model.extend", options, CommonOptions, positions="leave it out: the cache knows them")
    x, cache, _ = run(params, tokens, config, cache=cache, real=real, **options)
    return embedding.logits(params.table, x), cache


@arguments.shown
def run(
    params: Params,
    tokens: Array,
    config: Config,
    *,
    cache: Caches | None = None,
    real: Array | None = None,
    capture: Captures = (),
    **options: Unpack[Options],
) -> tuple[Array, Any, PerAttention[dict[str, Array]]]:
    """Features, cache and captured arrays; `apply`, `apply_captured`, `features` and `extend` are views of it."""
    arguments.named("language_model.run", options, Options)
    call = "language_model.apply(params, tokens, config)"
    arguments.order(call, params, config, Params, Config, tokens=tokens)
    others: Any = dict(options)
    given = {name: others.pop(name) for name in ("mask", "score", "positions") if name in others}
    if cache is None:
        of_model = stages(params, tokens, config, **given)
    else:
        places = caches.positions(cache[0], tokens.shape[-1], real)
        of_model = stages(params, tokens, config, **{**given, "positions": places})
        of_model[0].options["positions"] = options.get("positions")  # the layers' caches know them, and refuse others
    return transformer.run_stages("language_model.apply", of_model, cache=cache, real=real, capture=capture, **others)


def stages(
    params: Params, tokens: Array, config: Config, *, mask: Mask | ArrayLike | None = None,
    score: Callable[[Any, Any, Any, Any], Any] | None = None, positions: Array | None = None,
) -> tuple[Stage]:  # fmt: skip
    """The one stack of the model, as it is run on these tokens. Arguments as in `apply`."""
    given = masks.as_mask(mask, "language_model.apply")
    own = masks.causal() if config.window is None else masks.causal() & masks.window(config.window)
    positions = jnp.arange(tokens.shape[-1]) if positions is None else positions
    options = {
        "mask": own if given is None else own & given, "positions": positions, "rotate": embedding.rotation(config),
    } | ({} if score is None else {"score": score})  # fmt: skip
    x = embedding.apply(params.embedding, tokens, config, positions=positions)
    return (Stage(params.stack, config, x, options, {name: name for name in NAMES}),)
