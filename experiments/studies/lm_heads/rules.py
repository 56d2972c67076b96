"""The rules of the study, as its docstring states them, applied to what was found."""

from __future__ import annotations

import math

import numpy as np

from experiments.studies.lm_heads.measures import INDUCTION, Found
from experiments.studies.study import Verdict
from mhajax.statistics import Measure


def all_of(found: Found) -> tuple[Verdict, Verdict, Verdict, Verdict]:
    """The verdicts on induction, sink, agreement and redundancy."""
    return _induction(found), _sink(found), _agreement(found), _redundancy(found)


def _induction(found: Found) -> Verdict:
    best = found.roles[INDUCTION][1]
    low, high = float(best.difference.low), float(best.difference.high)
    word = "supported" if low > 0 else "refuted" if high < 0 else "not resolved"
    return Verdict(
        "Some heads attend to what came after the same token before.", word,
        f"best head {_shown(best.best)}, best head of shuffled parameters {float(best.best.baseline):.2f}",
    )  # fmt: skip


def _sink(found: Found) -> Verdict:
    above, below = np.mean(found.sink.low > 0.5), np.mean(found.sink.high < 0.5)
    word = "supported" if above > 0.5 else "refuted" if below > 0.5 else "not resolved"
    return Verdict(
        "More than half of the heads put more than half of their attention on the first token.", word,
        f"{above:.0%} of the heads do, {below:.0%} do not; of the others the interval holds one half",
    )  # fmt: skip


def _agreement(found: Found) -> Verdict:
    tenth, best = float(found.whole.value) / 10, found.without[1].best
    word = "supported" if float(best.low) > tenth else "refuted" if float(best.high) < tenth else "not resolved"
    return Verdict(
        "One head carries more than a tenth of the agreement of subject and verb.", word,
        f"lost without it {_shown(best)} of {float(found.whole.value):.2f} (a tenth is {tenth:.2f})",
    )  # fmt: skip


def _redundancy(found: Found) -> Verdict:
    rise, bound = found.pruned[0].by_importance, math.log(1.1)
    word = "supported" if float(rise.high) < bound else "refuted" if float(rise.low) > bound else "not resolved"
    return Verdict(
        "A quarter of the heads can be removed and perplexity rises by less than a tenth.", word,
        f"the loss rises by {_shown(rise, '.3f')} nats per token (a tenth is {bound:.3f})",
    )  # fmt: skip


def _shown(one: Measure, form: str = ".2f") -> str:
    value, low, high = (format(float(part), form) for part in one[:3])
    return f"{value} [{low}, {high}]"
