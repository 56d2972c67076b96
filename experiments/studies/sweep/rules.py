"""The rule of the study, as its docstring states it, applied to what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.studies.study import Verdict, Word
from mhajax.statistics import Measure

LEVEL = 0.95


class Trained(NamedTuple):
    """An arm, trained.

    Attributes:
      name: of the arm.
      control: has no say in the verdict.
      lines: what makes it another arm, the chosen one of the tuned lines last.
      values: the measure of each seed.
      tried: of each line that was tried for it, the measure of the first seed; None where it diverged.
      parameters: how many it has.
      seconds: of training.
    """

    name: str
    control: bool
    lines: tuple[str, ...]
    values: Sequence[float]
    tried: dict[str, float | None]
    parameters: int
    seconds: float


class Comparison(NamedTuple):
    """The claimed arm against another.

    Attributes:
      other: its name.
      ahead: by how much the claimed arm is better, over seeds; the baseline is the margin.
      seeds: about how many would show a difference of this size, if it is one.
    """

    other: str
    ahead: Measure
    seeds: int | None


def value(arm: Trained) -> Measure:
    """The mean of an arm over seeds, with its interval of 95 %."""
    return over_seeds(np.asarray(arm.values), 0.0, LEVEL)


def compare(arms: Sequence[Trained], better: str, margin: float) -> list[Comparison]:
    """The first arm against each of the others that have a say."""
    others = [arm for arm in arms[1:] if not arm.control]
    level = 1 - (1 - LEVEL) / len(others)
    sign = 1 if better == "higher" else -1
    found = []
    for other in others:
        ahead = sign * (np.asarray(arms[0].values, float) - np.asarray(other.values, float))
        found.append(Comparison(other.name, over_seeds(ahead, margin, level), _needed(ahead - margin, level)))
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


def over_seeds(values: np.ndarray, baseline: float, level: float) -> Measure:
    """The mean of one number per seed, and Student's interval, whatever the range of the numbers."""
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
