"""The verdicts of `lm_heads` by its rules, its page, its numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.page import Column, Page
from experiments.studies.lm_heads import Config
from experiments.studies.lm_heads.measures import INDUCTION, Found
from experiments.studies.study import Answer, Verdict
from mhajax import figures
from mhajax.statistics import Measure


def make(config: Config, found: Found) -> Answer:
    """The answer."""
    verdicts = (_induction(found), _sink(found), _agreement(found), _redundancy(found))
    layers, heads = found.sink.value.shape
    page = Page(
        f"What the heads of {config.model} do",
        f"{layers * heads} heads in {layers} layers. "
        + " ".join(f"{v.claim} {v.word.capitalize()}." for v in verdicts),
    )
    drawings: dict[str, figures.Drawing] = {}

    section = page.section("Looking back")
    section.text(
        f"Attention mass on {config.sequences} sequences of {config.length} random tokens, twice. Each role's head is "
        "chosen on one half of the sequences and reported on the other; the baseline is the best head of the same "
        f"model with the numbers of every array in another order, {config.draws} times, chosen in the same way.",
        _said(verdicts[0]),
    )
    section.table(
        ["role", "head, by all", Column("mass, 1 is all", ".2f")],
        [[name, _best(every), _scalar(best.best)] for name, (every, best) in found.roles.items()],
        caption="The best head of each role.",
    )
    every = found.roles[INDUCTION][0].value
    drawings["induction"] = figures.head_table(
        every, title=f"Induction: {np.sum(every > 0.3)} of {every.size} heads have more than 0.3",
        label="mass on what came after the same token", baseline=0.0,
    )  # fmt: skip
    section.figure(drawings["induction"], "Attention mass after the same token, every head.", name="induction")

    section = page.section("The first token")
    section.text(
        f"Mean attention mass on the first token of {config.windows} windows of {2 * config.length} tokens of a text, "
        f"from all later ones; uniform attention would have {float(found.sink.baseline.ravel()[0]):.2f}.",
        _said(verdicts[1]),
    )
    drawings["sink"] = figures.head_table(
        found.sink.value, title=f"{np.mean(found.sink.value > 0.5):.0%} of the heads look at the first token most",
        label="mass on the first token", baseline=float(found.sink.baseline.ravel()[0]),
    )  # fmt: skip
    section.figure(drawings["sink"], "Attention mass on the first token, every head.", name="first-token")

    section = page.section("Subject and verb")
    section.text(
        "After each prefix, the logit of the right form minus that of the wrong one (BLiMP), and what is lost of it "
        "without each head, all heads in one program. Above 0 the head is of use.",
        _said(verdicts[2]),
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
    drawings["agreement"] = figures.head_table(
        lost.value, title="What agreement loses without each head", label="logit difference lost", baseline=0.0
    )
    section.figure(drawings["agreement"], "Loss of the logit difference, every head removed alone.", name="agreement")

    section = page.section("How many are needed")
    section.text(
        f"Heads are ordered by Michel's importance on one half of {config.windows} windows of text and really removed; "
        f"the loss is measured on the other half. The baseline is the mean of {config.draws} random sets with as many "
        "heads of every layer. All layers have the same N and K, so the layer that keeps most decides what is left.",
        _said(verdicts[3]),
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
    section = page.section("What would change this")
    section.text(
        "One model, one corpus, few sentences: the config's numbers make all of it larger. A removal in evaluation "
        "says nothing of a model that is trained on after it. Attention mass says where a head looks, not what it is "
        "for. Removal is causal, but an output of zero is only one way to remove a head: an upper bound of its worth.",
    )
    return Answer(verdicts, _numbers(found), page, drawings)


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


def _said(verdict: Verdict) -> str:
    return f"{verdict.claim} {verdict.word.capitalize()}: {verdict.because}."


def _best(every: Measure) -> str:
    layer, head = np.unravel_index(int(np.argmax(every.value)), every.value.shape)
    return f"{layer}·{head}"


def _scalar(one: Measure) -> Measure:
    return Measure(*(np.asarray(np.ravel(part)[0]) for part in one))


def _with_baseline(one: Measure, others: list[Measure]) -> Measure:
    return _scalar(one)._replace(baseline=np.asarray(np.mean([float(other.value) for other in others])))


def _shown(one: Measure, form: str = ".2f") -> str:
    value, low, high = (format(float(part), form) for part in one[:3])
    return f"{value} [{low}, {high}]"


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
