"""The page of `lm_heads`, and its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.studies.lm_heads import Config, rules
from experiments.studies.lm_heads.measures import INDUCTION, Found
from experiments.studies.study import Answer, Verdict
from mhajax import figures
from mhajax.figures import Drawing
from mhajax.report.page import Column, Page, Section
from mhajax.statistics import Measure


def make(config: Config, found: Found) -> Answer:
    """The answer."""
    verdicts = rules.all_of(found)
    layers, heads = found.sink.value.shape
    page = Page(
        f"What the heads of {config.model} do",
        f"{layers * heads} heads in {layers} layers.",
        *(f"{verdict.claim} {verdict.word.capitalize()}." for verdict in verdicts),
    )
    drawings = {
        "induction": _looking_back(page.section("Looking back"), config, found, verdicts[0]),
        "sink": _first_token(page.section("The first token"), config, found, verdicts[1]),
        "agreement": _subject_and_verb(page.section("Subject and verb"), found, verdicts[2]),
    }
    _fewer(page.section("How many are needed"), config, found, verdicts[3])
    page.section("What would change this").text(
        "One model, one corpus, few sentences: the config's numbers make all of it larger. A removal in evaluation "
        "says nothing of a model that is trained on after it. Attention mass says where a head looks, not what it is "
        "for. Removal is causal, but an output of zero is only one way to remove a head: an upper bound of its worth.",
    )
    return Answer(verdicts, _numbers(found), page, drawings)


def _looking_back(section: Section, config: Config, found: Found, verdict: Verdict) -> Drawing:
    section.text(
        f"Attention mass on {config.sequences} sequences of {config.length} random tokens, twice. Each role's head is "
        "chosen on one half of the sequences and reported on the other; the baseline is the best head of the same "
        f"model with the numbers of every array in another order, {config.draws} times, chosen in the same way.",
        _said(verdict),
    )
    section.table(
        ["role", "head, by all", Column("mass, 1 is all", ".2f")],
        [[name, _best(every), _scalar(best.best)] for name, (every, best) in found.roles.items()],
        caption="The best head of each role.",
    )
    every = found.roles[INDUCTION][0].value
    drawing = figures.head_table(
        every, title=f"Induction: {np.sum(every > 0.3)} of {every.size} heads have more than 0.3",
        label="mass on what came after the same token", baseline=0.0,
    )  # fmt: skip
    section.figure(drawing, "Attention mass after the same token, every head.", name="induction")
    return drawing


def _first_token(section: Section, config: Config, found: Found, verdict: Verdict) -> Drawing:
    uniform = float(found.sink.baseline.ravel()[0])
    section.text(
        f"Mean attention mass on the first token of {config.windows} windows of {2 * config.length} tokens of a text, "
        f"from all later ones; uniform attention would have {uniform:.2f}.",
        _said(verdict),
    )
    drawing = figures.head_table(
        found.sink.value, title=f"{np.mean(found.sink.value > 0.5):.0%} of the heads give it more than half on average",
        label="mass on the first token", baseline=uniform,
    )  # fmt: skip
    section.figure(drawing, "Attention mass on the first token, every head.", name="first-token")
    return drawing


def _subject_and_verb(section: Section, found: Found, verdict: Verdict) -> Drawing:
    section.text(
        "After each prefix, the logit of the right form minus that of the wrong one (BLiMP), and what is lost of it "
        "without each head, all heads in one program. Above 0 the head is of use.",
        _said(verdict),
    )
    section.table(
        ["sentences", Column("logit difference, all heads", ".2f")],
        [[name.removesuffix(".jsonl").replace("_", " "), _scalar(one)] for name, one in found.agreement.items()],
        caption="How far the right form is ahead; baseline: 0, neither is.",
    )
    lost, best = found.without
    section.table(
        ["head", Column("lost without it", ".2f")],
        [[f"the one that was chosen on the other half ({_best(lost)} by all)", _scalar(best.best)]],
        caption="The head that costs most.",
    )
    drawing = figures.head_table(
        lost.value, title="What agreement loses without each head", label="logit difference lost", baseline=0.0
    )
    section.figure(drawing, "Loss of the logit difference, every head removed alone.", name="agreement")
    return drawing


def _fewer(section: Section, config: Config, found: Found, verdict: Verdict) -> None:
    section.text(
        f"Heads are ordered by Michel's importance on one half of {config.windows} windows of text and really removed; "
        f"the loss is measured on the other half. The baseline is the mean of {config.draws} random sets with as many "
        "heads of every layer. All layers have the same N and K, so the layer that keeps most decides what is left.",
        _said(verdict),
    )
    rows = [
        [f"{one.share:.0%}", _with_baseline(one.by_importance, one.at_random), f"{one.heads[0]}, {one.heads[1]}",
         f"{one.megabytes[0]:.0f} to {one.megabytes[1]:.0f}",
         f"{one.tokens_per_second[0]:,.0f} to {one.tokens_per_second[1]:,.0f}"]
        for one in found.pruned
    ]  # fmt: skip
    section.table(
        ["removed", Column("rise of the loss, nats per token", ".3f", "lower"), "N, K left", "MB", "tokens/s"],
        rows,
        caption="Fewer heads; vs is as many random heads of the same layers.",
    )


def _said(verdict: Verdict) -> str:
    return f"{verdict.claim} {verdict.word.capitalize()}: {verdict.because}."


def _best(every: Measure) -> str:
    layer, head = np.unravel_index(int(np.argmax(every.value)), every.value.shape)
    return f"{layer}·{head}"


def _scalar(one: Measure) -> Measure:
    return Measure(*(np.asarray(np.ravel(part)[0]) for part in one))


def _with_baseline(one: Measure, others: list[Measure]) -> Measure:
    return _scalar(one)._replace(baseline=np.asarray(np.mean([float(other.value) for other in others])))


def _numbers(found: Found) -> dict[str, Any]:
    as_list = lambda one: {name: np.asarray(part).tolist() for name, part in one._asdict().items()}  # noqa: E731
    return {
        "roles": {
            name: {"heads": as_list(every), "best": as_list(best.best)} for name, (every, best) in found.roles.items()
        },
        "first_token": as_list(found.sink),
        "agreement": {name: as_list(one) for name, one in found.agreement.items()},
        "agreement_without": {"heads": as_list(found.without[0]), "best": as_list(found.without[1].best)},
        "pruned": [
            {
                "share": one.share, "heads": one.heads, "megabytes": one.megabytes,
                "tokens_per_second": one.tokens_per_second, "rise": as_list(one.by_importance),
                "at_random": [as_list(other) for other in one.at_random],
            }
            for one in found.pruned
        ],
    }  # fmt: skip
