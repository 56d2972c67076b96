"""From what was counted in sentences to numbers with intervals.

A measure gives a `Tally`; `estimate` makes of it a `Measure`: value, interval, baseline; `difference` does it for value
minus baseline; `select_and_report` for the best of many heads, chosen and reported on different sentences.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array
from scipy import stats


class Tally(NamedTuple):
    """What a measure of heads found in some sentences, before it is divided and given an interval by `estimate`.

    Attributes:
      total: sum of the measure over what was measured in a sentence (queries, tokens), [..., sentences, ...].
      count: how many were summed, broadcasts to `total`.
      baseline: what `total` would be for the baseline of the measure, broadcasts to `total`.
    """

    total: Array | np.ndarray
    count: Array | np.ndarray
    baseline: Array | np.ndarray


class Measure(NamedTuple):
    """A value, its interval (95 % unless another level was asked for), and the value of the baseline; same shapes."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    baseline: np.ndarray


def estimate(
    tally: Tally,
    *,
    axis: int | tuple[int, int] = 0,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Measure:
    """Σ total / Σ count over sentences, or the mean of that over seeds, with an interval and the baseline.

    The interval is for sentences (and seeds) like these, of which these are a sample. Its width is Student's, from the
    jackknife: how much the value moves when one sentence is left out; with seeds, when one seed is, and when one
    sentence is left out of all seeds (they may share their sentences or not). Two forms:

    - A share, that is a measure whose total lies between 0 and count in every sentence (of every head): Clopper and
      Pearson's interval for the number of independent answers that would be as uncertain (Korn and Graubard). What is
      0 % or 100 % in every sentence, or the same in all, has the width that the number of sentences allows.
    - Anything else (distances, norms, losses): Student's t, reaching further on the side of the tail; how much further
      is told by a bootstrap, nested in seeds.

    How often intervals of 95 % cover the truth, in 100 (2,000 trials; tests/test_statistics.py counts some of it):

        units drawn from              2 seeds   3    5    10   20   50   200 sentences
        a normal distribution           95     96   96
        the same, 41 sentences each     95-99  95-98  95-98
        an exponential distribution     91     91   91    93   94   95   96
        the same, 41 sentences each     94     90   90
        a lognormal (σ = 1)                               88        93   96

    So with few seeds or sentences of a very skewed measure without bounds, an interval is too short. With 2 seeds that
    differ it is 12.7 standard errors either way. A plain percentile bootstrap over 5 normal seeds covers 83 times in
    100, Hesterberg's expanded percentiles 91 times.

    Args:
      tally: of any measure. Sentences with count 0 count for nothing.
      axis: of the sentences; or (seed axis, sentence axis). For measures of weights alone, the axis of the seeds. The
        other axes (layers, heads) are kept, each with its own interval.
      resamples: of the bootstrap.
      seed: of the bootstrap.
      level: of the interval.

    Returns:
      A Measure of the other axes. NaN where nothing is counted; `low` and `high` are NaN too where only one sentence
      (or seed) counts, from which no interval follows.

    Raises:
      ValueError: axis is not in the tally, or has fewer than two sentences or seeds.

    Example:
      >>> import numpy as np
      >>> tally = Tally(total=np.array([[3, 4], [2, 4], [4, 4]]), count=np.array(4), baseline=np.array(1))
      >>> found = estimate(tally, axis=0)  # 3 sentences, 2 heads
      >>> found.value.tolist(), found.baseline.tolist()
      ([0.75, 1.0], [0.25, 0.25])
      >>> np.round(found.low, 2).tolist(), found.high.tolist()[1]  # 3 sentences say little
      ([0.05, 0.29], 1.0)

    References:
      Korn & Graubard 1998, "Confidence Intervals for Proportions with Small Expected Number of Positive Counts
      Estimated from Survey Data". Hesterberg 2015, "What Teachers Should Know about the Bootstrap", section 5
      (skewness). Owen 2007, "The Pigeonhole Bootstrap" (seeds and sentences both drawn). Cameron, Gelbach & Miller
      2011, "Robust Inference with Multiway Clustering" (the sum of the two variances). Zou & Donner 2008, "Construction
      of Confidence Limits about Effect Measures: A General Approach" (the squared half widths are added instead).
    """
    total, count, baseline = _arrays("estimate", tally, axis)
    _check_level("estimate", level)
    bounds = (0.0, 1.0) if _is_share(total, count) else (-np.inf, np.inf)
    value, low, high = _interval(total, count, bounds, level, resamples, seed)
    return _shaped(tally, axis, value, low, high, _mean_ratio(baseline, count))


def difference(
    tally: Tally,
    *,
    axis: int | tuple[int, int] = 0,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Measure:
    """Value minus baseline, with the interval of that difference; the baseline of it is 0.

    Head and baseline were measured on the same sentences, so what makes a sentence easy for both is not in the width:
    that two intervals of `estimate` overlap says nothing, that this one leaves out 0 does.

    Args, Returns, Raises: as `estimate`. The difference of two shares lies between -1 and 1.

    Example:
      >>> import numpy as np
      >>> tally = Tally(total=np.array([3, 2, 4, 4]), count=np.array(4), baseline=np.array([2, 1, 3, 3]))
      >>> difference(tally).value.item()
      0.25
    """
    total, count, baseline = _arrays("difference", tally, axis)
    _check_level("difference", level)
    share = _is_share(total, count) and _is_share(baseline, count)
    bounds = (-1.0, 1.0) if share else (-np.inf, np.inf)
    value, low, high = _interval(total - baseline, count, bounds, level, resamples, seed)
    return _shaped(tally, axis, value, low, high, np.where(np.isnan(value), np.nan, 0.0))


class Report(NamedTuple):
    """The best head, chosen on some sentences and measured on others.

    Attributes:
      best: its value; `baseline` is the best alternative's, chosen the same way.
      difference: best minus that baseline, paired.
      chosen: which head each half of the sentences chose, as an index into the flattened head axes, [2, ...] and, with
        seeds, [2, seeds, ...].
      chosen_baseline: which alternative, likewise; None without alternatives.
    """

    best: Measure
    difference: Measure
    chosen: np.ndarray
    chosen_baseline: np.ndarray | None


def select_and_report(
    tally: Tally,
    *,
    axis: int | tuple[int, int] = 0,
    heads: int | tuple[int, ...],
    alternatives: Tally | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> Report:
    """Choose the best head on one half of the sentences, report it on the other half; and the other way round.

    The best of many heads on the sentences that chose it looks better than it is. Here every sentence is answered by
    the head that the other half of the sentences chose, for each seed its own.

    Args:
      tally: larger is better.
      axis: of the sentences, or (seed axis, sentence axis).
      heads: the axes to choose from, e.g. (1, 3) of [seeds, L, sentences, N] with axis=(0, 2). What remains is kept.
      alternatives: what to compare with, chosen in the same way: all fixed offsets, or as many untrained heads. The
        same axes as `tally`, but for the sizes of `heads` (one size may be 1); with one for all seeds, that size is 1.
        None: the baseline of the chosen head.
      seed: of the halves.
      level: of the intervals.

    Returns:
      A Report.

    Raises:
      ValueError: axes that are not there, or fewer than two sentences or seeds.

    Example:
      >>> import numpy as np
      >>> hits = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 1]] * 2)  # 6 sentences, 3 heads: the last is right
      >>> report = select_and_report(Tally(hits, np.array(1), np.array(0.5)), heads=1)
      >>> report.best.value.item(), report.difference.value.item(), report.chosen.tolist()
      (1.0, 0.5, [2, 2])
    """
    _check_level("select_and_report", level)
    ours, chosen = _cross_fitted(tally, axis, heads, seed)
    theirs, other = ours, None
    if alternatives is not None:
        theirs, other = _cross_fitted(alternatives, axis, heads, seed)
        theirs = Tally(theirs.total, theirs.count, theirs.total)
    # A sentence's baseline is counted like its head's answers: the same questions, so that both can be subtracted.
    rate = np.divide(theirs.baseline, theirs.count, out=np.zeros_like(theirs.total), where=theirs.count > 0)
    fitted = Tally(ours.total, ours.count, rate * ours.count)
    where = 0 if not isinstance(axis, tuple) else (0, 1)
    return Report(estimate(fitted, axis=where, level=level), difference(fitted, axis=where, level=level), chosen, other)


def _cross_fitted(
    tally: Tally, axis: int | tuple[int, int], heads: int | tuple[int, ...], seed: int
) -> tuple[Tally, np.ndarray]:
    """[(seeds,) sentences, kept axes]: in each half of the sentences the head that the other half chose; and which."""
    arrays = np.broadcast_arrays(*(np.asarray(part, float) for part in tally))
    shape = arrays[0].shape
    units = axis if isinstance(axis, tuple) else (axis,)
    over = heads if isinstance(heads, tuple) else (heads,)
    named = [a % len(shape) for a in (*units, *over) if -len(shape) <= a < len(shape)]
    if len(set(named)) < len(units) + len(over) or shape[units[-1]] < 2:
        raise ValueError(
            "statistics.select_and_report: axis and heads must be different axes of a tally with at least 2 sentences, "
            f"got axis={axis}, heads={heads} and {shape}."
        )
    kept = [a for a in range(len(shape)) if a not in named]
    order = [*named[: len(units)], *kept, *named[len(units) :]]
    flat = [array.transpose(order) for array in arrays]
    flat = [array.reshape(*array.shape[: len(units) + len(kept)], -1) for array in flat]
    sentences = len(units) - 1  # the axis of the sentences now; the heads are last
    size = flat[0].shape[sentences]
    halves = np.array_split(np.random.default_rng(seed).permutation(size), 2)
    out = [np.zeros(array.shape[:-1]) for array in flat]
    chosen = []
    for choose, report in (halves, halves[::-1]):
        total, count = (np.take(array, choose, sentences).sum(sentences) for array in flat[:2])
        rate = np.divide(total, count, out=np.full_like(total, -np.inf), where=count > 0)
        best = np.where(np.isnan(rate), -np.inf, rate).argmax(-1)  # what was not measured is not the best
        chosen.append(best)
        index = np.expand_dims(best, (sentences, -1))
        part = (slice(None),) * sentences + (report,)
        for filled, array in zip(out, flat, strict=True):
            filled[part] = np.take_along_axis(array[part], index, axis=-1)[..., 0]
    return Tally(*out), np.stack(chosen)


def _arrays(who: str, tally: Tally, axis: int | tuple[int, int]) -> list[np.ndarray]:
    """total, count and baseline as [seeds, sentences, everything else]; without a seed axis, one seed."""
    parts = [np.asarray(part, float) for part in tally]
    try:
        arrays = np.broadcast_arrays(*parts)
    except ValueError:
        raise ValueError(
            f"statistics.{who}: total, count and baseline of a tally must broadcast to one shape, got "
            f"{', '.join(str(part.shape) for part in parts)}."
        ) from None
    axes = axis if isinstance(axis, tuple) else (axis,)
    shape = arrays[0].shape
    if (
        len(axes) > 2
        or any(not -len(shape) <= a < len(shape) for a in axes)
        or len({a % len(shape) for a in axes}) < len(axes)
    ):
        raise ValueError(
            f"statistics.{who}: axis must be the axis of the sentences or (seed axis, sentence axis) of a tally with "
            f"{len(shape)} axes {shape}, got {axis}."
        )
    if min(shape[a] for a in axes) < 2:
        raise ValueError(
            f"statistics.{who}: an interval needs at least 2 along axis {axis}, got {shape}; "
            "with one seed, take that seed out and give the axis of its sentences."
        )
    front = [np.moveaxis(array, axes, range(len(axes))) for array in arrays]
    return [array.reshape((1,) * (2 - len(axes)) + array.shape[: len(axes)] + (-1,)) for array in front]


def _check_level(who: str, level: float) -> None:
    if not 0 < level < 1:
        advice = f"; write {level / 100:g}" if 1 < level < 100 else "."
        raise ValueError(f"statistics.{who}: level must be in (0, 1), such as 0.95, got {level}{advice}")


def _shaped(tally: Tally, axis: int | tuple[int, int], *parts: np.ndarray) -> Measure:
    """The axes that are not summed over, given back to flat arrays."""
    shape = np.broadcast_shapes(*(np.shape(part) for part in tally))
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    return Measure(*(part.reshape([size for a, size in enumerate(shape) if a not in axes]) for part in parts))


def _is_share(total: np.ndarray, count: np.ndarray) -> bool:
    """Whether all totals lie between 0 and count, but for rounding: of all heads; one alone may do so by chance."""
    slack = 1e-5 * count
    return bool(np.all((total >= -slack) & (total <= count + slack)))


def _mean_ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Mean over the seeds that count anything of Σ total / Σ count; [cells]."""
    sums = count.sum(1)
    ratios = np.divide(total.sum(1), sums, out=np.zeros_like(sums), where=sums > 0)
    seeds = (sums > 0).sum(0)
    return np.where(seeds > 0, ratios.sum(0) / np.maximum(seeds, 1), np.nan)


class _Spread(NamedTuple):
    """How uncertain a value is: half the width of a symmetric interval (NaN: none follows), and sentences; [cells]."""

    half: np.ndarray
    sentences: np.ndarray


def _jackknife(total: np.ndarray, count: np.ndarray, level: float) -> _Spread:
    """Of `_mean_ratio`: Student's half width from sentences, or from seeds and sentences, counting nothing twice.

    Seeds and sentences have half widths with their own degrees of freedom, whose squares are added (Zou and Donner).
    Adding variances, with degrees of freedom after Satterthwaite, covers 91 times in 100 with 2 seeds: where their
    variance comes out small by chance, it also hides that 2 seeds know little.
    """
    sums = count.sum(1)  # [seeds, cells]
    seeds = np.maximum((sums > 0).sum(0), 1)
    ratios = np.divide(total.sum(1), sums, out=np.zeros_like(sums), where=sums > 0)
    rest = sums[:, None] - count
    moves = np.divide(total - ratios[:, None] * count, rest, out=np.zeros_like(total), where=rest > 0)
    together = count.sum(0)  # [sentences, cells]
    sentences = np.divide(
        together.sum(0) ** 2, (together**2).sum(0), out=np.zeros(together.shape[1]), where=together.sum(0) > 0
    )  # Kish
    correction = np.maximum(sentences - 1, 0) / np.maximum(sentences, 1)
    from_sentences = correction * ((moves.sum(0) / seeds) ** 2).sum(0)
    student = lambda units: stats.t.ppf(0.5 + level / 2, units - 1) ** 2  # noqa: E731 - NaN for one unit
    of_sentences = student(sentences) * from_sentences
    if len(total) == 1:
        return _Spread(np.sqrt(of_sentences), sentences)
    from_both = correction * (moves**2).sum((0, 1)) / seeds**2
    off = np.where(sums > 0, ratios - ratios.sum(0) / seeds, 0)
    of_seeds = student(seeds) * (off**2).sum(0) / (seeds * np.maximum(seeds - 1, 1))
    joint = of_seeds + student(sentences) * (from_sentences - from_both)
    return _Spread(np.sqrt(np.maximum(np.maximum(of_seeds, of_sentences), joint)), sentences)


def _interval(
    total: np.ndarray,
    count: np.ndarray,
    bounds: tuple[float, float],
    level: float,
    resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high, [cells]; `bounds` are the range of a measure, infinite where it has none."""
    value = _mean_ratio(total, count)
    spread = _jackknife(total, count, level)
    low, high = np.full((2, len(value)), np.nan)
    known = ~np.isnan(value) & ~np.isnan(spread.half)
    if known.any() and np.isfinite(bounds[0]):
        low[known], high[known] = _within_bounds(
            value[known], _Spread(*(part[known] for part in spread)), bounds, level
        )
    elif known.any():
        below, above = _skewed(*_bootstrap(total[..., known], count[..., known], level, resamples, seed))
        low[known], high[known] = value[known] - spread.half[known] * below, value[known] + spread.half[known] * above
    return value, low, high


def _skewed(below: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of Student's half widths an interval reaches below and above the value, from the bootstrap's two sides.

    Never less than one, which a bootstrap of few units would give (0.7 for 2). The quantiles of a bootstrap show a
    third of the asymmetry that a skewed measure needs (Hesterberg), so the longer side gets it three times.
    """
    longer = 1.5 * (above - below)
    return 1 + np.maximum(-longer, 0), 1 + np.maximum(longer, 0)


def _within_bounds(
    value: np.ndarray, spread: _Spread, bounds: tuple[float, float], level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Korn and Graubard's interval; where all sentences say the same, what so many of them cannot exclude."""
    size = bounds[1] - bounds[0]
    share = np.clip((value - bounds[0]) / size, 0, 1)
    tail = (1 - level) / 2
    half = spread.half / size
    same = (half <= 1e-6) | (share * (1 - share) <= 1e-12)
    answers = share * (1 - share) * (stats.norm.ppf(tail) / np.where(same, 1, half)) ** 2
    hits, misses = share * answers, (1 - share) * answers
    low = stats.beta.ppf(tail, np.where(same, 1, hits), np.where(same, 1, misses) + 1)
    high = stats.beta.ppf(1 - tail, np.where(same, 1, hits) + 1, np.where(same, 1, misses))
    unseen = 1 - tail ** (1 / spread.sentences)
    low = np.where(same, share - unseen * share, low)
    high = np.where(same, share + unseen * (1 - share), high)
    return bounds[0] + size * low, bounds[0] + size * high


def _bootstrap(
    total: np.ndarray, count: np.ndarray, level: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far the quantiles of a nested bootstrap lie below and above the value, over half a normal interval's width.

    Seeds are drawn, and sentences inside them: the same sentences for all seeds, which is right whether the seeds saw
    the same sentences or different ones.
    """
    random = np.random.default_rng(seed)
    seeds, sentences, cells = total.shape
    of_sentences = random.multinomial(sentences, np.full(sentences, 1 / sentences), size=resamples).astype(float)
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(float)
    quantiles = stats.norm.ppf(0.5 + level / 2)
    below, above = np.ones((2, cells))
    step = max(1, 4_000_000 // (resamples * seeds))  # so many cells at once: 100 MB
    for start in range(0, cells, step):
        part = slice(start, start + step)
        drawn_total = np.einsum("rs,ksc->krc", of_sentences, total[..., part], optimize=True)
        drawn_count = np.einsum("rs,ksc->krc", of_sentences, count[..., part], optimize=True)
        counted = drawn_count > 0
        ratios = np.divide(drawn_total, drawn_count, out=np.zeros_like(drawn_total), where=counted)
        weights = of_seeds.T[:, :, None] * counted
        number = weights.sum(0)
        value = _mean_ratio(total[..., part], count[..., part])
        samples = np.where(number > 0, (weights * ratios).sum(0) / np.maximum(number, 1), value)
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        width = quantiles * samples.std(0)
        there = width > 1e-12 * np.abs(value)
        below[part] = np.where(there, (value - low) / np.where(there, width, 1), 1)
        above[part] = np.where(there, (high - value) / np.where(there, width, 1), 1)
    return below, above
