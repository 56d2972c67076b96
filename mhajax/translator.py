"""An encoder-decoder Transformer: a sentence in, its translation out, word by word.

References:
  Vaswani et al. 2017, section 3, with normalisation before each part and one table of embeddings for source, target and
  logits (their section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments, attention, block, embedding, masks, transformer
from mhajax import cache as caches
from mhajax.attention import KeysValues
from mhajax.dropout import dropout
from mhajax.interventions import Capture, Intervention, as_capture
from mhajax.transformer import Caches


@dataclass(frozen=True, kw_only=True)
class Config(block.Config):
    """Two stacks of the same layers, and the words.

    Attributes:
      encoder_layers: layers that read the source.
      decoder_layers: layers that write the target; each also attends to the encoder's output.
      unroll: as in `transformer.Config`.
      vocab_size: V, of the vocabulary that both languages share. An experiment fills it in from its data.
      positions: "rotary" (in the attentions of a text to itself), "sinusoidal" (added to the embedding) or "none".
    """

    encoder_layers: int
    decoder_layers: int
    unroll: int = 1
    vocab_size: int | None = None
    positions: embedding.Positions = "rotary"

    def __post_init__(self):
        block.Config.__post_init__(self)
        arguments.integers(self, "encoder_layers", "decoder_layers", "unroll")
        arguments.integers(self, "vocab_size", optional=True)
        embedding.check_kind(self.positions)
        embedding.check_width(self.positions, self.width)

    def stack(self, num_layers: int) -> transformer.Config:
        """One of the two stacks."""
        own = {"encoder_layers", "decoder_layers", "vocab_size", "positions"}
        shared = {name: value for name, value in vars(self).items() if name not in own}
        return transformer.Config(num_layers=num_layers, **shared)

    @property
    def encoder(self) -> transformer.Config:
        """The stack that reads."""
        return self.stack(self.encoder_layers)

    @property
    def decoder(self) -> transformer.Config:
        """The stack that writes."""
        return self.stack(self.decoder_layers)


class Params(NamedTuple):
    """The table of embeddings, which also gives the logits, and the two stacks."""

    embedding: Array  # [V, D]
    encoder: transformer.Params
    decoder: transformer.Params


class Interventions(NamedTuple):
    """What is changed in the three kinds of attention; every leaf has a leading L, or no axes at all."""

    encoder: Intervention = Intervention()
    decoder: Intervention = Intervention()
    cross: Intervention = Intervention()


class Captures(NamedTuple):
    """What is looked at in the three kinds of attention."""

    encoder: Sequence[str] | Capture = ()
    decoder: Sequence[str] | Capture = ()
    cross: Sequence[str] | Capture = ()


class Gates(NamedTuple):
    """A factor for every head's output, [L, N], [L, ..., N] or [L, ..., N, T]; None for 1."""

    encoder: Array | None = None
    decoder: Array | None = None
    cross: Array | None = None


class Options(TypedDict, total=False):
    """All keywords of `apply`."""

    source_lengths: Array | None
    gates: Gates
    interventions: Interventions
    kernel: str
    dropout_key: Array | None


class Seen(NamedTuple):
    """What was captured: a dict with arrays [L, ...] for each of the three kinds of attention."""

    encoder: dict[str, Array]
    decoder: dict[str, Array]
    cross: dict[str, Array]


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
        embedding.init_params(key_embedding, config.vocab_size, config.d_model),
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
      gates: `Gates`.
      interventions: `Interventions`.
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
    return embedding.logits(params.embedding, x)


@arguments.shown
def apply_captured(
    params: Params,
    source: Array,
    target: Array,
    config: Config,
    *,
    capture: Sequence[str] | Capture | Captures = ("weights",),
    real: Array | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Seen]:
    """`apply`, and the arrays named in `attention.CAPTURES`, [L, ..., N, …].

    Args:
      params, source, target, config: as in `apply`, and so are the options.
      capture: names, or an `interventions.Capture` that chooses layers, heads and rows, of all three kinds of
        attention; `Captures` says which of which kind.
      real: bool [..., T], False for padding of the target, whose queries "column_sums" of decoder and cross attention
        then do not count. None: all count. (Those of the encoder count what source_lengths say. Everything else has an
        axis of queries, where padding is the caller's to leave out.)
    """
    arguments.named("translator.apply_captured", options, Options)
    x, seen = _run(params, source, target, config, capture=capture, real=real, **options)
    return embedding.logits(params.embedding, x), seen


@arguments.shown
def features(params: Params, source: Array, target: Array, config: Config, **options: Unpack[Options]) -> Array:
    """What the logits are computed from, [..., T, D]: for losses that never hold [..., T, V]. Options as in `apply`."""
    arguments.named("translator.features", options, Options)
    return _run(params, source, target, config, **options)[0]


def begin(
    params: Params, source: Array, capacity: int, config: Config, *, source_lengths: Array | None = None,
    gates: Gates = Gates(),  # noqa: B008 - an immutable tuple
    interventions: Interventions = Interventions(),  # noqa: B008
    kernel: str = "auto",
) -> State:  # fmt: skip
    """Read the source [..., S] and make room for a translation of `capacity` tokens."""
    options = {"gates": gates, "interventions": interventions, "kernel": kernel}
    memory, _ = _encode(params, source, config, source_lengths=source_lengths, **options)
    return State(
        transformer.init_cache(source.shape[:-1], capacity, config.decoder, memory.dtype),
        transformer.unstacked(
            transformer.keys_values(params.decoder, memory, config, masked=source_lengths is not None)
        ),
        source_lengths,
    )


def extend(
    params: Params, target: Array, state: State, config: Config, *,
    gates: Gates = Gates(),  # noqa: B008 - an immutable tuple
    interventions: Interventions = Interventions(),  # noqa: B008
    kernel: str = "auto",
    real: Array | None = None,
) -> tuple[Array, State]:  # fmt: skip
    """Logits [..., t, V] of t more target tokens [..., t], and the translation with them.

    The logits equal those of `apply` on the whole target. `real` is bool [..., t], False for padding, as in
    `cache.extend`. More tokens than `begin` made room for are refused, or give NaN under jit; whether that has
    happened, `cache.overflowed` of the new state says.
    """
    x, written, _ = _decode(
        params, target, state.source, config,
        source_lengths=state.source_lengths, cache=state.written, real=real, gates=gates, interventions=interventions,
        kernel=kernel,
    )  # fmt: skip
    return embedding.logits(params.embedding, x), state._replace(written=written)


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


def _run(
    params: Params, source: Array, target: Array, config: Config, *, source_lengths: Array | None = None,
    dropout_key: Array | None = None, capture: Sequence[str] | Capture | Captures = (), real: Array | None = None,
    **options: Any,
) -> tuple[Array, Seen]:  # fmt: skip
    call = "translator.apply(params, source, target, config)"
    arguments.order(call, params, config, Params, Config, source=source, target=target)
    if source.shape[:-1] != target.shape[:-1]:
        raise ValueError(
            "translator.apply: source [..., S] and target [..., T] must have the same leading axes, "
            f"got {source.shape} and {target.shape}."
        )
    if dropout_key is not None:
        arguments.key("translator.apply", dropout_key, "dropout_key")
    key_source, key_target = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    options = {"source_lengths": source_lengths, "capture": _as_captures(capture), **options}
    memory, seen_source = _encode(params, source, config, dropout_key=key_source, **options)
    x, _, seen = _decode(params, target, memory, config, dropout_key=key_target, real=real, **options)
    return x, Seen(seen_source.attention, seen.attention, seen.cross)


def _encode(
    params, source, config, *, source_lengths, gates=Gates(), interventions=Interventions(), kernel="auto",  # noqa: B008
    dropout_key=None, capture=Captures(),  # noqa: B008
):  # fmt: skip
    _check_source(params, source, config, source_lengths, gates, interventions)
    positions = jnp.arange(source.shape[-1])
    x, key = _embed(params, source, positions, config, dropout_key)
    x, _, seen = transformer.run(
        params.encoder, x, config.encoder,
        mask=_real(source_lengths), positions=positions, rotate=embedding.rotation(config.positions),
        gates=block.Gates(gates.encoder), interventions=block.Interventions(interventions.encoder), kernel=kernel,
        dropout_key=key, capture=block.Captures(capture.encoder),
    )  # fmt: skip
    return x, seen


def _decode(
    params, target, memory, config, *, source_lengths, gates=Gates(), interventions=Interventions(),  # noqa: B008
    kernel="auto", cache=None, real=None, dropout_key=None, capture=Captures(),  # noqa: B008
):  # fmt: skip
    _check_changes(gates, interventions)
    positions = jnp.arange(target.shape[-1]) if cache is None else None
    places = positions if cache is None else caches.positions(cache[0], target.shape[-1], real)
    x, key = _embed(params, target, places, config, dropout_key)
    return transformer.run(
        params.decoder, x, config.decoder,
        memory=memory, mask=masks.causal(), memory_mask=_real(source_lengths), positions=positions,
        rotate=embedding.rotation(config.positions), gates=block.Gates(gates.decoder, gates.cross),
        interventions=block.Interventions(interventions.decoder, interventions.cross), kernel=kernel,
        cache=cache, real=real, dropout_key=key, capture=block.Captures(capture.decoder, capture.cross),
    )  # fmt: skip


def _embed(params, tokens, positions, config, dropout_key):
    key_embedding, key_stack = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    x = embedding.embed(params.embedding, tokens, positions, config.positions)
    return dropout(x, config.dropout, key_embedding), key_stack


def _check_source(params, source, config, source_lengths, gates, interventions) -> None:
    arguments.order("translator.begin(params, source, capacity, config)", params, config, Params, Config, source=source)
    _check_changes(gates, interventions)
    if source_lengths is None:
        return
    if not jnp.issubdtype(jnp.result_type(source_lengths), jnp.integer) or jnp.ndim(source_lengths) >= source.ndim:
        raise TypeError(
            "translator.apply: source_lengths must be integers [...], the number of real tokens of every source "
            f"[..., S] = {source.shape}, got {arguments.kind_of(source_lengths)}; of booleans that are True at real "
            "tokens, which come first, write array.sum(-1)."
        )


def _check_changes(gates: Any, interventions: Any) -> None:
    """Raise a TypeError unless gates and interventions say which attentions they are for."""
    write = "(encoder=…, decoder=…, cross=…)"
    arguments.instance("translator.apply", "gates", gates, Gates, f"translator.Gates{write}")
    arguments.instance(
        "translator.apply", "interventions", interventions, Interventions, f"translator.Interventions{write}"
    )


def _real(source_lengths: Array | None) -> masks.Mask | None:
    return None if source_lengths is None else masks.lengths(source_lengths)


def _as_captures(given: Sequence[str] | Capture | Captures) -> Captures:
    return Captures(*map(as_capture, given)) if isinstance(given, Captures) else Captures(*[as_capture(given)] * 3)
