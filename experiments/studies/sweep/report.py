"""The page of a sweep, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.studies import paired
from experiments.studies.paired import Comparison
from experiments.studies.study import Answer
from experiments.studies.sweep import rules
from experiments.studies.sweep.rules import Trained
from mhajax import figures
from mhajax.report.page import Column, Page
from mhajax.statistics import Measure

if TYPE_CHECKING:
    from experiments.studies.sweep import Config


def make(config: Config, arms: Sequence[Trained]) -> Answer:
    """The answer."""
    values = {arm.name: rules.value(arm) for arm in arms}
    found = rules.compare(arms, config.better, config.margin)
    verdict = paired.verdict(config.claim, found)
    name = config.measure.replace("_", " ")
    quick = ["A quick look: small models on little data, whose numbers mean nothing."] if config.quick else []
    page = Page(config.question, *quick, f"{config.claim} {verdict.word.capitalize()}: {verdict.because}.")
    section = page.section("What was trained")
    section.text(
        f"{len(arms)} arms of {config.seeds} seeds each; for the same seed all see the same batches. The measure is "
        f"the {name}, of which {config.better} is better."
        + (
            f" Every arm takes the best for its first seed of {len(config.tuned)} settings, tried for all alike."
            if config.tuned
            else ""
        ),
        f"All arms are {Path(config.base.path).name}"
        + (f" with {', '.join(config.base.set)}." if config.base.set else "."),
    )
    against = float(values[arms[0].name].value)
    drawing = figures.relation_accuracy(
        {arm: (float(one.value), float(one.low), float(one.high), against) for arm, one in values.items()},
        title=config.question, label=f"{name}, {config.better} is better", baseline_name=arms[0].name,
    )  # fmt: skip
    section.figure(drawing, f"Mean of {config.seeds} seeds and its interval of 95 %.", name="arms")
    section.table(
        ["arm", Column(name, ".4f"), "by seed", "changed", "parameters", "seconds"],
        [
            [f"{arm.name} (control)" if arm.control else arm.name, values[arm.name]._replace(baseline=_NONE),
             ", ".join(f"{value:.4f}" for value in arm.values), ", ".join(arm.lines) or "nothing",
             f"{arm.parameters:,}", f"{arm.seconds:.0f}"]
            for arm in arms
        ],
        caption="Every arm; the interval is over seeds.",
    )  # fmt: skip
    section = page.section("The verdict")
    section.text(
        f"“{arms[0].name}” against each of the others, seed by seed; the intervals hold for all of them together. "
        f"Supported if each is above {config.margin:g}, refuted if one is below, else not resolved.",
    )
    section.table(
        ["against", Column("ahead by", ".4f")],
        [[one.other, one.ahead] for one in found],
        caption=f"By how much “{arms[0].name}” is better; vs is the margin.",
    )
    at_the_end = [arm.name for arm in arms if len(config.tuned) > 1 and _at_the_end(arm, config.tuned)]
    page.section("What would change this").text(
        *_wider(at_the_end),
        "A larger model, more steps or other data are another question: the verdict is about this training. More seeds "
        "make the intervals shorter." + ("" if config.tuned else " No setting was tuned for each arm by itself."),
    )
    return Answer((verdict,), _numbers(arms, values, found), page, {"arms": drawing})


def _wider(arms: Sequence[str]) -> list[str]:
    """What to say of arms whose best setting has no neighbour on one side."""
    text = f"The first or the last of the settings was the best one for {', '.join(arms)}: more of them on that side "
    return [text + "may be better still."] if arms else []


def _at_the_end(arm: Trained, tuned: Sequence[str]) -> bool:
    """Whether the best of the settings has no neighbour on one side."""
    return any(line in (tuned[0], tuned[-1]) for line in arm.lines if line in tuned)


_NONE: Any = float("nan")


def _numbers(arms: Sequence[Trained], values: dict[str, Measure], found: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "arms": [{**arm._asdict(), "mean": _plain(values[arm.name])} for arm in arms],
        "comparisons": [{"against": one.other, "ahead": _plain(one.ahead), "seeds": one.seeds} for one in found],
    }


def _plain(one: Measure) -> dict[str, float]:
    return {name: float(part) for name, part in one._asdict().items()}
