"""The page of a study of trained heads, and its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.studies import paired
from experiments.studies.paired import Comparison
from experiments.studies.study import Answer, Verdict
from experiments.studies.trained_heads.measurements import MEASUREMENTS, Found
from mhajax import figures
from mhajax.figures import Drawing
from mhajax.report.page import Column, Page
from mhajax.report.subject import Subject

if TYPE_CHECKING:
    from experiments.studies.trained_heads import Claim, Config


def make(config: Config, found: Sequence[Sequence[Found]], subject: Subject) -> Answer:
    """The answer.

    Args:
      config: of the study.
      found: of each claim, of each seed.
      subject: what was measured.
    """
    comparisons = [_compared(claim, of_seeds) for claim, of_seeds in zip(config.claims, found, strict=True)]
    said = verdicts(config, found)
    quick = ["A quick look: a small model on little data, whose numbers mean nothing."] if config.quick else []
    page = Page(config.question, *quick, *map(_said, said))
    page.section("What was trained").text(
        f"{Path(config.base.path).name}"
        + (f" with {', '.join(config.base.set)}" if config.base.set else "")
        + f", {config.seeds} seeds. Its heads were measured on {subject.size} {subject.sequence}s: {subject.origin}.",
        *([config.literature] if config.literature else []),
    )
    drawings: dict[str, Drawing] = {}
    for number, claim in enumerate(config.claims, 1):
        parts = found[number - 1], comparisons[number - 1], said[number - 1]
        drawings[f"claim-{number}"] = _section(page, number, claim, *parts)
    page.section("What would change this").text(
        "Each number is of one trained seed, and its interval is over seeds (Student's, 95 % for all comparisons of a "
        f"claim together): another {config.seeds} seeds of the same training would be expected to give the same "
        "verdict. Another model, more steps or other sentences are another question; base.set of the config asks it.",
    )
    numbers = list(map(_numbers, config.claims, found, comparisons, said))
    return Answer(said, {"claims": numbers}, page, drawings)


def verdicts(config: Config, found: Sequence[Sequence[Found]]) -> tuple[Verdict, ...]:
    """What the rule says of what was found, of each claim and each seed."""
    return tuple(
        paired.verdict(claim.claim, _compared(claim, one)) for claim, one in zip(config.claims, found, strict=True)
    )


def _compared(claim: Claim, found: Sequence[Found]) -> list[Comparison]:
    values = [one.value for one in found]
    others = {name: [one.others[name] for one in found] for name in found[0].others}
    return paired.compare(values, others, claim.better, claim.margin)


def _section(
    page: Page, number: int, claim: Claim, found: Sequence[Found], compared: Sequence[Comparison], verdict: Verdict
) -> Drawing:
    section = page.section(claim.claim.removesuffix("."))
    method = inspect.cleandoc(MEASUREMENTS[claim.measure].__doc__ or "").replace("\n\n", "\n").split("\n")
    asked = " ".join(part for part in (claim.of, claim.part, claim.words and f"({claim.words})") if part)
    section.text(
        f"{verdict.word.capitalize()}: {verdict.because}.",
        f"Measured: {' '.join(method)}",
        f"Asked of: {asked}. {claim.better.capitalize()} is better; it must be better than each of the others by more "
        f"than {claim.margin:g}.",
    )
    value = paired.over_seeds([one.value for one in found], 0.0)
    names = list(found[0].others)
    means = [sum(one.others[name] for one in found) / len(found) for name in names]
    second = {claim.measure: means[1]} if len(means) > 1 else None
    drawing = figures.relation_accuracy(
        {claim.measure: (float(value.value), float(value.low), float(value.high), means[0])},
        title=f"{verdict.word.capitalize()}: {claim.claim}", label=f"{_UNITS.get(claim.measure, claim.measure)}",
        baseline_name=names[0], second=second, **({"second_name": names[1]} if second else {}),
    )  # fmt: skip
    section.figure(drawing, f"Mean of {len(found)} seeds and its interval of 95 %.", name=f"claim-{number}")
    section.table(
        ["seed", Column(claim.measure, ".4g"), *(Column(name, ".4g") for name in names), "which"],
        [[str(seed), one.value, *(one.others[name] for name in names), one.note] for seed, one in enumerate(found)],
        caption=f"Claim {number}, seed by seed.",
    )
    section.table(
        ["against", Column("ahead by", ".4g")], [[one.other, one.ahead] for one in compared],
        caption=f"Claim {number}: by how much it is ahead, over seeds; vs is the margin.",
    )  # fmt: skip
    return drawing


_UNITS = {
    "follows": "share of the words whose most attended key is a right one",
    "needed": "nats by which a word costs more without the head",
    "reach": "distance of the farthest head minus that of the nearest",
    "apart": "mean squared cosine of principal angles",
    "differ": "bits between where two heads look",
}


def _said(verdict: Verdict) -> str:
    return f"{verdict.claim} {verdict.word.capitalize()}: {verdict.because}."


def _numbers(claim: Claim, found: Sequence[Found], compared: Sequence[Comparison], verdict: Verdict) -> dict[str, Any]:
    return {
        "claim": claim.claim, "verdict": verdict.word, "by_seed": [one._asdict() for one in found],
        "comparisons": [
            {"against": one.other, "ahead": {name: float(part) for name, part in one.ahead._asdict().items()}}
            for one in compared
        ],
    }  # fmt: skip
