"""The page of `redundancy`, and its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from experiments.studies.redundancy import Config, rules
from experiments.studies.redundancy.measures import RANKINGS, Alone, Found, Judged, effect
from experiments.studies.redundancy.rules import Numbers
from experiments.studies.study import Answer, Verdict
from mhajax import figures
from mhajax.figures import Drawing
from mhajax.report.page import Column, Page, Section
from mhajax.statistics import Measure, Stability, bootstrap_stability, difference, estimate

Line = tuple[np.ndarray, np.ndarray, np.ndarray]
RANDOM, SHUFFLED = "random heads of the same layers", "numbers in another order"


def make(config: Config, found: Found) -> Answer:
    """The answer."""
    decides = rules.numbers(config, found)
    verdicts = rules.verdicts(config, decides)
    layers, heads = found.effects.single.shape[1:]
    quick = ["A quick look: a few short windows, whose numbers mean nothing."] if config.quick else []
    page = Page(
        f"Are the heads of {config.model} redundant?",
        f"{layers * heads} heads in {layers} layers.",
        *quick,
        *(f"{verdict.claim} {verdict.word.capitalize()}." for verdict in verdicts),
    )
    _method(page.section("What was measured"), config, found)
    drawings = {
        "pruning": _pruning(page.section("How many can go"), config, found, verdicts[0], verdicts[1]),
        "layers": _layers(page.section("Alone, together, and fairly shared"), found, verdicts[2]),
        "shares": _shares(page.section("Which heads carry the loss"), found),
        "takeover": _takeover(page.section("Who takes over"), found, decides, verdicts[3]),
    }
    page.section("What would change this").text(
        "One model and one text, few windows: length, chosen, judged and draws of the config make all of it larger. A "
        "head is removed by setting its output to 0, which the layers above never saw in training: an upper bound of "
        "what it is worth (Li & Janson 2024; `heads.importance.optimal_constants` fits the constant that costs least). "
        "Nothing is trained on after a removal; a model that is may lose less. Shapley shares come from "
        f"{2 * config.pairs} orders of all heads on {config.pairs} windows, the standard error of which is itself "
        "uncertain: enough to see that they differ from single effects, too few to rank heads by. More pairs would.",
    )
    return Answer(verdicts, _numbers(decides, found), page, drawings)


def _method(section: Section, config: Config, found: Found) -> None:
    tokens = [int(some.sum()) for some in found.tokens]
    of = lambda losses: f"{_per_token(losses, found.tokens[1]):.2f}"  # noqa: E731
    section.text(
        f"Windows of {config.length} tokens of one text. On the first {config.chosen} ({tokens[0]:,} predicted tokens) "
        f"every head is removed alone, every layer at once, and heads are ranked; on the next {config.judged} "
        f"({tokens[1]:,}) the rankings are judged. A head is removed by a gate of 0 on its output. All is in nats per "
        "predicted token, with intervals of 95 % over windows.",
        "Single effect: loss(without h) - loss (Michel et al. 2019, section 3.2). Joint effect of a set S: "
        "loss(without S) - loss. Conditional effect: loss(without S and h) - loss(without S); where it is larger than "
        "the single effect, h does what S did (Wang et al. 2022, section 3.3: backup heads). Shapley share: the mean "
        "of the conditional effect over orders in which all heads go, S being those that went before; shares add up to "
        "loss(none) - loss(all), and heads that stand in for one another divide what both are worth (Shapley 1953; "
        "Castro et al. 2009). Orders come in pairs, one the reverse of the other.",
        f"The loss is {of(found.judged.full)}, and {of(found.judged.none)} without any head. The control is the same "
        f"model with the numbers of every array in another order: {of(found.control.full)}, and "
        f"{of(found.control.none)} without any head. A model whose heads carry nothing can lose all of them.",
    )  # fmt: skip


def _pruning(section: Section, config: Config, found: Found, first: Verdict, second: Verdict) -> Drawing:
    section.text(
        _said(first), _said(second),
        f"Heads go in the order of a ranking, the least important first. Beside it {config.draws} orders that take, at "
        "every step, a random head of the layer that the first ranking takes one of: their band holds 95 of 100 draws, "
        "that of a ranking is an interval over windows.",
    )  # fmt: skip
    judged, tokens = found.judged, found.tokens[1]
    orders = {name: _curve(losses, judged, tokens) for name, losses in judged.ranked.items()}
    draws = (judged.drawn - judged.full).sum(-1) / tokens.sum()  # [draws, P]
    orders[RANDOM] = _from_zero(draws.mean(0), *np.quantile(draws, [0.025, 0.975], axis=0))
    orders[SHUFFLED] = _curve(found.control.ranked[RANKINGS[0]], found.control, tokens)
    drawing = figures.pruning_curve(
        [0, *judged.removed], orders, title=f"{config.share:.0%} of the heads for less than {config.bound:g} nats: "
        f"{first.word}", ylabel="rise of the loss (nats per token)",
    )  # fmt: skip
    section.figure(
        drawing, "What the loss rises by when heads are removed, on text that did not rank them.", name="pruning"
    )
    rows = []
    whole = float((judged.none - judged.full).sum() / tokens.sum())
    for point, removed in enumerate(judged.removed):
        base = float(draws[:, point].mean())
        cells = [_rise(losses[point], judged, tokens, base) for losses in judged.ranked.values()]
        rows.append([f"{removed}", *cells, 1 - float(cells[0].value) / whole])
    section.table(
        ["heads removed", *(Column(name, ".3f", "lower") for name in judged.ranked), Column("faithfulness", ".1%")],
        rows,
        caption="Rise of the loss in the order of each ranking; vs is the mean of the random orders. Faithfulness: the "
        "part of loss(none) - loss(all) that is left in the order of single effects.",
    )
    section.table(
        ["top of the ranking", *(Column(name, ".2f") for name in Stability._fields)],
        [[name, one.overlap, one.low, one.high, one.chance] for name, one in _stability(config, found).items()],
        caption="How much of a ranking would come again: Jaccard overlap over bootstrap resamples of the chosen "
        "windows (Méloux et al. 2025), what 95 of 100 of them lie between, and of two orders at random.",
    )  # fmt: skip
    return drawing


def _layers(section: Section, found: Found, verdict: Verdict) -> Drawing:
    section.text(
        _said(verdict),
        "If effects added up, the three curves were one. Above the sum of single effects, heads of a layer stand in "
        "for one another; below it, they need one another. The Shapley shares of a layer's heads count what they are "
        "worth on average over how much of the other layers is left.",
    )
    tokens = found.tokens[0]
    joint, single = found.effects.joint, found.effects.single.sum(-1)
    shares = found.shares.sum(-1)  # [pairs, L]
    error = shares.std(0, ddof=1) / len(shares) ** 0.5
    lines = {
        "all heads at once": estimate(effect(joint, tokens)),
        "sum of heads, alone": estimate(effect(single, tokens)),
    }
    layers = np.arange(joint.shape[1])
    series = {name: (layers, one.value) for name, one in lines.items()}
    spread = {name: (one.low, one.high) for name, one in lines.items()}
    series["sum of Shapley shares"] = (layers, shares.mean(0))
    spread["sum of Shapley shares"] = (shares.mean(0) - error, shares.mean(0) + error)
    drawing = figures.curve(
        series, title=f"A layer costs more than its heads one by one: {verdict.word}", xlabel="layer",
        ylabel="nats per token", spread=spread,
    )  # fmt: skip
    section.figure(drawing, "Joint effect of each layer, sum of the single effects of its heads, and of their Shapley "
                   "shares. Bands: intervals over windows; of the shares one standard error over pairs of orders.",
                   name="layers")  # fmt: skip
    control = found.control_effects
    fewer = tokens[: len(control.joint)]
    rows = [
        ["mean layer", _mean_excess(found.effects, tokens)],
        [f"the same, {SHUFFLED}", _mean_excess(control, fewer)],
    ]
    section.table(
        ["", Column("joint effect", ".3f")], rows, caption="Joint effect of a layer; vs is the sum of single effects."
    )
    return drawing


def _shares(section: Section, found: Found) -> Drawing:
    single = found.effects.single.sum(0) / found.tokens[0].sum()
    shares = found.shares.mean(0)
    rank = stats.spearmanr(single.ravel(), shares.ravel())
    section.text(
        f"Single effects sum to {single.sum():.2f} nats per token, Shapley shares to {shares.sum():.2f}, which is "
        f"loss(none) - loss(all). The rank correlation of both over heads is {float(rank.statistic):.2f}.",
    )
    drawing = figures.by_layer(
        {"single effect (nats per token)": single, "Shapley share (nats per token)": shares},
        title="What each head is worth, alone and as a share of all",
    )
    section.figure(drawing, "Every head, by layer.", name="shares")
    error = found.shares.std(0, ddof=1) / len(found.shares) ** 0.5
    best = np.argsort(-shares, axis=None)[:8]
    section.table(
        ["head", Column("Shapley share", ".3f"), Column("standard error", ".3f"), Column("single effect", ".3f")],
        [[_name(int(h), shares.shape[1]), *(float(a.ravel()[h]) for a in (shares, error, single))] for h in best],
        caption="The eight heads with the largest shares.",
    )
    return drawing


def _takeover(section: Section, found: Found, decides: Numbers, verdict: Verdict) -> Drawing:
    layer, head = found.best
    section.text(
        f"Head {layer}·{head} costs most alone, {decides.gone:.3f} nats per token. When it is gone, every other head "
        "is removed too, one at a time. The head whose effect rises most is chosen on one half of the windows and "
        "reported on the other.",
        _said(verdict),
    )
    rises = difference(effect(found.after, found.tokens[0], found.effects.single))
    value = np.array(rises.value)
    value[layer, head] = 0.0
    drawing = figures.head_table(
        value, title=f"Whose effect rises when {layer}·{head} is gone", label="rise of the effect (nats per token)",
        baseline=0.0,
    )  # fmt: skip
    section.figure(drawing, "Effect given that the head is gone, minus effect alone.", name="takeover")
    together = estimate(effect(found.after, found.tokens[0], found.effects.single))
    order = np.argsort(-value, axis=None)[:6]
    section.table(
        ["head", Column("effect when it is gone", ".3f"), Column("rise", ".3f")],
        [[_name(int(h), value.shape[1]), _cell(together, int(h)), _cell(rises, int(h))] for h in order],
        caption=f"The heads that gain most when {layer}·{head} is gone; vs is the effect alone.",
    )
    return drawing


def _stability(config: Config, found: Found) -> dict[str, Stability]:
    tally = effect(found.effects.single, found.tokens[0])
    tenth, going = (max(1, round(share * tally.total[0].size)) for share in (0.1, config.share))
    lowest = tally._replace(total=-np.asarray(tally.total))
    return {
        f"{tenth} most important": bootstrap_stability(tally, tenth),
        f"{going} least important": bootstrap_stability(lowest, going),
    }


def _curve(losses: np.ndarray, judged: Judged, tokens: np.ndarray) -> Line:
    one = estimate(effect((losses - judged.full).T, tokens))
    return _from_zero(one.value, one.low, one.high)


def _from_zero(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Line:
    """The same, beginning with 0 where nothing is removed."""
    first, second, third = (np.concatenate([[0.0], part]) for part in (value, low, high))
    return first, second, third


def _rise(losses: np.ndarray, judged: Judged, tokens: np.ndarray, baseline: float) -> Measure:
    return estimate(effect(losses - judged.full, tokens))._replace(baseline=np.asarray(baseline))


def _mean_excess(effects: Alone, tokens: np.ndarray) -> Measure:
    return estimate(effect(effects.joint.mean(1), tokens, effects.single.sum(-1).mean(1)))


def _per_token(losses: np.ndarray, tokens: np.ndarray) -> float:
    return float(losses.sum() / tokens.sum())


def _cell(one: Measure, head: int) -> Measure:
    return Measure(*(np.asarray(part.ravel()[head]) for part in one))


def _name(head: int, heads: int) -> str:
    return f"{head // heads}·{head % heads}"


def _said(verdict: Verdict) -> str:
    return f"{verdict.claim} {verdict.word.capitalize()}: {verdict.because}."


def _numbers(decides: Numbers, found: Found) -> dict[str, Any]:
    per_window = lambda losses, tokens: (losses / np.maximum(tokens, 1)).tolist()  # noqa: E731
    chosen, judged = found.tokens
    return {
        "decides": {
            name: {key: np.asarray(part).tolist() for key, part in value._asdict().items()}
            if isinstance(value, Measure) else np.asarray(value).tolist()
            for name, value in decides._asdict().items()
        },
        "single": (found.effects.single.sum(0) / chosen.sum()).tolist(),
        "joint": (found.effects.joint.sum(0) / chosen.sum()).tolist(),
        "michel": (found.michel.sum(0) / chosen.sum()).tolist(),
        "shapley": {"shares": found.shares.mean(0).tolist(),
                    "error": (found.shares.std(0, ddof=1) / len(found.shares) ** 0.5).tolist()},
        "gone": list(found.best),
        "after": (found.after.sum(0) / chosen.sum()).tolist(),
        "judged": {
            "removed": found.judged.removed.tolist(), "full": per_window(found.judged.full, judged),
            "none": per_window(found.judged.none, judged),
            "ranked": {name: per_window(losses, judged) for name, losses in found.judged.ranked.items()},
            "drawn": (found.judged.drawn.sum(-1) / judged.sum()).tolist(),
        },
        "control": {
            "single": (found.control_effects.single.sum(0) / chosen[: len(found.control_effects.joint)].sum()).tolist(),
            "joint": (found.control_effects.joint.sum(0) / chosen[: len(found.control_effects.joint)].sum()).tolist(),
            "full": _per_token(found.control.full, judged), "none": _per_token(found.control.none, judged),
        },
    }  # fmt: skip
