"""The arms of a sweep, trained, and the rule of `studies.paired` applied to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from experiments.studies import paired
from experiments.studies.paired import Better, Comparison
from mhajax.statistics import Measure


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


def value(arm: Trained) -> Measure:
    """The mean of an arm over seeds, with its interval of 95 %."""
    return paired.over_seeds(arm.values, 0.0)


def compare(arms: Sequence[Trained], better: Better, margin: float) -> list[Comparison]:
    """The first arm against each of the others that have a say."""
    others = {arm.name: arm.values for arm in arms[1:] if not arm.control}
    return paired.compare(arms[0].values, others, better, margin)
