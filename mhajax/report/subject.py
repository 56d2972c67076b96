"""A model as the report about its heads needs it: functions of parameters and batches, and what is known of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.report.progress import Progress

FILLER = -1  # the number of a row that only fills up a batch


class Kind(NamedTuple):
    """One of the attentions of a model.

    Attributes:
      name: "encoder", "decoder", "cross", or "self" of a language model: what its gates and captures are called.
      title: for a reader.
      layers, heads: L and N.
      label: for a reader, in a row of a table.
      is_self: whether queries and keys are the tokens of one text.
    """

    name: str
    title: str
    layers: int
    heads: int
    label: str
    is_self: bool = True


class Relation(NamedTuple):
    """Something that a head may link, and that is known of the text: the subject of a verb, the noun of a pronoun.

    Attributes:
      name: as a reader sees it, query → key.
      kind: the name of the attention that is asked.
      role: a word for a head that does it.
      parts: name of a part → lowest and highest distance |query - key| in it; for relations that may be far.
    """

    name: str
    kind: str
    role: str
    parts: Mapping[str, tuple[int, int]] = {}  # noqa: RUF012

    @property
    def key(self) -> str:
        """A name that no other relation has."""
        return f"{self.kind}: {self.name}"


class Pieces(NamedTuple):
    """The tokens of the queries and of the keys, in letters."""

    queries: Sequence[str]
    keys: Sequence[str]


class Sentence(NamedTuple):
    """One row of a batch in letters.

    Attributes:
      pieces: by the kind of attention, the tokens that are read: the queries of a decoder begin with "begin".
      written: of a translator, the tokens that are written, and the source.
      text: the sentence as a title.
    """

    pieces: Mapping[str, Pieces]
    written: Pieces
    text: str

    @property
    def length(self) -> int:
        """Tokens of the longest of them."""
        return max(len(side) for pieces in self.pieces.values() for side in pieces)


def _no_losses(*_: Any) -> Any:
    raise ValueError(
        "report.examine: subject must have losses, ablated and predicted, got one that says only where heads look; "
        "`report.weights` asks no more."
    )


class Subject(NamedTuple):
    """What the measures take. Sentences are rows of batches; a row of filling has the index `FILLER`.

    Attributes:
      kinds: the attentions.
      origin: what its sentences are, for a reader.
      unit: what a token is, for a reader: "word", "character" or "token".
      sequence: what a row of a batch is: "sentence", "window" or "example".
      batches: the held-out sentences.
      index: batch → [B] number of the sentence.
      capture: (params, batch, names) → {kind: {name: [L, B, N, …]}}.
      visible: batch → {kind: bool [B, T, S]}: which query may attend to which key, valid tokens only.
      tokens: batch → {kind: (query tokens [B, T], key tokens [B, S])}.
      sentence: (batch, row) → that row in letters.
      losses: (params, batch, gates) → [B, T]: nats of every predicted token; gates are {kind: [L, N]}.
      ablated: (params, batch, sums) → {kind: [L, R, N]}: the losses without each head; `sums` is from nats [B, T] to
        [R] losses.
      predicted: batch → bool [B, T, C]: which of them count, and for which category.
      categories: the C names; the first is all tokens.
      gold: batch → {key of the relation: bool [B, T, S]}, the right keys of every query; empty without gold.
      relations: what is asked where there is gold.
      aligned: the key of the relation that says which word of the memory a written word translates; None if there is
        none.
      baselines: (batch, relation) → {name: bool [B, T, S]}: what can be guessed without attention, such as the key at
        a fixed offset; at least one for every relation, and the same names for every batch.
      view_note: what a reader should know of the rows and columns of the view.
    """

    kinds: tuple[Kind, ...]
    origin: str
    unit: str
    sequence: str
    batches: Sequence[Any]
    index: Callable[[Any], np.ndarray]
    capture: Callable[[Any, Any, Sequence[str]], Mapping[str, dict[str, Array]]]
    visible: Callable[[Any], dict[str, np.ndarray]]
    tokens: Callable[[Any], dict[str, tuple[np.ndarray, np.ndarray]]]
    sentence: Callable[[Any, int], Sentence]
    losses: Callable[[Any, Any, dict[str, Array]], Array] = _no_losses
    ablated: Callable[[Any, Any, Callable[[Array], Array]], Mapping[str, Array]] = _no_losses
    predicted: Callable[[Any], np.ndarray] = _no_losses
    categories: tuple[str, ...] = ()
    gold: Callable[[Any], dict[str, np.ndarray]] = lambda batch: {}
    relations: tuple[Relation, ...] = ()
    aligned: str | None = None
    baselines: Callable[[Any, Relation], dict[str, np.ndarray]] = lambda batch, relation: {}
    view_note: str = ""

    def rows(self, batch: Any) -> list[int]:
        """The rows of a batch that are sentences."""
        return [int(row) for row in np.flatnonzero(self.index(batch) != FILLER)]

    @property
    def size(self) -> int:
        """How many sentences there are."""
        return sum(len(self.rows(batch)) for batch in self.batches)

    @property
    def num_heads(self) -> int:
        """How many heads the model has, of all kinds and layers."""
        return sum(kind.layers * kind.heads for kind in self.kinds)

    @property
    def gates(self) -> dict[str, Array]:
        """A gate of 1 for every head: {kind: [L, N]}."""
        return {kind.name: jnp.ones((kind.layers, kind.heads)) for kind in self.kinds}

    def kind(self, name: str) -> Kind:
        """The attention of this name."""
        return next(kind for kind in self.kinds if kind.name == name)

    def aligned_relation(self) -> Relation | None:
        """The relation that `aligned` names."""
        return next((relation for relation in self.relations if relation.key == self.aligned), None)

    def watched(self, what: str, progress: Progress) -> Iterator[Any]:
        """The batches, shown as a piece of work of so many sentences."""
        with progress(what, self.size, f"{self.sequence}s") as piece:
            for batch in self.batches:
                yield batch
                piece.advance(len(self.rows(batch)))


def nats(logits: Array, targets: Array) -> Array:
    """-log p of every target, [B, T], by logits [B, T, V]."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
