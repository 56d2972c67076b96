"""The rules of the study, as its docstring states them, applied to numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from experiments.studies.study import Verdict, Word
from experiments.studies.word_sense import findings
from experiments.studies.word_sense.findings import Model, Sets
from experiments.studies.word_sense.measure import BAG, STATIC
from mhajax.statistics import Measure

Held = Literal["holds", "fails", "is open"]


def above_zero(*measures: Measure) -> Held:
    """Whether all intervals lie above 0 (holds), or one below it (fails)."""
    if all(one.low > 0 for one in measures):
        return "holds"
    return "fails" if any(one.high < 0 for one in measures) else "is open"


def beyond_random(sets: Sets) -> Held:
    """Whether the chosen heads cost more than every random set (holds), or no more than half of them do (fails)."""
    cost = float(sets.margin.value)
    if cost > sets.margins_of_random.max():
        return "holds"
    return "fails" if cost <= np.median(sets.margins_of_random) else "is open"


def conditions(found: Model) -> tuple[Held, Held, Held]:
    """The three of the causal rule."""
    return (
        above_zero(found.lead[BAG], found.lead[STATIC]),
        above_zero(found.taken),
        beyond_random(found.sets),
    )


def causal(name: str, found: Model) -> Verdict:
    """Whether heads bring in the cue."""
    held = conditions(found)
    word: Word = "refuted" if "fails" in held else "supported" if set(held) == {"holds"} else "not resolved"
    bag, static, sets = found.lead[BAG], found.lead[STATIC], found.sets
    random = sets.margins_of_random
    because = (
        f"Macro-F1 of the contextual vector is {points(bag)} above the bag of words and {points(static)} above the "
        f"static vector (condition 1 {held[0]}). What uniform attention takes away, less half of the lead over the "
        f"bag, is {points(found.taken)} (2 {held[1]}). The chosen heads cost {signed(sets.margin, '.3f')} of the "
        f"margin of {found.heads.whole:.3f}, {len(random)} random sets of the same layers at most {random.max():.3f} "
        f"(3 {held[2]})."
    )
    return Verdict(f"{name}: heads bring the cue to the ambiguous word", word, because)


def robust(name: str, found: Model, tolerated: float) -> Verdict:
    """Whether the sense is told as well where the cue is moved."""
    where = findings.places(found.seen)
    if all(found.loss[place].high <= tolerated for place in where):
        word: Word = "supported"
    elif any(found.loss_strict[place].low > tolerated for place in where):
        word = "refuted"
    else:
        word = "not resolved"
    lost = ", ".join(f"{place} {points(found.loss[place])}" for place in where)
    because = f"Macro-F1 that is lost where the cue is moved: {lost}; tolerated are {100 * tolerated:g} points."
    return Verdict(f"{name}: the sense is told as well wherever the cue stands", word, because)


def all_of(models: dict[str, Model], tolerated: float) -> tuple[Verdict, ...]:
    """Both verdicts of every model."""
    return tuple(
        verdict
        for name, found in models.items()
        for verdict in (causal(name, found), robust(name, found, tolerated))
    )  # fmt: skip


def points(measure: Measure) -> str:
    """A difference of shares in points of a hundred, with its interval.

    >>> points(Measure(0.012, -0.001, 0.03, 0.0))
    '1.2 [-0.1, 3.0] points'
    """
    value, low, high = (100 * float(part) for part in measure[:3])
    return f"{value:.1f} [{low:.1f}, {high:.1f}] points"


def signed(measure: Measure, form: str) -> str:
    """A number with its interval."""
    return f"{measure.value:{form}} [{measure.low:{form}}, {measure.high:{form}}]"


def listed(heads: Sequence[int] | np.ndarray, per_layer: int) -> str:
    """Heads by their names, "1·3, 0·2"."""
    return ", ".join("{}·{}".format(*divmod(int(head), per_layer)) for head in heads)
