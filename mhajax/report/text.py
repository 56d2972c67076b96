"""A model of one text as the report needs it: a language model, or an encoder with hidden tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from mhajax.heads import ablation
from mhajax.report.subject import FILLER, Kind, Pieces, Sentence, Subject, nats

FEWEST = 4  # windows: two to choose heads on, two to report
HIDDEN = 0.15  # of the tokens, for an encoder (Devlin et al. 2019, section 3.1)
FUNCTIONS = ("features", "logits", "apply_captured", "stages")  # that a module must have


class Windows(NamedTuple):
    """A batch of windows of a text.

    Attributes:
      tokens: the text, [B, T].
      read: what a model reads that predicts: of an encoder some tokens are hidden, [B, T].
      targets: what is to be predicted at every position, [B, T].
      predicted: bool, where something is to be predicted, [B, T].
      lengths: [B].
      index: the number of each window, [B]; -1 in rows that fill the batch up.
    """

    tokens: np.ndarray
    read: np.ndarray
    targets: np.ndarray
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


def check_room(tokens: int, length: int) -> None:
    """Raise a ValueError unless a text of so many tokens has windows enough for a report about heads."""
    if tokens - 1 <= (FEWEST - 1) * length:
        raise ValueError(
            f"report: tokens must make at least {FEWEST} windows of length={length}, more than "
            f"{(FEWEST - 1) * length + 1:,} tokens, got {tokens:,}; give more text, or shorter windows."
        )


def hidden_positions(number: int, length: int, rate: float = HIDDEN) -> np.ndarray:
    """Which tokens of a window are hidden, bool [length]: the same ones whoever asks.

    >>> bool((hidden_positions(3, 20) == hidden_positions(3, 20)).all())
    True
    """
    return np.random.default_rng(max(number, 0)).random(length) < rate


def make_subject(model: ModuleType, config: Any, text: Text, hidden: int | None = None) -> Subject:
    """Any model of one stack that predicts tokens.

    Args:
      model: `mhajax.language_model`, `mhajax.encoder`, or another module with their `features`, `logits`,
        `apply_captured` and `stages`.
      config: of the model.
      text: what it reads.
      hidden: the token that stands for a hidden one, of a model whose heads see all and which predicts those; None: its
        heads see what comes before, and it predicts what comes next.
    """
    causal, length, rows = hidden is None, text.length, text.rows
    held_out = []
    for tokens, lengths in _windows(np.asarray(text.ids), rows, length):
        number = np.arange(rows) + len(held_out) * rows
        index = np.where(lengths > 0, number, FILLER)
        read, following, there = tokens[:, :-1], tokens[:, 1:], np.arange(length) < lengths[:, None]
        if hidden is None:
            held_out.append(Windows(read, read, following, there, lengths, index))
        else:
            chosen = there & np.stack([hidden_positions(int(n), length) for n in number])
            held_out.append(Windows(read, np.where(chosen, hidden, read), read, chosen, lengths, index))

    def valid(batch: Windows) -> np.ndarray:
        return np.arange(length) < batch.lengths[:, None]

    def visible(batch: Windows) -> np.ndarray:
        allowed = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
        return valid(batch)[:, :, None] & valid(batch)[:, None, :] & allowed

    def options(batch: Windows) -> dict[str, Any]:
        return {} if causal else {"mask": valid(batch)[:, None, None, :]}

    def nats_of(params: Any, features: Array, batch: Windows) -> Array:
        targets: Any = batch.targets
        return nats(model.logits(params, features, config), targets)

    def capture(params: Any, batch: Windows, names: Sequence[str]):
        return {
            "self": model.apply_captured(params, batch.tokens, config, capture=names, **options(batch))[1].attention
        }

    def losses(params: Any, batch: Windows, gates: dict[str, Array]) -> Array:
        features = model.features(params, batch.read, config, gates={"attention": gates["self"]}, **options(batch))
        return nats_of(params, features, batch)

    def ablated(params: Any, batch: Windows, sums: Callable[[Array], Array]) -> dict[str, Array]:
        stages = model.stages(params, batch.read, config, **options(batch))
        loss_fn = lambda features: sums(nats_of(params, features, batch))  # noqa: E731
        return {"self": ablation.of_stages(stages, loss_fn).attention}

    def sentence(batch: Windows, row: int) -> Sentence:
        ids = [int(token) for token in batch.tokens[row, : batch.lengths[row]]]
        pieces = text.pieces(ids)
        both = Pieces(pieces, pieces)
        return Sentence({"self": both}, both, text.decode(ids))

    return Subject(
        kinds=(Kind("self", "Attention of the text to itself", config.num_layers, config.num_heads, "attention"),),
        origin=text.origin, unit=text.unit, sequence="window",
        batches=held_out, index=lambda batch: batch.index, capture=capture,
        visible=lambda batch: {"self": visible(batch)}, tokens=lambda batch: {"self": (batch.tokens, batch.tokens)},
        sentence=sentence, losses=losses, ablated=ablated, predicted=lambda batch: batch.predicted[..., None],
        categories=(f"all {text.unit}s",),
    )  # fmt: skip


def _windows(ids: np.ndarray, rows: int, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of consecutive windows: tokens [B, T + 1], padded with 0, and how many of each are predicted, [B].

    Each window begins with the last token that the one before predicted, so every prediction counts once.
    """
    starts = range(0, len(ids) - 1, length)
    found = []
    for first in range(0, len(starts), rows):
        tokens, lengths = np.zeros((rows, length + 1), np.int32), np.zeros(rows, np.int32)
        for row, start in enumerate(starts[first : first + rows]):
            window = ids[start : start + length + 1]
            tokens[row, : len(window)], lengths[row] = window, len(window) - 1
        found.append((tokens, lengths))
    return found
