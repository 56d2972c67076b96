"""An encoder: a text is read from both sides, and every token gets a vector; what stands behind a mask can be asked.

References:
  Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", section 3; the
  head for masked tokens and the pooled vector are those of the authors' code. Lan et al. 2020, "ALBERT", section 3.1
  (`embedding_width`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, attention, embedding, masks, mlp, norm, transformer
from mhajax.attentions import PerAttention
from mhajax.block import Captures, CommonOptions
from mhajax.masks import Mask
from mhajax.transformer import Stage

NAMES = ("attention",)


@dataclass(frozen=True, kw_only=True)
class Config(transformer.Config, embedding.Config):
    """A stack of layers, and the tokens that it is about.

    Attributes:
      head: can tell what stands behind a mask: a linear map, activation and normalisation before the table.
      pooled: has a vector for a whole text: tanh of a linear map of its first token's.
    """

    head: bool = True
    pooled: bool = False

    def __post_init__(self):
        transformer.Config.__post_init__(self)
        embedding.Config.__post_init__(self)
        arguments.booleans(self, "head", "pooled")
        embedding.check_width(self, self.width)


class Head(NamedTuple):
    """From the features of a token to logits; the table of the tokens is the last factor."""

    w: Array  # [D, E]
    b: Array  # [E]
    norm: norm.Params  # of E channels
    output_bias: Array  # [V]


class Pooler(NamedTuple):
    """From the features of the first token to the vector of the text."""

    w: Array  # [D, D]
    b: Array  # [D]


class Params(NamedTuple):
    """The vectors of tokens, the layers, and what the config asks for besides."""

    embedding: embedding.Params
    stack: transformer.Params
    head: Head | None = None
    pooler: Pooler | None = None


class Options(CommonOptions, total=False):
    """All keywords of `apply`."""

    positions: Array | None
    types: Array | None


def init_params(key: Array, config: Config) -> Params:
    """Parameters of the model.

    Raises:
      TypeError: if key is no PRNG key.
      ValueError: if config.vocab_size is not set.
    """
    arguments.init("encoder.init_params", key, config, Config)
    if config.vocab_size is None:
        raise ValueError("encoder.init_params: config.vocab_size must be a number, got None; set it.")
    key_embedding, key_stack, key_head, key_pooler = jax.random.split(key, 4)
    d, e = config.d_model, config.token_width
    head, pooler = None, None
    if config.head:
        w = jax.random.normal(key_head, (d, e)) * d**-0.5
        scaled = norm.init_params(None, norm.Config(d_model=e, norm=config.norm))
        head = Head(w, jnp.zeros(e), scaled, jnp.zeros(config.vocab_size))
    if config.pooled:
        pooler = Pooler(jax.random.normal(key_pooler, (d, d)) * d**-0.5, jnp.zeros(d))
    stack = transformer.init_params(key_stack, config)
    return Params(embedding.init_params(key_embedding, config), stack, head, pooler)


def attentions(params: Params) -> dict[str, attention.Params]:
    """As `attention.attentions`: "attention", every leaf [L, ...]."""
    return transformer.attentions(params.stack)


def with_attentions(params: Params, changed: dict[str, attention.Params]) -> Params:
    """The parameters with some attentions replaced."""
    return params._replace(stack=transformer.with_attentions(params.stack, changed))


@arguments.shown
def apply(params: Params, tokens: Array, config: Config, **options: Unpack[Options]) -> Array:
    """Logits of the token at every place, which is of use where it is hidden.

    Args:
      params: from `init_params`.
      tokens: integers [..., T], from 0 to V - 1; others as in `embedding.apply`.
      config: the shape, with a head; static under jit.
      mask: which token may attend to which, as in `attention.apply`: of padded texts `masks.lengths(…)`, or
        `masks.dense(array[:, None, None, :])` of booleans [B, T] that are True at real tokens. None: all to all.
      types: integers [..., T], the kinds of tokens, as in `embedding.apply`.
      positions: integers [T] or [..., T]; 0, 1, 2, … if None.
      score: as in `attention.apply`, of all layers.
      gates: `PerAttention(attention=…)`, [L, N] or [L, ..., N].
      interventions: `PerAttention(attention=…)`, every leaf [L, ...].
      kernel: as in `attention.apply`.
      dropout_key: PRNG key; None is evaluation.

    Returns:
      float32 [..., T, V].

    Raises:
      ValueError: for a model without a head, and tokens that are not in the vocabulary; else as `attention.apply`.

    >>> config = Config(d_model=16, num_heads=4, num_layers=2, vocab_size=11)
    >>> apply(init_params(jax.random.key(0), config), jnp.ones((3, 5), int), config).shape
    (3, 5, 11)
    """
    arguments.named("encoder.apply", options, Options, capture="write encoder.apply_captured, which returns it")
    return logits(params, features(params, tokens, config, **options), config)


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
    """`features`, and the arrays named in `attention.CAPTURES`, [L, ..., N, …].

    Args:
      params, tokens, config: as in `apply`, and so are its options.
      capture: names, of every layer, head and row; an `interventions.Capture` chooses some.
      real: bool [..., T], False for padding, whose queries "column_sums" do not count. None: as in `attention.apply`.
    """
    arguments.named("encoder.apply_captured", options, Options)
    return _run(params, tokens, config, capture=capture, real=real, **options)


@arguments.shown
def features(params: Params, tokens: Array, config: Config, **options: Unpack[Options]) -> Array:
    """The vectors of the tokens in their text, [..., T, D]. Options as in `apply`."""
    arguments.named("encoder.features", options, Options)
    return _run(params, tokens, config, **options)[0]


def logits(params: Params, features: Array, config: Config) -> Array:
    """Of the token at every place, float32 [..., T, V], from features [..., T, D].

    Raises:
      ValueError: for a model without a head.
    """
    return (
        embedding.logits(params.embedding.tokens, head_features(params, features, config)) + _head(params).output_bias
    )


def head_features(params: Params, features: Array, config: Config) -> Array:
    """What the table is multiplied with for the logits, [..., T, E]: for losses that never hold [..., T, V]."""
    head = jax.tree.map(lambda w: w.astype(features.dtype), _head(params))
    bent = mlp.activation(config.activation)(features @ head.w + head.b)
    return norm.apply(head.norm, bent, config)


def pooled(params: Params, features: Array) -> Array:
    """The vector of a text, [..., D], from its features [..., T, D].

    Raises:
      ValueError: for a model without it.
    """
    if params.pooler is None:
        raise ValueError("encoder.pooled: params have no pooler; Config(pooled=True) makes one.")
    w, b = (a.astype(features.dtype) for a in params.pooler)
    return jnp.tanh(features[..., 0, :] @ w + b)


def stages(
    params: Params, tokens: Array, config: Config, *, mask: Mask | ArrayLike | None = None,
    score: Callable[[Any, Any, Any, Any], Any] | None = None, positions: Array | None = None,
    types: Array | None = None,
) -> tuple[Stage]:  # fmt: skip
    """The one stack of the model, as it is run on these tokens. Arguments as in `apply`."""
    positions = jnp.arange(tokens.shape[-1]) if positions is None else positions
    options = {
        "mask": masks.as_mask(mask, "encoder.apply"), "positions": positions, "rotate": embedding.rotation(config)
    } | ({} if score is None else {"score": score})  # fmt: skip
    x = embedding.apply(params.embedding, tokens, config, positions=positions, types=types)
    return (Stage(params.stack, config, x, options, {name: name for name in NAMES}),)


def _run(
    params: Params, tokens: Array, config: Config, *, capture: Captures = (), real: Array | None = None, **options: Any
) -> tuple[Array, PerAttention[dict[str, Array]]]:
    arguments.order("encoder.apply(params, tokens, config)", params, config, Params, Config, tokens=tokens)
    given = {name: options.pop(name) for name in ("mask", "score", "positions", "types") if name in options}
    of_model = stages(params, tokens, config, **given)
    x, _, seen = transformer.run_stages("encoder.apply", of_model, capture=capture, real=real, **options)
    return x, seen


def _head(params: Params) -> Head:
    if params.head is None:
        raise ValueError("encoder.logits: params have no head for masked tokens; Config(head=True) makes one.")
    return params.head
