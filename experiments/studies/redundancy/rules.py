"""The rules of the study, as its docstring states them, applied to numbers that stand in its result."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from experiments.studies.redundancy import Config
from experiments.studies.redundancy.measures import RANKINGS, Found, effect
from experiments.studies.study import Verdict, Word
from mhajax.statistics import Measure, Tally, difference, estimate, select_and_report

RARE = 0.05  # of draws that are as good


class Numbers(NamedTuple):
    """What decides; nats per token.

    Attributes:
      rise: of the loss, with its baseline the mean of the random orders.
      ahead: rise minus the mean rise of the random orders.
      draws: rises of the random orders, [draws].
      excess: mean over layers of joint effect minus sum of single effects.
      excess_without: the same without the layer where both differ most.
      layer: that layer.
      gone: what the best head costs alone.
      risen: by how much the effect of the head that takes over rises.
    """

    rise: Measure
    ahead: Measure
    draws: np.ndarray
    excess: Measure
    excess_without: Measure
    layer: int
    gone: float
    risen: Measure


def numbers(config: Config, found: Found) -> Numbers:
    """What decides, from what was measured."""
    at = config.curve.index(config.share)
    chosen, judged = found.tokens
    rise = found.judged.ranked[RANKINGS[0]][at] - found.judged.full
    draws = found.judged.drawn[:, at] - found.judged.full  # [draws, windows]
    compared = effect(rise, judged, draws.mean(0))
    joint, single = found.effects.joint, found.effects.single.sum(-1)  # [windows, L]
    layer = int(np.abs((joint - single).sum(0)).argmax())
    others = np.delete(np.arange(joint.shape[1]), layer)
    excess = lambda some: difference(effect(joint[:, some].mean(1), chosen, single[:, some].mean(1)))  # noqa: E731
    risen = found.after - found.effects.single
    risen[(slice(None), *found.best)] = 0  # it is gone
    return Numbers(
        estimate(compared), difference(compared), draws.sum(1) / judged.sum(),
        excess(np.arange(joint.shape[1])), excess(others), layer,
        float(found.effects.single[(slice(None), *found.best)].sum() / chosen.sum()),
        select_and_report(Tally(*np.broadcast_arrays(*effect(risen, chosen))), heads=(1, 2)).best,
    )  # fmt: skip


def verdicts(config: Config, found: Numbers) -> tuple[Verdict, Verdict, Verdict, Verdict]:
    """What the rules say."""
    return _removable(config, found), _ranking(config, found), _understated(found), _takeover(config, found)


def from_result(result: dict[str, Any]) -> Numbers:
    """The numbers that stand in a result."""
    given = dict(result["decides"])
    for name in ("rise", "ahead", "excess", "excess_without", "risen"):
        given[name] = Measure(**{part: np.asarray(value, float) for part, value in given[name].items()})
    given["draws"] = np.asarray(given["draws"], float)
    return Numbers(**given)


def _removable(config: Config, found: Numbers) -> Verdict:
    return Verdict(
        f"{config.share:.0%} of the heads can be removed for less than {config.bound:g} nats per token.",
        _above(found.rise, config.bound, "refuted", "supported"),
        f"the loss rises by {shown(found.rise)} nats per token on text that did not choose the heads",
    )


def _ranking(config: Config, found: Numbers) -> Verdict:
    good = int(np.sum(found.draws <= float(found.rise.value)))
    p = (1 + good) / (1 + len(found.draws))
    word: Word = "refuted" if float(found.ahead.low) > 0 else "not resolved"
    word = "supported" if float(found.ahead.high) < 0 and p <= RARE else word
    return Verdict(
        "To remove the heads with the least single effects costs less than to remove as many random heads of the same "
        "layers.", word,
        f"{shown(found.ahead)} nats per token against the mean of {len(found.draws)} random orders, which cost "
        f"{found.draws.min():.3f} to {found.draws.max():.3f}; {good} of them cost as little (p = {p:.3f})",
    )  # fmt: skip


def _understated(found: Numbers) -> Verdict:
    word = _above(found.excess, 0.0, "supported", "refuted")
    same = word == _above(found.excess_without, 0.0, "supported", "refuted")
    return Verdict(
        "To remove all heads of a layer costs more than the sum of what each costs alone.",
        word if same else "not resolved",
        f"{shown(found.excess)} nats per token more in the mean layer, {shown(found.excess_without)} without layer "
        f"{found.layer}",
    )


def _takeover(config: Config, found: Numbers) -> Verdict:
    bound = config.takeover * found.gone
    return Verdict(
        f"When the head that costs most alone is gone, the effect of another one rises by more than "
        f"{config.takeover:.0%} of that cost.",
        _above(found.risen, bound, "supported", "refuted"),
        f"it rises by {shown(found.risen)} nats per token; {config.takeover:.0%} of the cost is {bound:.3f}",
    )


def _above(one: Measure, bound: float, above: Word, below: Word) -> Word:
    return above if float(one.low) > bound else below if float(one.high) < bound else "not resolved"


def shown(one: Measure) -> str:
    """Value and interval."""
    value, low, high = (f"{float(np.ravel(part)[0]):.3f}" for part in one[:3])
    return f"{value} [{low}, {high}]"
