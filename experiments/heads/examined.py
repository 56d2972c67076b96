"""A trained model as the examination of its heads needs it: functions of parameters and batches, and what is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import work
from experiments.config import Translation
from experiments.data import batches, corpora
from experiments.data.grammar import Pair
from experiments.data.vocabulary import Vocabulary
from experiments.heads import gold
from mhajax import embedding, translator
from mhajax.heads import ablation


class Kind(NamedTuple):
    """One of the attentions of a model.

    Attributes:
      name: "encoder", "decoder", "cross", or "self" of a language model.
      title: for a reader.
      layers, heads: L and N.
    """

    name: str
    title: str
    layers: int
    heads: int


class Words(NamedTuple):
    """The words of the queries and of the keys."""

    queries: list[str]
    keys: list[str]


class Sentence(NamedTuple):
    """One sentence of a batch in words.

    Attributes:
      words: by the kind of attention, the words that are read: the queries of a decoder begin with "begin".
      written: of a translator, the words that are written, and the source.
      text: the sentence as a title.
    """

    words: dict[str, Words]
    written: Words
    text: str

    @property
    def length(self) -> int:
        """Words of the longest of them."""
        return max(len(side) for words in self.words.values() for side in words)


class Examined(NamedTuple):
    """What the measures take. Sentences are rows of batches; a row of filling has index -1.

    Attributes:
      kinds: the attentions.
      origin: what its sentences are, for a reader.
      unit: what a token is, for a reader: "word", "character" or "token".
      sequence: what a row of a batch is: "sentence" or "window".
      batches: the held-out sentences.
      index: batch → [B] number of the sentence.
      capture: (params, batch, names) → {kind: {name: [L, B, N, …]}}.
      visible: batch → {kind: bool [B, T, S]}: which query may attend to which key, real tokens only.
      tokens: batch → {kind: (query tokens [B, T], key tokens [B, S])}.
      losses: (params, batch, gates) → [B, T]: nats of every predicted word; gates are {kind: [L, N]}.
      ablated: (params, batch, sums) → {kind: [L, R, N]}: the losses without each head; `sums` is from nats [B, T] to
        [R] losses.
      predicted: batch → bool [B, T, C]: which of them count, and for which category.
      categories: the C names; the first is all words.
      right: batch → {key of the relation: bool [B, T, S]}; empty without gold.
      relations: what is asked where there is gold.
      rules: (batch, relation) → {rule: bool [B, T, S]}: what can be guessed without attention, as in `gold.rules`.
      sentence: (batch, row) → words.
    """

    kinds: tuple[Kind, ...]
    origin: str
    unit: str
    sequence: str
    batches: list[Any]
    index: Callable[[Any], np.ndarray]
    capture: Callable[[Any, Any, Sequence[str]], Mapping[str, dict[str, Array]]]
    visible: Callable[[Any], dict[str, np.ndarray]]
    tokens: Callable[[Any], dict[str, tuple[np.ndarray, np.ndarray]]]
    losses: Callable[[Any, Any, dict[str, Array]], Array]
    ablated: Callable[[Any, Any, Callable[[Array], Array]], Mapping[str, Array]]
    predicted: Callable[[Any], np.ndarray]
    categories: tuple[str, ...]
    right: Callable[[Any], dict[str, np.ndarray]]
    relations: tuple[gold.Relation, ...]
    rules: Callable[[Any, gold.Relation], dict[str, np.ndarray]]
    sentence: Callable[[Any, int], Sentence]

    def rows(self, batch: Any) -> list[int]:
        """The rows of a batch that are sentences."""
        return [int(row) for row in np.flatnonzero(self.index(batch) >= 0)]

    def watched(self, what: str) -> Iterator[Any]:
        """The batches, shown as a piece of work of so many sentences."""
        with work.piece(what, sum(len(self.rows(batch)) for batch in self.batches), f"{self.sequence}s") as piece:
            for batch in self.batches:
                yield batch
                piece.advance(len(self.rows(batch)))

    @property
    def gates(self) -> dict[str, Array]:
        """A gate of 1 for every head: {kind: [L, N]}."""
        return {kind.name: jnp.ones((kind.layers, kind.heads)) for kind in self.kinds}


def of_translator(config: Translation, corpus: corpora.ParallelCorpus, words: Vocabulary, sentences: int) -> Examined:
    """A translator, on the first sentences of its first test."""
    shape = replace(config.model, vocab_size=words.size)
    test, pairs = next(iter(corpus.tests.items()))
    pairs = pairs[:sentences]
    known = corpus.gold.get(test) if words.kind == "words" else None
    annotated: Sequence[Pair] | None = None if known is None else known[: len(pairs)]
    sources, targets = (words.encode_all([pair[side] for pair in pairs]) for side in (0, 1))
    rows = min(config.decoding.batch // 2 or 1, len(pairs))
    longest = max(len(side) for side in (*sources, *targets)) + 1  # one shape: compiling takes longer than measuring
    both = list(zip(sources, targets, strict=True))
    held_out = list(batches.evaluation_pairs(both, batch_size=rows, boundaries=(longest,)))
    relations = gold.RELATIONS if annotated else ()
    categories = (f"all {words.unit}s", *(gold.CATEGORIES if annotated else ()))

    def sentences_of(batch) -> list[Pair | None]:
        return [None if annotated is None or n < 0 else annotated[n] for n in batch.index]

    def capture(params, batch, names):
        return translator.apply_captured(
            params, batch.source, batch.target[:, :-1], shape, source_lengths=batch.source_lengths, capture=names
        )[1]

    def visible(batch) -> dict[str, np.ndarray]:
        source = np.arange(batch.source.shape[1]) < batch.source_lengths[:, None]
        target = np.arange(batch.target.shape[1] - 1) < batch.target_lengths[:, None]
        past = np.tril(np.ones((target.shape[1],) * 2, bool))
        return {
            "encoder": source[:, :, None] & source[:, None],
            "decoder": target[:, :, None] & past,
            "cross": target[:, :, None] & source[:, None],
        }

    def tokens(batch):
        source, target = batch.source, batch.target[:, :-1]
        return {"encoder": (source, source), "decoder": (target, target), "cross": (target, source)}

    def predicted(batch) -> np.ndarray:
        real = np.arange(batch.target.shape[1] - 1) < batch.target_lengths[:, None]
        parts = [gold.places(gold.CATEGORIES[c], sentences_of(batch), real.shape[1]) for c in categories[1:]]
        return np.stack([real, *parts], axis=-1)

    def losses(params, batch, gates):
        features = translator.features(
            params, batch.source, batch.target[:, :-1], shape,
            source_lengths=batch.source_lengths, gates=gates,
        )  # fmt: skip
        return nats(params.embedding.tokens, features, batch.target[:, 1:])

    def ablated(params, batch, sums):
        readout = lambda features: sums(nats(params.embedding.tokens, features, batch.target[:, 1:]))  # noqa: E731
        stages = translator.stages(
            params, batch.source, batch.target[:, :-1], shape, source_lengths=batch.source_lengths
        )
        return ablation.of_stages(stages, readout)

    def sentence(batch, row: int) -> Sentence:
        number = int(batch.index[row])
        read, written = words.pieces(sources[number]), words.pieces(targets[number])
        source, target = [*read, "end"], ["begin", *written]
        after = [*written, "end"]
        across = [f"{a} → {b}" for a, b in zip(target, after, strict=True)]
        return Sentence(
            {"encoder": Words(source, source), "decoder": Words(target, target), "cross": Words(across, source)},
            Words(after, source), pairs[number][0],
        )  # fmt: skip

    kinds = (
        Kind("encoder", "Encoder: source to source", shape.encoder_layers, shape.num_heads),
        Kind("decoder", "Decoder: target to target", shape.decoder_layers, shape.num_heads),
        Kind("cross", "Cross attention: target to source", shape.decoder_layers, shape.num_heads),
    )
    return Examined(
        kinds=kinds, origin="test sentences, neither trained on nor used to choose the parameters",
        unit=words.unit, sequence="sentence",
        batches=held_out, index=lambda batch: batch.index, capture=capture, visible=visible, tokens=tokens,
        losses=losses, ablated=ablated, predicted=predicted, categories=categories,
        right=lambda batch: {r.key: gold.keys(r, sentences_of(batch), visible(batch)[r.kind]) for r in relations},
        relations=relations, rules=lambda batch, r: gold.rules(r, sentences_of(batch), visible(batch)[r.kind]),
        sentence=sentence,
    )  # fmt: skip


def nats(table: Array, features: Array, targets: Array, bias: Array | float = 0.0) -> Array:
    """-log p of every target, [B, T], by logits from a table [V, E] and a bias [V]."""
    logits = embedding.logits(table, features) + bias
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
