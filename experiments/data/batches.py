"""Batches of token ids in few static shapes: deterministic, resumable, NumPy only.

Every shape costs one compilation, so examples are grouped by length and padded to the boundary of their group.
Order depends on the seed and the position alone. It is drawn from the raw words of `numpy.random.Philox`, seeded by a
`numpy.random.SeedSequence`; NumPy promises that both streams never change, which it does not for `Generator` methods
such as `permutation`. So a run resumed under another NumPy version sees the same batches.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.errors import DataError

FILLER = -1  # the example number of a row that only fills up a batch
_ALWAYS_FITS = 65_536  # tokens of a batch that need no data as large
_LONG_SENTENCE_STEP = 32

Pair = tuple[Sequence[int], Sequence[int]]


class Position(NamedTuple):
    """Where an endless sequence of batches stands: the number of the next batch. Two ints, made to be stored."""

    epoch: int
    batch: int


START = Position(0, 0)


class PairBatch(NamedTuple):
    """B sentence pairs. A filler row is all `PAD`, with both lengths 0 and index -1.

    The decoder reads `target[:, :-1]` and predicts `target[:, 1:]`, of which the first `target_lengths` count.

    Attributes:
        source: [B, S] int32: words, EOS, PAD ...
        source_lengths: [B] int32: words + EOS.
        target: [B, T + 1] int32: BOS, words, EOS, PAD ...
        target_lengths: [B] int32: predicted tokens, that is words + EOS (BOS is given, not predicted).
        index: [B] int32: number of the pair in the sequence that was handed in.
    """

    source: np.ndarray
    source_lengths: np.ndarray
    target: np.ndarray
    target_lengths: np.ndarray
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody searches this tuple)


class SourceBatch(NamedTuple):
    """B sentences to translate. A filler row is all `PAD`, with length 0 and index -1.

    Attributes:
        index: [B] int32: number of the sentence in the sequence that was handed in.
        source: [B, S] int32: words, EOS, PAD ...
        source_lengths: [B] int32: words + EOS.
    """

    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  (nobody searches this tuple)
    source: np.ndarray
    source_lengths: np.ndarray


class WindowBatch(NamedTuple):
    """B windows of a stream. The model reads `tokens[:, :-1]` and predicts `tokens[:, 1:]`.

    Attributes:
        tokens: [B, T + 1] int32, PAD after the end of the stream.
        lengths: [B] int32: how many of the T predictions are real; 0 in a filler row.
    """

    tokens: np.ndarray
    lengths: np.ndarray


class PairBatches:
    """Training batches of sentence pairs, grouped by length.

    A pair belongs to the smallest boundary L that holds source + EOS and target + EOS. Its batches have S = T = L and
    B = max(1, batch_tokens // L) rows, rounded down to a multiple of 8 from 8 on. In each epoch every pair that fits
    is used exactly once; the last batch of each boundary is filled up with filler rows, which weigh nothing in the
    loss. The order of pairs and of batches is another one in each epoch.

    Attributes:
        left_out: Number of pairs longer than the last boundary; they are in no batch, so tell the user.
        batches_per_epoch: The same in every epoch.
        shapes: (B, L) of each boundary in use; this many compilations.

    Args:
        pairs: (source ids, target ids), without special tokens.
        batch_tokens: Most tokens, padding included, on each side of a batch.
        boundaries: Lengths to pad to, ascending, EOS included.
        seed: Any integer >= 0.

    Raises:
        DataError: There are no pairs, or none is short enough.
        ValueError: An argument is out of range.
    """

    def __init__(self, pairs: Sequence[Pair], *, batch_tokens: int, boundaries: tuple[int, ...], seed: int):
        _check_at_least("PairBatches", "batch_tokens", batch_tokens, 1)
        _check_at_least("PairBatches", "seed", seed, 0)
        _check_boundaries("PairBatches", boundaries)
        members: dict[int, list[int]] = {boundary: [] for boundary in boundaries}
        self.left_out = 0
        for number, pair in enumerate(pairs):
            boundary = _boundary(_pair_length(pair), boundaries)
            if boundary is None:
                self.left_out += 1
            else:
                members[boundary].append(number)
        if self.left_out == len(pairs):
            raise DataError(
                f"batches.PairBatches: no pair to train on: {len(pairs)} given, {self.left_out} of them longer than "
                f"the last boundary {boundaries[-1]}. Check the training files, or give a larger last boundary."
            )
        self._seed = seed
        used = [boundary for boundary in boundaries if members[boundary]]
        _check_size(
            "batches.tokens",
            batch_tokens,
            sum(len(members[boundary]) * boundary for boundary in used),
            "padding included",
        )
        # the row after the last one is filler, so that a row number of -1 picks it
        self._stores = [_pair_batch(pairs, [*members[boundary], FILLER], boundary) for boundary in used]
        self.shapes = tuple((_rows(batch_tokens, boundary), boundary) for boundary in used)
        self.batches_per_epoch = sum(-(-len(members[boundary]) // rows) for rows, boundary in self.shapes)

    def position(self, step: int) -> Position:
        """Where training stands after `step` batches from the very start."""
        _check_at_least("PairBatches.position", "step", step, 0)
        return Position(*divmod(step, self.batches_per_epoch))

    def examples(self, step: int) -> str:
        """In words, which pairs the batch after `step` batches holds."""
        index = next(iter(self.iterate(self.position(step)))).index
        return f"the training pairs {_shown(sorted(int(i) for i in index if i != FILLER))} (counted from 0)"

    def iterate(self, position: Position | tuple[int, int] = START) -> Iterator[PairBatch]:
        """Batches from a position on, without end.

        Args:
            position: The first batch to give; `position(step)`, or one stored with a checkpoint.

        Yields:
            PairBatch of one of `shapes`.

        Raises:
            ValueError: The position does not exist, as when it was stored for other data.
        """
        epoch, batch = position
        _check_at_least("PairBatches.iterate", "position.epoch", epoch, 0)
        _check_at_least("PairBatches.iterate", "position.batch", batch, 0)
        if batch >= self.batches_per_epoch:
            raise ValueError(
                f"batches.PairBatches.iterate: position.batch must be less than batches_per_epoch="
                f"{self.batches_per_epoch}, got {batch}; the position was stored for other data or other batches."
            )
        return self._from(epoch, batch)

    def _from(self, epoch: int, first: int) -> Iterator[PairBatch]:
        while True:
            for bucket, rows in self._plan(epoch)[first:]:
                yield PairBatch(*(field[rows] for field in self._stores[bucket]))
            epoch, first = epoch + 1, 0

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The batches of an epoch in order: (bucket, row numbers [B])."""
        philox = _philox(self._seed, epoch)
        batches = []
        for bucket, (store, (rows, _)) in enumerate(zip(self._stores, self.shapes, strict=True)):
            order = _permutation(philox, len(store.index) - 1)
            filled = np.append(order, np.full(-len(order) % rows, FILLER))
            batches += [(bucket, chosen) for chosen in filled.reshape(-1, rows)]
        return [batches[i] for i in _permutation(philox, len(batches))]


class TextBatches:
    """Training batches of a language model: random windows of one stream of tokens.

    A batch is a function of (seed, step) only. Windows start anywhere with equal probability and may overlap.

    Args:
        tokens: [n] integers; may be a memory map.
        batch_size: B.
        length: T, predictions per window.
        seed: Any integer >= 0.

    Raises:
        DataError: The stream is shorter than one window, length + 1.
        ValueError: An argument is out of range.
    """

    def __init__(self, tokens: np.ndarray, *, batch_size: int, length: int, seed: int):
        _check_stream("TextBatches", tokens, batch_size, length)
        _check_at_least("TextBatches", "seed", seed, 0)
        if len(tokens) < length + 1:
            raise DataError(
                f"batches.TextBatches: a window of length={length} needs at least {length + 1} tokens, the stream has "
                f"{len(tokens)}. Give more text or a smaller length."
            )
        _check_size("batches.size × batches.length", batch_size * length, len(tokens), f"{batch_size:,} × {length:,}")
        self._tokens, self._batch_size, self._length, self._seed = tokens, batch_size, length, seed

    def position(self, step: int) -> Position:
        """Where training stands after `step` batches from the very start: there is but one endless epoch."""
        _check_at_least("TextBatches.position", "step", step, 0)
        return Position(0, step)

    def examples(self, step: int) -> str:
        """In words, which windows the batch after `step` batches holds."""
        starts = _shown(sorted(int(start) for start in self._starts(step)))
        return f"the windows of {self._length} tokens that begin at the training tokens {starts} (counted from 0)"

    def iterate(self, position: Position | tuple[int, int] = START) -> Iterator[np.ndarray]:
        """Batches from a position on, without end.

        Args:
            position: (0, step).

        Yields:
            [B, T + 1] int32.

        Raises:
            ValueError: The position does not exist.
        """
        epoch, step = position
        _check_at_least("TextBatches.iterate", "position.batch", step, 0)
        if epoch != 0:
            raise ValueError(
                f"batches.TextBatches.iterate: position.epoch must be 0, got {epoch}; random windows have no epochs."
            )
        return self._from(step)

    def _from(self, step: int) -> Iterator[np.ndarray]:
        while True:
            yield self._tokens[self._starts(step)[:, None] + np.arange(self._length + 1)].astype(np.int32)  # [B, T + 1]
            step += 1

    def _starts(self, step: int) -> np.ndarray:
        words = _philox(self._seed, step).random_raw(self._batch_size)
        return (words % np.uint64(len(self._tokens) - self._length)).astype(np.int64)


def evaluation_batches(
    sources: Sequence[Sequence[int]], *, batch_size: int, boundaries: tuple[int, ...]
) -> Iterator[SourceBatch]:
    """Every sentence once, shortest first, for decoding.

    S is the smallest boundary that holds the longest sentence of the batch; beyond the last boundary it is rounded up
    to a multiple of 32, for nothing is left out in evaluation. Only the last batch has filler rows, at its end.

    Args:
        sources: Ids of each sentence, without special tokens.
        batch_size: B of every batch.
        boundaries: Lengths to pad to, ascending, EOS included.

    Yields:
        SourceBatch: (index [B], source [B, S], source_lengths [B]).

    Raises:
        ValueError: An argument is out of range.
    """
    _check_evaluation("evaluation_batches", batch_size, boundaries)
    return (
        _source_batch(sources, numbers, boundary)
        for numbers, boundary in _by_length([len(source) + 1 for source in sources], batch_size, boundaries)
    )


def evaluation_pairs(pairs: Sequence[Pair], *, batch_size: int, boundaries: tuple[int, ...]) -> Iterator[PairBatch]:
    """Every pair once, shortest first, for the validation loss; S = T, chosen as in `evaluation_batches`.

    Args:
        pairs: (source ids, target ids), without special tokens.
        batch_size: B of every batch.
        boundaries: Lengths to pad to, ascending, EOS included.

    Yields:
        PairBatch, the last one with filler rows at its end.

    Raises:
        ValueError: An argument is out of range.
    """
    _check_evaluation("evaluation_pairs", batch_size, boundaries)
    return (
        _pair_batch(pairs, numbers, boundary)
        for numbers, boundary in _by_length([_pair_length(pair) for pair in pairs], batch_size, boundaries)
    )


def windows(tokens: np.ndarray, *, batch_size: int, length: int) -> Iterator[WindowBatch]:
    """A stream cut into consecutive windows, for the validation loss: each of its n - 1 predictions counts once.

    Each window begins with the last token that the one before predicted.

    Args:
        tokens: [n] integers, n >= 2.
        batch_size: B of every batch.
        length: T, predictions per window.

    Yields:
        WindowBatch (tokens [B, T + 1], lengths [B]); the last one is padded. The lengths sum to n - 1.

    Raises:
        DataError: There is nothing to predict.
        ValueError: An argument is out of range.
    """
    _check_stream("windows", tokens, batch_size, length)
    if len(tokens) < 2:
        raise DataError(f"batches.windows: the stream must have at least 2 tokens, got {len(tokens)}. Give more text.")
    starts = range(0, len(tokens) - 1, length)
    return (
        _window_batch(tokens, starts[first : first + batch_size], batch_size, length)
        for first in range(0, len(starts), batch_size)
    )


def _window_batch(tokens: np.ndarray, starts: Sequence[int], batch_size: int, length: int) -> WindowBatch:
    rows = [tokens[start : start + length + 1] for start in starts]
    rows += [tokens[:0]] * (batch_size - len(rows))
    return WindowBatch(_padded(rows, length + 1), np.maximum(_lengths(rows) - 1, 0))


def _by_length(lengths: Sequence[int], batch_size: int, boundaries: tuple[int, ...]) -> Iterator[tuple[list[int], int]]:
    """(example numbers [B], boundary) of batches that go from short to long; FILLER ends the last one."""
    shortest_first = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for first in range(0, len(lengths), batch_size):
        numbers = shortest_first[first : first + batch_size]
        longest = lengths[numbers[-1]]
        boundary = _boundary(longest, boundaries) or -(-longest // _LONG_SENTENCE_STEP) * _LONG_SENTENCE_STEP
        yield numbers + [FILLER] * (batch_size - len(numbers)), boundary


def _pair_batch(pairs: Sequence[Pair], numbers: Sequence[int], boundary: int) -> PairBatch:
    sources = [[] if number == FILLER else [*pairs[number][0], EOS] for number in numbers]
    targets = [[] if number == FILLER else [BOS, *pairs[number][1], EOS] for number in numbers]
    return PairBatch(
        source=_padded(sources, boundary),
        source_lengths=_lengths(sources),
        target=_padded(targets, boundary + 1),
        target_lengths=np.maximum(_lengths(targets) - 1, 0),  # BOS is not predicted
        index=np.asarray(numbers, np.int32),
    )


def _source_batch(sources: Sequence[Sequence[int]], numbers: Sequence[int], boundary: int) -> SourceBatch:
    rows = [[] if number == FILLER else [*sources[number], EOS] for number in numbers]
    return SourceBatch(np.asarray(numbers, np.int32), _padded(rows, boundary), _lengths(rows))


def _padded(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> np.ndarray:
    array = np.full((len(rows), width), PAD, np.int32)
    for padded, row in zip(array, rows, strict=True):
        padded[: len(row)] = row
    return array


def _lengths(rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.asarray([len(row) for row in rows], np.int32)


def _pair_length(pair: Pair) -> int:
    source, target = pair
    return max(len(source), len(target)) + 1


def _boundary(length: int, boundaries: tuple[int, ...]) -> int | None:
    return next((boundary for boundary in boundaries if boundary >= length), None)


def _rows(batch_tokens: int, boundary: int) -> int:
    rows = max(1, batch_tokens // boundary)
    return rows if rows < 8 else rows // 8 * 8


def _philox(seed: int, number: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence((seed, number)))


def _permutation(philox: np.random.Philox, size: int) -> np.ndarray:
    return np.argsort(philox.random_raw(size), kind="stable")


def _check_at_least(who: str, name: str, value: int, least: int) -> None:
    try:
        enough = operator.index(value) >= least and not isinstance(value, bool)
    except TypeError:
        enough = False
    if not enough:
        raise ValueError(f"batches.{who}: {name} must be an integer of at least {least}, got {value!r}.")


def _check_size(what: str, tokens: int, there: int, how: str) -> None:
    """Refuse a batch that is larger than all the data, before it is allocated; a small one is only filled up."""
    if tokens > max(there, _ALWAYS_FITS):
        raise DataError(
            f"{what} must be at most the {there:,} tokens of the training data (or {_ALWAYS_FITS:,}), got {tokens:,} "
            f"({how}): a batch would be larger than the data. Give smaller batches or more data."
        )


def _shown(numbers: Sequence[int], most: int = 64) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def _check_boundaries(who: str, boundaries: tuple[int, ...]) -> None:
    integers = len(boundaries) > 0 and all(isinstance(boundary, int) for boundary in boundaries)
    if not integers or any(a >= b for a, b in zip((0, *boundaries), boundaries, strict=False)):
        raise ValueError(
            f"batches.{who}: boundaries must be positive integers, strictly ascending, such as (16, 32, 64), "
            f"got {boundaries!r}."
        )


def _check_evaluation(who: str, batch_size: int, boundaries: tuple[int, ...]) -> None:
    _check_at_least(who, "batch_size", batch_size, 1)
    _check_boundaries(who, boundaries)


def _check_stream(who: str, tokens: np.ndarray, batch_size: int, length: int) -> None:
    _check_at_least(who, "batch_size", batch_size, 1)
    _check_at_least(who, "length", length, 1)
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        got = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise ValueError(
            f"batches.{who}: tokens must be an integer array [n], got {got}; make one with np.asarray(ids, np.int32)."
        )
