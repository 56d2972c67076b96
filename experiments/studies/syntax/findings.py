"""From counts to accuracies with intervals, tests of many heads at once, and verdicts by the rules of the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.studies.study import Verdict, Word
from experiments.studies.syntax.counts import Baseline, Counts, Question
from mhajax import statistics
from mhajax.statistics import Measure, Report, Tally

FLIPS = 9999  # patterns of signs; no p is below 1 / (FLIPS + 1)
SUBJECT = "nsubj"
LEVEL = 0.975  # of the intervals of the first verdict: 95 % for two directions
POSITIONAL = 0.9


class Found(NamedTuple):
    """How well heads answer a question.

    Attributes:
      question: what is asked.
      asked: how often.
      best: the best head, chosen on one half of the sentences and reported on the other; its baseline is the best fixed
        offset, chosen in the same way.
      offset: that offset, of each half.
      random: the best of as many heads with random weights, chosen in the same way; over draws and sentences.
      above_random: the best head minus that.
      strict: best minus offset, and best minus random, with intervals of `LEVEL`.
      p: of "there is a head that beats both the best fixed offset and the best heads of random weights".
      adjusted: the same, for having asked all questions.
      heads: accuracy of every head on all sentences, [L, N].
    """

    question: Question
    asked: int
    best: Report
    offset: tuple[int, ...]
    random: Measure
    above_random: Measure
    strict: tuple[Measure, Measure]
    p: float
    adjusted: float
    heads: np.ndarray


class Order(NamedTuple):
    """The head that looks most often at one fixed offset.

    Attributes:
      best: the share of words for which it does, chosen on one half of the sentences and reported on the other.
      offset: of each half.
      chosen: head of each half.
      random: the same of heads with random weights.
      above_random: the difference.
      positional: heads that do it for at least 90 % of the words, with their offset and share; on all sentences.
      heads: the largest share of every head, [L, N].
    """

    best: Measure
    offset: tuple[int, ...]
    chosen: tuple[tuple[int, int], ...]
    random: Measure
    above_random: Measure
    positional: list[tuple[tuple[int, int], int, float]]
    heads: np.ndarray


def chosen_heads(chosen: np.ndarray, num_heads: int) -> tuple[tuple[int, int], ...]:
    """Layer and head of both halves from indices into [L · N]."""
    return tuple((int(c) // num_heads, int(c) % num_heads) for c in np.ravel(chosen))


def relations(
    wanted: Sequence[Question], base: Baseline, offsets: np.ndarray, trained: Counts, random: Sequence[Counts]
) -> list[Found]:
    """How well the heads of a model answer every question.

    Args:
      wanted, base, offsets: what was asked, and what fixed offsets answer.
      trained: of the model.
      random: of the model with shuffled weights, of each draw.
    """
    found = []
    for number, question in enumerate(wanted):
        count = base.asked[number]
        if np.count_nonzero(count) < 2:  # a causal model sees hardly any
            continue
        hits = trained.hits[number].astype(float)  # [S, L, N]
        shuffled = np.stack([counts.hits[number] for counts in random]).astype(float)  # [draws, S, L, N]
        fixed = base.by_offset[number]
        asked = count[:, None, None]
        ours, theirs = Tally(hits, asked, np.array(0.0)), Tally(fixed[:, None], asked, np.array(0.0))
        best = statistics.select_and_report(ours, heads=(1, 2), alternatives=theirs)
        strict = statistics.select_and_report(ours, heads=(1, 2), alternatives=theirs, level=LEVEL).difference
        places = tuple(int(offsets[i]) for i in np.ravel(np.asarray(best.chosen_baseline)))
        found.append(
            Found(
                question, int(count.sum()), best, places,
                _best_random(shuffled, count), _above_random(hits, shuffled, count, 0.95),
                (strict, _above_random(hits, shuffled, count, LEVEL)),
                _some_head(hits, shuffled, count, fixed), np.nan,
                hits.sum(0) / count.sum(),
            )
        )  # fmt: skip
    adjusted = statistics.benjamini_hochberg([one.p for one in found])
    return [one._replace(adjusted=float(p)) for one, p in zip(found, adjusted, strict=True)]


def order(base: Baseline, offsets: np.ndarray, trained: Counts, random: Sequence[Counts]) -> Order:
    """The head that follows word order most."""
    ordered = trained.ordered.astype(float)  # [S, L, N, O]
    shuffled = np.stack([counts.ordered for counts in random]).astype(float)
    places = base.places[:, None, None, :]
    ours = Tally(ordered, places, np.array(0.0))
    best = statistics.select_and_report(ours, heads=(1, 2, 3))
    rows = [np.unravel_index(int(c), ordered.shape[1:]) for c in np.ravel(best.chosen)]
    repeated = Tally(np.broadcast_to(ordered, shuffled.shape), places[None], np.array(0.0))
    theirs = Tally(shuffled, places[None], np.array(0.0))
    against = statistics.select_and_report(repeated, axis=(0, 1), heads=(2, 3, 4), alternatives=theirs)
    shares = ordered.sum(0) / places.sum(0)
    most = shares.max(-1)
    positional = [
        ((int(layer), int(head)), int(offsets[shares[layer, head].argmax()]), float(most[layer, head]))
        for layer, head in np.argwhere(most >= POSITIONAL)
    ]
    return Order(
        best.best, tuple(int(offsets[row[2]]) for row in rows), tuple((int(row[0]), int(row[1])) for row in rows),
        statistics.select_and_report(theirs, axis=(0, 1), heads=(2, 3, 4)).best._replace(baseline=np.array(np.nan)),
        against.difference, positional, most,
    )  # fmt: skip


def verdicts(where: str, found: Sequence[Found], ordered: Order) -> tuple[Verdict, Verdict]:
    """The two answers for a model and a language, `where`, by the rules of `experiments.studies.syntax`."""
    asked = [one for one in found if one.question.relation == SUBJECT]
    above = [all(part.low > 0 for part in one.strict) for one in asked]
    below = [any(part.high < 0 for part in one.strict) for one in asked]
    word: Word = "supported" if any(above) else "refuted" if asked and all(below) else "not resolved"
    parts = [
        f"{one.question.direction} {one.best.best.value:.1%}, best fixed offset {one.best.best.baseline:.1%} "
        f"(difference {_signed(one.strict[0])}), best of as many random heads {one.random.value:.1%} "
        f"(difference {_signed(one.strict[1])})"
        for one in asked
    ]
    follows = Verdict(
        f"{where}: a head follows the relation between subject and verb.",
        word,
        f"{'; '.join(parts).capitalize()}; intervals of 97.5%." if parts else "There are too few subjects.",
    )
    share, more = ordered.best, ordered.above_random
    if share.low >= POSITIONAL and more.low > 0:
        word = "supported"
    elif share.high < POSITIONAL or more.high < 0:
        word = "refuted"
    else:
        word = "not resolved"
    offset = " or ".join(f"{o:+d}".replace("-", "\N{MINUS SIGN}") for o in dict.fromkeys(ordered.offset))
    because = (
        f"The best head looks at offset {offset} from {share.value:.1%} of the words [{share.low:.1%}, "
        f"{share.high:.1%}], where {POSITIONAL:.0%} are asked for; the best of as many random heads from "
        f"{ordered.random.value:.1%}."
    )
    return follows, Verdict(f"{where}: a head follows word order.", word, because)


def _signed(measure: Measure) -> str:
    """A difference in points of a per cent with its interval."""
    value, low, high = (f"{100 * float(x):+.1f}" for x in measure[:3])
    return f"{value} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def _best_random(shuffled: np.ndarray, count: np.ndarray) -> Measure:
    """The best of the heads of each draw, chosen on one half and reported on the other; without a baseline."""
    tally = Tally(shuffled, count[None, :, None, None], np.array(0.0))
    best = statistics.select_and_report(tally, axis=(0, 1), heads=(2, 3)).best
    return best._replace(baseline=np.array(np.nan))


def _above_random(hits: np.ndarray, shuffled: np.ndarray, count: np.ndarray, level: float) -> Measure:
    """The best head minus the best of each draw, on the same sentences; the interval is over draws and sentences."""
    asked = count[None, :, None, None]
    ours, theirs = (Tally(a, asked, np.array(0.0)) for a in (np.broadcast_to(hits, shuffled.shape), shuffled))
    return statistics.select_and_report(ours, axis=(0, 1), heads=(2, 3), alternatives=theirs, level=level).difference


def _some_head(hits: np.ndarray, shuffled: np.ndarray, count: np.ndarray, fixed: np.ndarray) -> float:
    """p of "there is a head that beats both": the larger one of two max-statistic tests, by sign flips of sentences.

    Both baselines are chosen on the sentences on which they are used, which flatters them and makes the test strict:
    the best offset, and the best head of every draw, on average over draws.
    """
    bests = shuffled.reshape(*shuffled.shape[:2], -1)  # [draws, S, L · N]
    bests = np.stack([draw[:, draw.sum(0).argmax()] for draw in bests]).mean(0)  # [S]
    p = []
    for against in (fixed[:, fixed.sum(0).argmax()], bests):
        tally = Tally(hits, count[:, None, None], against[:, None, None])
        p.append(statistics.max_statistic(*statistics.sign_flips(tally, resamples=FLIPS)).any)
    return max(p)
