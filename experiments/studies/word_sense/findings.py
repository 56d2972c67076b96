"""From what was counted to numbers with intervals: of each word, and of a model, the mean over its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.studies.word_sense import measure, texts
from experiments.studies.word_sense.classifier import interval, macro_f1, resampled
from experiments.studies.word_sense.measure import BAG, CONTEXT, RETRAINED, STATIC, OfWord, Seen
from mhajax import statistics
from mhajax.statistics import Measure, Tally

if TYPE_CHECKING:
    from experiments.studies.word_sense import Config


class Sets(NamedTuple):
    """Heads that are removed together.

    Attributes:
      margin: lost without the chosen heads; the baseline is the most that random ones of the same layers cost.
      f1: macro-F1 lost, likewise.
      margins_of_random: lost without each random set.
      f1_of_random: macro-F1 lost, likewise.
    """

    margin: Measure
    f1: Measure
    margins_of_random: np.ndarray
    f1_of_random: np.ndarray


class Heads(NamedTuple):
    """Every head by itself, parts [layers, N].

    Attributes:
      whole: the mean margin of the model as it is.
      lost: margin without the head, as a share of the whole.
      f1: macro-F1 lost.
      pvalues: of `lost`, adjusted for all heads (sign flips, maximum).
      attention: to the cue minus that to other words at the same distance.
      attention_pvalues: likewise.
      agreement: rank correlation of `lost` and `attention`.
      top: flat indices of the heads that cost most.
      top_of_word: by ambiguous word.
      stability: overlap (Jaccard) of the top heads with those of resampled sentences; its baseline is chance.
      between_words: the same between two words; NaN for one.
    """

    whole: float
    lost: Measure
    f1: Measure
    pvalues: np.ndarray
    attention: Measure
    attention_pvalues: np.ndarray
    agreement: float
    top: np.ndarray
    top_of_word: dict[str, np.ndarray]
    stability: Measure
    between_words: float


class Model(NamedTuple):
    """What is known of one model.

    Attributes:
      seen: what was counted.
      words: word, or "mean" → arm → macro-F1.
      lead: arm → macro-F1 of the contextual vector minus that arm's, mean over words.
      taken: what uniform attention takes away, minus half of the lead over the bag of words.
      sets, heads: see there.
      moved: (word, or "mean", which word is moved, place) → macro-F1; the baseline is that of unmoved sentences.
      loss: place → macro-F1 that is lost where the cue is moved there, mean over words.
      loss_strict: the same with intervals for all places together.
    """

    seen: Seen
    words: dict[str, dict[str, Measure]]
    lead: dict[str, Measure]
    taken: Measure
    sets: Sets
    heads: Heads
    moved: dict[tuple[str, str, str], Measure]
    loss: dict[str, Measure]
    loss_strict: dict[str, Measure]


def places(seen: Seen) -> tuple[str, ...]:
    """Where the cue is moved to and can still be seen."""
    return texts.PLACES[:2] if seen.causal else texts.PLACES


def of_model(seen: Seen, config: Config) -> Model:
    """All numbers of a model."""
    words = seen.words

    def drawn(sizes: Callable[[OfWord], int]) -> list[np.ndarray]:
        return resampled([sizes(word) for word in words], config.resamples, config.seed)

    def scores(answers: Callable[[OfWord], np.ndarray], gold: Callable[[OfWord], np.ndarray], weights: list) -> Any:
        """Macro-F1 by word, [words, 1 + resamples]."""
        pairs = zip(words, weights, strict=True)
        return np.stack([macro_f1(answers(word), gold(word), len(word.senses), own) for word, own in pairs])

    weights = drawn(lambda word: len(word.gold))
    arms = {arm: scores(lambda word, arm=arm: word.answers[arm], lambda word: word.gold, weights)
            for arm in words[0].answers}  # fmt: skip
    table = {
        name: {arm: interval(rows[own].mean(0), baseline=arms[BAG][own].mean(0)[0]) for arm, rows in arms.items()}
        for name, own in _groups(words)
    }
    mean = {arm: rows.mean(0) for arm, rows in arms.items()}
    lead = {arm: interval(mean[CONTEXT] - mean[arm], baseline=0.0) for arm in mean if arm != CONTEXT}
    taken = interval((mean[CONTEXT] - mean[RETRAINED]) - (mean[CONTEXT] - mean[BAG]) / 2, baseline=0.0)

    weights = drawn(lambda word: len(word.some))
    part = lambda word: word.gold[word.some]  # noqa: E731
    full = scores(lambda word: word.found, part, weights).mean(0)
    of_sets = [scores(lambda word, at=at: word.answers_of_sets[:, at], part, weights).mean(0)
               for at in range(1 + config.draws)]  # fmt: skip
    margins = np.stack([  # [words, 1 + resamples, sets]
        own @ (word.margin[:, None] - word.margin_of_sets) / len(word.some)
        for word, own in zip(words, weights, strict=True)
    ]).mean(0)  # fmt: skip
    random_f1 = np.array([full[0] - one[0] for one in of_sets[1:]])
    sets = Sets(
        interval(margins[:, 0], baseline=margins[0, 1:].max()), interval(full - of_sets[0], baseline=random_f1.max()),
        margins[0, 1:], random_f1,
    )  # fmt: skip

    shape = words[0].lost.shape[1:]
    f1 = []
    for at in np.ndindex(shape):
        left = scores(lambda word, at=at: word.without[:, at[0], at[1]], part, weights).mean(0)
        f1.append(interval(full - left, baseline=0.0))
    heads = _heads(words, weights, Measure(*(np.reshape(one, shape) for one in zip(*f1, strict=True))), config)

    weights = drawn(lambda word: len(word.cues.sentence))
    there = lambda word: word.gold[word.some][word.cues.sentence]  # noqa: E731
    before = scores(lambda word: word.found[word.cues.sentence], there, weights)
    moved, loss, strict = {}, {}, {}
    level = 1 - 0.05 / len(places(seen))
    for which, place in words[0].cues.answers:
        after = scores(lambda word, key=(which, place): word.cues.answers[key], there, weights)
        for name, own in _groups(words):
            moved[name, which, place] = interval(after[own].mean(0), baseline=before[own].mean(0)[0])
        if which == "cue":
            lost = (before - after).mean(0)
            loss[place], strict[place] = (_wide(interval(lost, one, 0.0), lost, words) for one in (0.95, level))
    return Model(seen, table, lead, taken, sets, heads, moved, loss, strict)


def _groups(words: list[OfWord]) -> list[tuple[str, slice]]:
    """Each word, and all of them."""
    return [*((word.name, slice(at, at + 1)) for at, word in enumerate(words)), ("mean", slice(None))]


def _wide(found: Measure, samples: np.ndarray, words: list[OfWord]) -> Measure:
    """Where no resample differs from any other, the interval of the rule of three."""
    if np.ptp(samples) > 0:
        return found
    reach = 3 / sum(len(word.cues.sentence) for word in words)
    return found._replace(low=found.low - reach, high=found.high + reach)


def _heads(words: list[OfWord], weights: list[np.ndarray], f1: Measure, config: Config) -> Heads:
    shape = words[0].lost.shape[1:]
    top = min(config.top, int(np.prod(shape)))
    # every word counts as much as every other, however many sentences it has
    share = np.concatenate([np.full(len(word.some), 1 / len(word.some)) for word in words])[:, None, None]
    whole = float(np.mean([word.margin.mean() for word in words]))
    tally = Tally(np.concatenate([word.lost for word in words]) * share / whole, share, np.zeros(()))
    values, null = statistics.sign_flips(tally, seed=config.seed)
    lost = statistics.estimate(tally, resamples=config.resamples, seed=config.seed)

    to_cue = np.concatenate([word.cues.attention for word in words])
    alike = np.concatenate([word.cues.alike for word in words])
    share = np.concatenate([np.full(len(word.cues.words), 1 / len(word.cues.words)) for word in words])[:, None, None]
    known = ~np.isnan(alike)
    looked = Tally(np.where(known, to_cue, 0) * share, known * share, np.where(known, alike, 0) * share)
    attention = statistics.difference(looked, resamples=config.resamples, seed=config.seed)
    looks, by_chance = statistics.sign_flips(looked, seed=config.seed)

    means = [own @ word.lost.reshape(len(word.some), -1) / len(word.some)
             for word, own in zip(words, weights, strict=True)]  # each [1 + resamples, layers · N]  # fmt: skip
    best = _top(np.mean(means, axis=0), top)
    overlap = np.array([_jaccard(best[0], one) for one in best])
    overlap[0] = overlap[1:].mean()
    of_word = {word.name: _top(own[:1], top)[0] for word, own in zip(words, means, strict=True)}
    pairs = [_jaccard(a, b) for i, a in enumerate(of_word.values()) for b in list(of_word.values())[:i]]
    agreement = np.corrcoef(stats.rankdata(lost.value), stats.rankdata(attention.value))[0, 1]
    return Heads(
        whole, lost, f1, statistics.max_statistic(values, null).heads, attention,
        statistics.max_statistic(looks, by_chance).heads, float(agreement), best[0], of_word,
        interval(overlap, baseline=_by_chance(top, int(np.prod(shape)))), float(np.mean(pairs)) if pairs else np.nan,
    )  # fmt: skip


def _top(means: np.ndarray, count: int) -> np.ndarray:
    """The heads with the highest numbers, [..., count], the highest first."""
    return np.argsort(-means, axis=-1, kind="stable")[..., :count]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b))
    return both / (len(a) + len(b) - both)


def _by_chance(top: int, heads: int) -> float:
    """The expected overlap of two random sets of heads."""
    both = np.arange(top + 1)
    return float(np.sum(stats.hypergeom.pmf(both, heads, top, top) * both / (2 * top - both)))


def cue_words(word: OfWord, count: int = 5) -> list[tuple[str, int]]:
    """The most frequent cues of a word."""
    names, often = np.unique(word.cues.words, return_counts=True)
    order = np.argsort(-often, kind="stable")[:count]
    return [(str(names[at]), int(often[at])) for at in order]


ARMS = (CONTEXT, RETRAINED, measure.FIXED, BAG, STATIC, measure.MAJORITY)
