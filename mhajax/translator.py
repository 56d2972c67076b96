"""An encoder-decoder Transformer: a sentence in, its translation out, word by word.

References:
  Vaswani et al. 2017, section 3, with normalisation before each part and one table of embeddings for source, target and
  logits (their section 3.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments, attention, block, embedding, masks, transformer
from mhajax import cache as caches
from mhajax.attention import KeysValues
from mhajax.attentions import PerAttention
from mhajax.block import Captures
from mhajax.interventions import Intervention
from mhajax.kernels import Path
from mhajax.transformer import Caches, Stage

NAMES = ("encoder", "decoder", "cross")


@dataclass(frozen=True, kw_only=True)
class Config(block.Config, embedding.Config):
    """Two stacks of the same layers, and the vocabulary that both languages share.

    Attributes:
      encoder_layers: layers that read the source.
      decoder_layers: layers that write the target; each also attends to the encoder's output.
      unroll, final_norm: as in `transformer.Config`.
    """

    encoder_layers: int
    decoder_layers: int
    unroll: int = 1
    final_norm: bool = True

    def __post_init__(self):
        block.Config.__post_init__(self)
        embedding.Config.__post_init__(self)
        arguments.integers(self, "encoder_layers", "decoder_layers", "unroll")
        arguments.booleans(self, "final_norm")
        embedding.check_width(self, self.width)
        if self.token_width != self.d_model:
            raise ValueError(
                f"embedding_width must be None or d_model={self.d_model}, since the table also gives the logits, got "
                f"{self.embedding_width}."
            )

    def stack(self, num_layers: int) -> transformer.Config:
        """One of the two stacks."""
        shared = {
            field.name: getattr(self, field.name) for field in fields(transformer.Config) if hasattr(self, field.name)
        }
        return transformer.Config(**{**shared, "num_layers": num_layers})

    @property
    def encoder(self) -> transformer.Config:
        """The stack that reads."""
        return self.stack(self.encoder_layers)

    @property
    def decoder(self) -> transformer.Config:
        """The stack that writes."""
        return self.stack(self.decoder_layers)


class Params(NamedTuple):
    """The vectors of tokens, which also give the logits, and the two stacks."""

    embedding: embedding.Params
    encoder: transformer.Params
    decoder: transformer.Params


class Options(TypedDict, total=False):
    """All keywords of `apply`."""

    source_lengths: Array | None
    gates: Mapping[str, Any] | None
    interventions: Mapping[str, Intervention] | None
    kernel: str | Path
    dropout_key: Array | None


class State(NamedTuple):
    """A translation under way: what the decoder has written, and what it can read."""

    written: Caches  # of the decoder's layers
    source: tuple[KeysValues, ...]  # for each of the decoder's layers
    source_lengths: Array | None  # [...]


def init_params(key: Array, config: Config) -> Params:
    """Parameters of the model.

    Raises:
      TypeError: if key is no PRNG key.
      ValueError: if config.vocab_size is not set.
    """
    arguments.init("translator.init_params", key, config, Config)
    if config.vocab_size is None:
        raise ValueError("translator.init_params: config.vocab_size must be a number, got None; set it.")
    key_embedding, key_encoder, key_decoder = jax.random.split(key, 3)
    return Params(
        embedding.init_params(key_embedding, config),
        transformer.init_params(key_encoder, config.encoder),
        transformer.init_params(key_decoder, config.decoder, cross=True),
    )


def attentions(params: Params) -> dict[str, attention.Params]:
    """As `attention.attentions`: "encoder", "decoder" and "cross", every leaf [L, ...]."""
    read, written = transformer.attentions(params.encoder), transformer.attentions(params.decoder)
    return {"encoder": read["attention"], "decoder": written["attention"], "cross": written["cross"]}


def with_attentions(params: Params, changed: dict[str, attention.Params]) -> Params:
    """The parameters with some attentions replaced."""
    within = {"encoder": ("encoder", "attention"), "decoder": ("decoder", "attention"), "cross": ("decoder", "cross")}
    for name, one in changed.items():
        stack, place = within[name]
        params = params._replace(**{stack: transformer.with_attentions(getattr(params, stack), {place: one})})
    return params


@arguments.shown
def apply(params: Params, source: Array, target: Array, config: Config, **options: Unpack[Options]) -> Array:
    """Logits of the next target word at every place.

    Args:
      params: from `init_params`.
      source: integers [..., S], from 0 to V - 1. Others are refused; under jit, where they are not known, they give NaN
        wherever they are seen, as in `embedding.embed`.
      target: integers [..., T], beginning with the token that begins every sentence; place t sees target[: t + 1].
      config: the shape; static under jit.
      source_lengths: integers [...], real tokens of every source; None is all.
      gates: `PerAttention` of factors of the heads' outputs, [L, N], [L, ..., N] or [L, ..., N, T], for encoder,
        decoder and cross.
      interventions: `PerAttention` whose every leaf has a leading L, or no axes at all.
      kernel: as in `attention.apply`.
      dropout_key: PRNG key; None is evaluation.

    Returns:
      float32 [..., T, V].

    Raises:
      ValueError, TypeError: for tokens that are not in the vocabulary; else as `attention.apply`.
    """
    instead = {"capture": "write translator.apply_captured, which returns it", "mask": "write source_lengths="}
    arguments.named("translator.apply", options, Options, **instead)
    x = features(params, source, target, config, **options)
    return embedding.logits(params.embedding.tokens, x)


@arguments.shown
def apply_captured(
    params: Params,
    source: Array,
    target: Array,
    config: Config,
    *,
    capture: Captures = ("weights",),
    real: Array | None = None,
    **options: Unpack[Options],
) -> tuple[Array, PerAttention[dict[str, Array]]]:
    """`apply`, and the arrays named in `attention.CAPTURES`, [L, ..., N, …].

    Args:
      params, source, target, config: as in `apply`, and so are the options.
      capture: names, or an `interventions.Capture` that chooses layers, heads and rows, of all three kinds of
        attention; a `PerAttention` says what of which kind.
      real: bool [..., T], False for padding of the target, whose queries "column_sums" of decoder and cross attention
        then do not count. None: all count. (Those of the encoder count what source_lengths say. Everything else has an
        axis of queries, where padding is the caller's to leave out.)
    """
    arguments.named("translator.apply_captured", options, Options)
    x, seen = _run(params, source, target, config, capture=capture, real=real, **options)
    return embedding.logits(params.embedding.tokens, x), seen


@arguments.shown
def features(params: Params, source: Array, target: Array, config: Config, **options: Unpack[Options]) -> Array:
    """What the logits are computed from, [..., T, D]: for losses that never hold [..., T, V]. Options as in `apply`."""
    arguments.named("translator.features", options, Options)
    return _run(params, source, target, config, **options)[0]


def logits(params: Params, features: Array, config: Config) -> Array:
    """Of the token after every one of the target, float32 [..., T, V], from features [..., T, D]."""
    del config  # the table is all that it takes; other models need more
    return embedding.logits(params.embedding.tokens, features)


def begin(
    params: Params, source: Array, capacity: int, config: Config, *, source_lengths: Array | None = None,
    gates: Mapping[str, Any] | None = None, interventions: Mapping[str, Intervention] | None = None,
    kernel: str | Path = "auto",
) -> State:  # fmt: skip
    """Read the source [..., S] and make room for a translation of `capacity` tokens. Arguments as in `apply`."""
    _check_source(params, source, config, source_lengths)
    block.changes("translator.begin", gates, interventions, NAMES)
    stage = _reading(params, source, config, source_lengths)
    memory, _, _ = transformer.run_stage(stage, (), gates=gates, interventions=interventions, kernel=kernel)
    projected = transformer.keys_values(params.decoder, memory, config, masked=source_lengths is not None)
    room = transformer.init_cache(source.shape[:-1], capacity, config.decoder, memory.dtype)
    return State(room, transformer.unstacked(projected), source_lengths)


def extend(
    params: Params, target: Array, state: State, config: Config, *,
    gates: Mapping[str, Any] | None = None, interventions: Mapping[str, Intervention] | None = None,
    kernel: str | Path = "auto", real: Array | None = None,
) -> tuple[Array, State]:  # fmt: skip
    """Logits [..., t, V] of t more target tokens [..., t], and the translation with them.

    The logits equal those of `apply` on the whole target. `real` is bool [..., t], False for padding, as in
    `cache.extend`. More tokens than `begin` made room for are refused, or give NaN under jit; whether that has
    happened, `cache.overflowed` of the new state says.
    """
    block.changes("translator.extend", gates, interventions, NAMES)
    places = caches.positions(state.written[0], target.shape[-1], real)
    stage = _writing(params, target, config, state.source_lengths, places)
    stage.options["positions"] = None  # of the layers' caches, which know them
    x, written, _ = transformer.run_stage(
        stage, (), memory=state.source, cache=state.written, real=real, gates=gates, interventions=interventions,
        kernel=kernel,
    )  # fmt: skip
    return embedding.logits(params.embedding.tokens, x), state._replace(written=written)


def unstack(params: Params) -> Params:
    """The same parameters for a loop over tokens with `extend`: `transformer.unstack` of the decoder."""
    return params._replace(decoder=transformer.unstack(params.decoder))


def select(state: State, rows: Array) -> State:
    """The translations of these rows of the batch, in this order; rows may repeat. For sources [B, S].

    Raises:
      ValueError: for a row that is known not to be there, as `cache.select`.
    """
    arguments.below("translator.select", "rows", rows, state.source[0].k.shape[0], "sentences")
    lengths = None if state.source_lengths is None else state.source_lengths[rows]
    return State(transformer.select(state.written, rows), jax.tree.map(itemgetter(rows), state.source), lengths)


def stages(
    params: Params, source: Array, target: Array, config: Config, *, source_lengths: Array | None = None
) -> tuple[Stage, Stage]:
    """The two stacks, as they are run on these sentences: one reads, one writes. Arguments as in `apply`."""
    places = jnp.arange(target.shape[-1])
    return _reading(params, source, config, source_lengths), _writing(params, target, config, source_lengths, places)


def _reading(params: Params, source: Array, config: Config, source_lengths: Array | None) -> Stage:
    positions = jnp.arange(source.shape[-1])
    x = embedding.apply(params.embedding, source, config, positions=positions)
    options = {"mask": _real(source_lengths), "positions": positions, "rotate": embedding.rotation(config)}
    return Stage(params.encoder, config.encoder, x, options, {"attention": "encoder"})


def _writing(params: Params, target: Array, config: Config, source_lengths: Array | None, positions: Array) -> Stage:
    x = embedding.apply(params.embedding, target, config, positions=positions)
    options = {
        "mask": masks.causal(), "memory_mask": _real(source_lengths), "positions": positions,
        "rotate": embedding.rotation(config),
    }  # fmt: skip
    return Stage(params.decoder, config.decoder, x, options, {"attention": "decoder", "cross": "cross"}, reads=0)


def _run(
    params: Params, source: Array, target: Array, config: Config, *, source_lengths: Array | None = None,
    capture: Captures = (), real: Array | None = None, **options: Any,
) -> tuple[Array, PerAttention[dict[str, Array]]]:  # fmt: skip
    call = "translator.apply(params, source, target, config)"
    arguments.order(call, params, config, Params, Config, source=source, target=target)
    if source.shape[:-1] != target.shape[:-1]:
        raise ValueError(
            "translator.apply: source [..., S] and target [..., T] must have the same leading axes, "
            f"got {source.shape} and {target.shape}."
        )
    _check_source(params, source, config, source_lengths)
    of_model = stages(params, source, target, config, source_lengths=source_lengths)
    x, _, seen = transformer.run_stages("translator.apply", of_model, capture=capture, real=real, **options)
    return x, seen


def _check_source(params: Params, source: Array, config: Config, source_lengths: Any) -> None:
    arguments.order("translator.begin(params, source, capacity, config)", params, config, Params, Config, source=source)
    if source_lengths is None:
        return
    if not jnp.issubdtype(jnp.result_type(source_lengths), jnp.integer) or jnp.ndim(source_lengths) >= source.ndim:
        raise TypeError(
            "translator.apply: source_lengths must be integers [...], the number of real tokens of every source "
            f"[..., S] = {source.shape}, got {arguments.kind_of(source_lengths)}; of booleans that are True at real "
            "tokens, which come first, write array.sum(-1)."
        )


def _real(source_lengths: Array | None) -> masks.Mask | None:
    return None if source_lengths is None else masks.lengths(source_lengths)
