"""A trained model as the examination of its heads needs it: functions of parameters and batches, and what is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import work
from experiments.heads import gold


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


def nats(logits: Array, targets: Array) -> Array:
    """-log p of every target, [B, T], by logits [B, T, V]."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
