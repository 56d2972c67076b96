"""The page of a study of a generated task, its figures and its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.studies import paired
from experiments.studies.generated import drawing, tasks
from experiments.studies.generated.arms import Arm, Found
from experiments.studies.generated.drawing import Panel
from experiments.studies.generated.task import Case, Task
from experiments.studies.study import Answer, Verdict
from mhajax.report.page import Column, Page, Section

if TYPE_CHECKING:
    from experiments.studies.generated import Config

NONE: Any = float("nan")


def make(config: Config, task: Task, found: Sequence[Found]) -> Answer:
    """The answer."""
    verdicts = task.verdicts(found)
    quick = ["A quick look: a few steps of few seeds, whose numbers mean nothing."] if config.quick else []
    page = Page(config.question, *quick, *map(_said, verdicts))
    results = page.section("What was found")
    drawings = {}
    for measure, label in task.labels.items():
        name = measure.replace(" ", "-")
        panels = [_panel(case, measure, found) for case in task.cases]
        title = f"{measure.capitalize()} of every arm"
        drawings[name] = drawing.draw(panels, title=title, label=label, faint=_controls(found))
        results.figure(drawings[name], _caption(config, measure), name=name)
        _table(results, config, task, measure, found)
    page.section("What was asked, and the rule").text(*_paragraphs(inspect.getdoc(tasks.TASKS[config.task.kind]) or ""))
    _method(page.section("What was trained"), config, task, found)
    page.section("What would change this").text(
        "Each number is of one trained seed, and intervals are over seeds: another "
        f"{config.seeds} seeds of the same training would be expected to give the same verdict. What training does not "
        "find may still be possible: more steps, other learning rates or another optimiser can change what an arm "
        "reaches, not what theory says is the best. Arms, sizes of the task and margins are values of the config.",
    )
    return Answer(verdicts, _numbers(task, found), page, drawings)


def reached(arms: Sequence[Arm], told: Sequence[dict[str, Any]]) -> list[Found]:
    """What the arms of a config reached, of the numbers in a result."""
    return [
        Found(
            arm,
            {
                case: {name: np.asarray(value) for name, value in cells.items() if isinstance(value, list)}
                for case, cells in one["cases"].items()
            },
            {case: cells["rate"] for case, cells in one["cases"].items()},
            {case: {float(rate): value for rate, value in cells["tried"].items()} for case, cells in
             one["cases"].items()},
            one["parameters"], one["seconds"],
        )
        for arm, one in zip(arms, told, strict=True)
    ]  # fmt: skip


def _said(verdict: Verdict) -> str:
    return f"{verdict.claim} {verdict.word.capitalize()}: {verdict.because}."


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.replace("`", "").split()) for paragraph in text.split("\n\n")]


def _controls(found: Sequence[Found]) -> set[str]:
    return {one.arm.name for one in found if one.arm.control}


def _panel(case: Case, measure: str, found: Sequence[Found]) -> Panel:
    return Panel(
        case.name, {one.arm.name: one.values[case.name][measure] for one in found}, case.lines.get(measure, {})
    )


def _caption(config: Config, measure: str) -> str:
    return (
        f"{measure.capitalize()}: a ring for each of {config.seeds} seeds, a bar for their mean's interval of 95 %; "
        "controls are faint."
    )


def _table(section: Section, config: Config, task: Task, measure: str, found: Sequence[Found]) -> None:
    """A measure of every arm, with a column for each case."""
    named = [case for case in task.cases if case.lines.get(measure)]
    lines = [
        f"{case.name}: " + ", ".join(f"{name} {value:.3g}" for name, value in case.lines[measure].items())
        for case in named
    ]
    section.table(
        ["arm", *(Column(case.name, ".3g") for case in task.cases)],
        [
            [_name(one.arm), *(paired.over_seeds(one.values[case.name][measure], NONE) for case in task.cases)]
            for one in found
        ],
        caption=f"{measure.capitalize()}, mean and interval of 95 % over {config.seeds} seeds. {'; '.join(lines)}.",
    )  # fmt: skip


def _name(arm: Arm) -> str:
    return f"{arm.name} (control)" if arm.control else arm.name


def _method(section: Section, config: Config, task: Task, found: Sequence[Found]) -> None:
    """Shapes, learning rates and seconds."""
    training = config.training
    tuned = (
        f" Every arm takes for every case the best of the rates {', '.join(f'{rate:g}' for rate in training.rates)}, "
        f"each tried with {training.tuning_seeds} seeds that are not among those reported."
        if len(training.rates) > 1
        else f" The learning rate is {max(training.rates):g}."
    )
    section.text(
        "Models of attention alone: one linear map of the features, attention"
        + (" added to it" if task.residual else " in its place")
        + ", one linear map to the outputs; no normalisation and no feed-forward network. "
        f"{training.steps:,} steps of Adam of {task.batch or 'all'} samples, the same for all arms; the rate rises, "
        f"then falls as a cosine. Measured on {task.test or 'all'} samples.{tuned}"
    )
    edges = [
        f"{one.arm.name}, {case}"
        for one in found
        for case, rate in one.rates.items()
        if len(training.rates) > 1 and rate in (min(training.rates), max(training.rates))
    ]
    section.table(
        ["arm", "heads", "width", "head_dim", "layers", "variant", "parameters", "rates", "seconds"],
        [
            [_name(one.arm), one.arm.num_heads, one.arm.width, one.arm.head_dim or one.arm.width // one.arm.num_heads,
             one.arm.layers, _variant(one.arm), one.parameters,
             ", ".join(f"{rate:g}" for rate in one.rates.values()), f"{one.seconds:.0f}"]
            for one in found
        ],
        caption="Every arm; the rates are those of the cases in their order.",
    )  # fmt: skip
    if edges:
        section.text(f"The best rate is the lowest or highest that was tried for {'; '.join(edges)}.")


def _variant(arm: Arm) -> str:
    more = [" without the first token"] * arm.hide_first + [", w_q and w_k untrained"] * arm.untrained
    return arm.variant + "".join(more)


def _numbers(task: Task, found: Sequence[Found]) -> dict[str, Any]:
    return {
        "cases": [{"name": case.name, "lines": case.lines} for case in task.cases],
        "arms": [
            {
                "name": one.arm.name, "control": one.arm.control, "parameters": one.parameters, "seconds": one.seconds,
                "cases": {
                    case: {
                        "rate": one.rates[case], "tried": {f"{rate:g}": value for rate, value in tried.items()},
                        **{measure: np.asarray(value, float).tolist() for measure, value in one.values[case].items()},
                    }
                    for case, tried in one.tried.items()
                },
            }
            for one in found
        ],
    }  # fmt: skip
