"""Differences over seeds, each with an interval that holds for all differences of a claim together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from numpy.typing import ArrayLike

from experiments.studies import paired
from experiments.studies.paired import Comparison


def intervals(differences: Mapping[str, ArrayLike], margin: float = 0.0) -> list[Comparison]:
    """Student's interval of each difference, 95 % for all of them together (Bonferroni).

    Args:
      differences: name → [seeds].
      margin: what a rule compares with.
    """
    level = 1 - (1 - paired.LEVEL) / len(differences)
    return [Comparison(name, paired.over_seeds(one, margin, level), None) for name, one in differences.items()]


def above(found: Sequence[Comparison]) -> list[bool]:
    """Of each, whether the whole interval is above the margin."""
    return [float(one.ahead.low) > float(one.ahead.baseline) for one in found]


def below(found: Sequence[Comparison]) -> list[bool]:
    """Of each, whether the whole interval is below the margin."""
    return [float(one.ahead.high) < float(one.ahead.baseline) for one in found]


def shown(one: Comparison) -> str:
    """A difference and its interval in words."""
    return f"{one.other} {float(one.ahead.value):.3g} [{float(one.ahead.low):.3g}, {float(one.ahead.high):.3g}]"
