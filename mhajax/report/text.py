"""A model of one text as the examination of its heads needs it: a language model, or an encoder with masked tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from experiments import tables
from experiments.data import batches
from experiments.data.vocabulary import Vocabulary
from experiments.errors import DataError
from experiments.heads.examined import Examined, Kind, Sentence, Words, nats
from mhajax.heads import ablation

FEWEST = 4  # windows: two to choose heads on, two to report
HIDDEN = 0.15  # of the tokens, for an encoder (Devlin et al. 2019, section 3.1)


class Windows(NamedTuple):
    """A batch of windows of a text.

    Attributes:
      tokens: the text, [B, T].
      read: what a model reads that predicts: of an encoder some tokens are hidden, [B, T].
      wanted: what is to be predicted at every place, [B, T].
      predicted: bool, where something is to be predicted, [B, T].
      lengths: [B].
      index: the number of each window, [B]; -1 in rows that fill the batch up.
    """

    tokens: np.ndarray
    read: np.ndarray
    wanted: np.ndarray
    predicted: np.ndarray
    lengths: np.ndarray
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody searches this tuple)


class Text(NamedTuple):
    """A text, and how its tokens are shown.

    Attributes:
      ids: its tokens.
      length: of a window.
      rows: windows that are computed together.
      unit: what a token is, for a reader: "word", "character" or "token".
      pieces: tokens → each in letters.
      decode: tokens → the text.
      origin: what it is, for a reader.
    """

    ids: np.ndarray
    length: int
    rows: int
    unit: str
    pieces: Callable[[Sequence[int]], list[str]]
    decode: Callable[[Sequence[int]], str]
    origin: str


def held_out(validation: str, words: Vocabulary, windows: tables.Windows, count: int) -> Text:
    """The first windows of the validation text of a run.

    Raises:
      DataError: there are too few for intervals.
    """
    ids = np.asarray(words.encode(validation), np.int32)[: count * windows.length + 1]
    check_room(len(ids), windows.length)
    origin = "windows of the validation text, which was not trained on, but whose loss chose the best parameters"
    return Text(ids, windows.length, windows.size, words.unit, words.pieces, words.decode, origin)


def check_room(tokens: int, length: int) -> None:
    """Raise a DataError unless a text has windows enough for a report about heads."""
    if tokens - 1 <= (FEWEST - 1) * length:
        raise DataError(
            f"heads: a report needs {FEWEST} windows of text, got {max(tokens - 1, 0):,} held-out tokens in windows of "
            f"{length}; give more text, or shorter windows (batches.length of a config)."
        )


def hidden_places(number: int, length: int, rate: float = HIDDEN) -> np.ndarray:
    """Which tokens of a window are hidden, bool [length]: the same ones whoever asks."""
    return np.random.default_rng(max(number, 0)).random(length) < rate


def of_text(model: ModuleType, shape: Any, text: Text, hidden: int | None = None) -> Examined:
    """Any model of one stack that predicts tokens.

    Args:
      model: `mhajax.language_model`, `mhajax.encoder`, or another module with their functions.
      shape: its config.
      text: what it reads.
      hidden: the token that stands for a hidden one, of a model whose heads see all and which predicts those; None: its
        heads see what comes before, and it predicts what comes next.
    """
    causal, length, rows = hidden is None, text.length, text.rows
    held_out = []
    for batch in batches.windows(text.ids, batch_size=rows, length=length):
        number = np.arange(rows) + len(held_out) * rows
        index = np.where(batch.lengths > 0, number, batches.FILLER)
        tokens, there = batch.tokens[:, :-1], np.arange(length) < batch.lengths[:, None]
        if hidden is None:
            held_out.append(Windows(tokens, tokens, batch.tokens[:, 1:], there, batch.lengths, index))
        else:
            chosen = there & np.stack([hidden_places(int(n), length) for n in number])
            read = np.where(chosen, hidden, tokens)
            held_out.append(Windows(tokens, read, tokens, chosen, batch.lengths, index))

    def real(batch: Windows) -> np.ndarray:
        return np.arange(length) < batch.lengths[:, None]

    def visible(batch: Windows) -> np.ndarray:
        whole = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
        return real(batch)[:, :, None] & real(batch)[:, None, :] & whole

    def options(batch: Windows) -> dict[str, Any]:
        return {} if causal else {"mask": real(batch)[:, None, None, :]}

    def surprise(params: Any, features: Array, batch: Windows) -> Array:
        wanted: Any = batch.wanted
        return nats(model.logits(params, features, shape), wanted)

    def capture(params: Any, batch: Windows, names: Sequence[str]):
        return {"self": model.apply_captured(params, batch.tokens, shape, capture=names, **options(batch))[1].attention}

    def losses(params: Any, batch: Windows, gates: dict[str, Array]) -> Array:
        features = model.features(params, batch.read, shape, gates={"attention": gates["self"]}, **options(batch))
        return surprise(params, features, batch)

    def ablated(params: Any, batch: Windows, sums: Callable[[Array], Array]) -> dict[str, Array]:
        stages = model.stages(params, batch.read, shape, **options(batch))
        loss_fn = lambda features: sums(surprise(params, features, batch))  # noqa: E731
        return {"self": ablation.of_stages(stages, loss_fn).attention}

    def sentence(batch: Windows, row: int) -> Sentence:
        ids = [int(token) for token in batch.tokens[row, : batch.lengths[row]]]
        pieces = text.pieces(ids)
        both = Words(pieces, pieces)
        return Sentence({"self": both}, both, text.decode(ids))

    return Examined(
        kinds=(Kind("self", "Attention of the text to itself", shape.num_layers, shape.num_heads),),
        origin=text.origin, unit=text.unit, sequence="window",
        batches=held_out, index=lambda batch: batch.index, capture=capture,
        visible=lambda batch: {"self": visible(batch)}, tokens=lambda batch: {"self": (batch.tokens, batch.tokens)},
        losses=losses, ablated=ablated, predicted=lambda batch: batch.predicted[..., None],
        categories=(f"all {text.unit}s",),
        right=lambda batch: {}, relations=(), rules=lambda batch, relation: {}, sentence=sentence,
    )  # fmt: skip
