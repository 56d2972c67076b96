"""One thing against others, seed by seed: by how much it is better, with an interval over seeds, and the verdict.

The rule of studies that compare seeds. Let d be by how much the first is better than another, seed by seed, with
Student's interval over seeds that holds for all comparisons of the claim together (Bonferroni).
    supported     against each of the others the whole interval of d is above the margin
    refuted       against one of them the whole interval is below the margin
    not resolved  else
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from experiments.studies.study import Verdict, Word
from mhajax.statistics import Measure

LEVEL = 0.95
Better = Literal["lower", "higher"]


class Comparison(NamedTuple):
    """The first against another.

    Attributes:
      other: its name.
      ahead: by how much the first is better, over seeds; the baseline is the margin.
      seeds: about how many would show a difference of this size, if it is one.
    """

    other: str
    ahead: Measure
    seeds: int | None


def compare(values: ArrayLike, others: Mapping[str, ArrayLike], better: Better, margin: float) -> list[Comparison]:
    """One number a seed against those of each of the others.

    Args:
      values: of the first, [seeds].
      others: name → [seeds], of the same seeds.
      better: whether lower or higher is.
      margin: by how much it must be better.
    """
    level = 1 - (1 - LEVEL) / max(len(others), 1)
    sign = 1 if better == "higher" else -1
    found = []
    for name, other in others.items():
        ahead = sign * (np.asarray(values, float) - np.asarray(other, float))
        found.append(Comparison(name, over_seeds(ahead, margin, level), _needed(ahead - margin, level)))
    return found


def verdict(claim: str, found: Sequence[Comparison]) -> Verdict:
    """What the rule says."""
    above = [float(one.ahead.low) > float(one.ahead.baseline) for one in found]
    below = [float(one.ahead.high) < float(one.ahead.baseline) for one in found]
    word: Word = "supported" if all(above) else "refuted" if any(below) else "not resolved"
    shown = [
        f"ahead of “{one.other}” by {float(one.ahead.value):.4g} [{float(one.ahead.low):.4g}, "
        f"{float(one.ahead.high):.4g}]"
        for one in found
    ]
    open_ = [one.seeds for one, up, down in zip(found, above, below, strict=True) if one.seeds and not up and not down]
    more = f"; about {max(open_)} seeds would resolve a difference of this size" if open_ else ""
    return Verdict(claim, word, "; ".join(shown) + (more if word == "not resolved" else ""))


def over_seeds(values: ArrayLike, baseline: float, level: float = LEVEL) -> Measure:
    """The mean of one number per seed, and Student's interval, whatever the range of the numbers."""
    values = np.asarray(values, float)
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    return Measure(*(np.asarray(part) for part in (mean, mean - half, mean + half, baseline)))


def _needed(ahead: np.ndarray, level: float) -> int | None:
    """Seeds whose interval would be as long as the mean is far from 0."""
    mean, spread = abs(float(ahead.mean())), float(ahead.std(ddof=1))
    if not mean or not spread:
        return None
    for seeds in range(2, 10_000):
        if stats.t.ppf((1 + level) / 2, seeds - 1) * spread / seeds**0.5 < mean:
            return seeds
    return None
