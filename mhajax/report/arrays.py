"""Attention weights of any library as the report needs them: checked, and without the model that made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mhajax.report.subject import FILLER, Kind, Pieces, Sentence, Subject

KIND = "attention"
TOGETHER = 2**23  # weights [L, B, N, T, S] that are computed at once
SLACK, ROUNDED = 1e-3, 0.02  # how far from 1 a row may sum: of 32 bits and more, and of 16
TITLE = 12  # tokens of an example in its title
_WHO = "report.weights"


class Rows(NamedTuple):
    """A batch of examples.

    Attributes:
      weights: [L, B, N, T, S].
      visible: bool [B, T, S].
      tokens: [B, T]; zeros where none are known.
      index: the number of each example, [B].
    """

    weights: np.ndarray
    visible: np.ndarray
    tokens: np.ndarray
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody searches this tuple)


def make_subject(
    weights: ArrayLike,
    tokens: ArrayLike | None,
    visible: ArrayLike | None,
    pieces: Callable[[Sequence[int]], list[str]] | None,
) -> Subject:
    """A subject that says where heads look, and of which no loss is asked. Arguments and errors: `report.weights`."""
    array = _checked(weights)
    layers, examples, heads, queries, keys = array.shape
    allowed = _visible(visible, array)
    array = np.where(allowed[:, None], array, 0)
    ids = _tokens(tokens, array.shape)
    text = ids if ids is not None else np.zeros((examples, queries), np.int32)
    count = -(-examples // max(1, min(examples, TOGETHER // array[:, 0].size)))  # batches, all of one shape
    rows = -(-examples // count)
    spare = count * rows - examples
    padded = lambda a, axis=0, value=0: np.pad(  # noqa: E731
        a, [(0, spare if n == axis else 0) for n in range(a.ndim)], constant_values=value
    )
    parts = (padded(array, 1), padded(allowed), padded(text), padded(np.arange(examples), 0, FILLER))
    batches = [
        Rows(parts[0][:, start : start + rows], *(part[start : start + rows] for part in parts[1:]))
        for start in range(0, count * rows, rows)
    ]

    def sentence(batch: Rows, row: int) -> Sentence:
        seen = batch.visible[row]
        width = tuple(int(np.flatnonzero(seen.any(axis))[-1]) + 1 if seen.any() else 1 for axis in (1, 0))
        if ids is None:
            letters = Pieces([str(n) for n in range(width[0])], [str(n) for n in range(width[1])])
        else:
            named = [int(token) for token in batch.tokens[row, : max(width)]]
            own = [str(one) for one in named] if pieces is None else list(pieces(named))
            letters = Pieces(own[: width[0]], own[: width[1]])
        number = int(batch.index[row])
        title = f"example {number}"
        if ids is not None:
            title += f": {' '.join(letters.queries[:TITLE])}{' …' if width[0] > TITLE else ''}"
        return Sentence({KIND: letters}, letters, title)

    return Subject(
        kinds=(Kind(KIND, "Attention", layers, heads, "attention", is_self=ids is not None),),
        origin="examples, whose attention weights were handed in", unit="token", sequence="example", batches=batches,
        index=lambda batch: batch.index, capture=lambda params, batch, names: {KIND: {"weights": batch.weights}},
        visible=lambda batch: {KIND: batch.visible}, tokens=lambda batch: {KIND: (batch.tokens, batch.tokens)},
        sentence=sentence,
    )  # fmt: skip


def _checked(weights: ArrayLike) -> np.ndarray:
    """The weights as float32, after looking at them."""
    array = np.asarray(weights)
    if array.ndim != 5 or 0 in array.shape:
        raise ValueError(
            f"{_WHO}: weights must be [L, B, N, T, S] with no empty axis, got {array.shape}; np.stack of the "
            "arrays of all layers puts the layers in front."
        )
    if array.shape[1] < 2:
        raise ValueError(
            f"{_WHO}: weights must be of at least 2 examples, [L, B, N, T, S] with B >= 2, got {array.shape}; an "
            "interval over examples needs several. `mhajax.view.heads` shows one."
        )
    if array.dtype.kind in "biuOUSMm" or array.dtype.kind == "c":
        raise ValueError(f"{_WHO}: weights must be real numbers, attention after the softmax, got {array.dtype}.")
    numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all() or numbers.min() < 0:
        raise ValueError(
            f"{_WHO}: weights must be finite and at least 0, got {numbers.min():.4g} to {numbers.max():.4g}; hand in "
            "the attention after the softmax, not the logits."
        )
    return numbers if array.dtype.itemsize != 2 else _normalised(numbers)


def _normalised(weights: np.ndarray) -> np.ndarray:
    """Weights of 16 bits, whose rows sum to nearly 1, with rows that do; others are left to `_visible`."""
    sums = weights.sum(-1, keepdims=True)
    return np.where(np.abs(sums - 1) <= ROUNDED, weights / np.where(sums > 0, sums, 1), weights)


def _visible(visible: ArrayLike | None, weights: np.ndarray) -> np.ndarray:
    """Which keys each query may attend to, bool [B, T, S], after looking at what each row sums to."""
    _, examples, _, queries, keys = weights.shape
    if visible is None:
        allowed = (weights > 0).any((0, 2))
    else:
        allowed = np.asarray(visible)
        if allowed.dtype != bool or allowed.shape != (examples, queries, keys):
            raise ValueError(
                f"{_WHO}: visible must be bool [B, T, S]={(examples, queries, keys)}, True where a query may attend to "
                f"a key, got {allowed.dtype} {allowed.shape}; one mask for all is np.broadcast_to(mask, (B, T, S))."
            )
    if not allowed.any():
        raise ValueError(f"{_WHO}: some query must have a visible key, got none; True in visible means may attend.")
    sums = np.where(allowed[:, None], weights, 0).sum(-1)  # [L, B, N, T]
    asked = allowed.any(-1)[:, None]  # [B, 1, T]
    wrong = asked & (np.abs(sums - 1) > SLACK) & (sums > 1e-6)
    if wrong.any():
        place = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(
            f"{_WHO}: every row of weights must sum to 1 over the visible keys, or to 0 where a query is fully masked, "
            f"got {sums[place]:.4g} at [layer, example, head, query]={list(place)}, and {int(wrong.sum()):,} such; "
            "hand in the attention after the softmax (and before dropout)"
            + ("." if visible is None else ", or check that True in visible means may attend.")
        )
    return allowed


def _tokens(tokens: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if tokens is None:
        return None
    ids = np.asarray(tokens)
    _, examples, _, queries, keys = shape
    if queries != keys:
        raise ValueError(
            f"{_WHO}: tokens are of a text that attends to itself, T = S, got weights with T={queries} and S={keys}; "
            "leave tokens out."
        )
    if ids.shape != (examples, queries) or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{_WHO}: tokens must be integers [B, T]={(examples, queries)}, as weights have examples and queries, got "
            f"{ids.dtype} {ids.shape}."
        )
    return ids.astype(np.int32)


def check_pieces(who: str, pieces: Any) -> None:
    """Raise a ValueError unless `pieces` is a function, or None."""
    if pieces is not None and not callable(pieces):
        raise ValueError(
            f"{who}: pieces must be a function from a list of tokens to their letters, such as lambda ids: "
            f"[tokenizer.decode([i]) for i in ids], got {type(pieces).__name__}."
        )
