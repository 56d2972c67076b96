"""From what was counted to answers: values with intervals and baselines, over sentences and over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from scipy import stats

from experiments import work
from experiments.heads import costs, measure
from experiments.heads.costs import Costs
from experiments.heads.examined import Examined
from experiments.heads.measure import Asked, Looks
from mhajax import statistics
from mhajax.heads import diversity, matching
from mhajax.heads.matching import Stability
from mhajax.statistics import Measure, Report, Tally

ALPHA = 0.05


class Relation(NamedTuple):
    """How well heads follow a relation.

    Attributes:
      name, kind: what is asked, and of which attention.
      part: "", or a range of distances.
      found: the best head of each seed, chosen on one half of the sentences and reported on the other; its baseline is
        the best rule, chosen in the same way.
      untrained: the best head of untrained models, chosen in the same way.
      rule: what the best rule is.
      asked: questions per seed.
      seeds: in how many seeds "there is a head that does better than the best rule" has p < 0.05.
    """

    name: str
    kind: str
    part: str
    found: Report
    untrained: Measure
    rule: str
    asked: int
    seeds: int


class Findings(NamedTuple):
    """What is known of the heads of the models (seeds) of a run.

    Attributes:
      heads: kind → measure → [seeds, L, N], each head by itself, over sentences.
      layers: kind → measure → [L], the mean over the heads of a layer, over seeds and sentences.
      untrained: kind → measure → [L], the value before training.
      best: kind → measure → the head of each seed that looks there most, chosen on one half of the sentences and
        reported on the other.
      relations: what the gold was asked.
      relations_of_heads: (relation, part) → [seeds, L, N].
      alignment: reading → the alignment error rate of the best head of each seed (lower is better), chosen on the other
        half of the sentences; by baseline.
      lost: category → kind → [seeds, L, N]: nats per word that are lost without the head.
      needed: category → share of heads whose removal raises the loss (false discoveries held at 5 %), over seeds.
      pruned: order of removal → [removals + 1]: loss per word, over seeds and sentences.
      removable: for each of `TOLERATED`, how many heads go before the perplexity is that much higher: mean and interval
        over seeds; the baseline removes them in one random order.
      importance: kind → [seeds, L, N], Michel's.
      order: for each seed, heads from the least important to the most.
      stability: kind → how alike the heads of the seeds are after matching; empty for fewer than 3 seeds.
      similarity: kind → [seeds, seeds, L·N, L·N], CKA of outputs.
      differences: kind → measure → [L]: how the heads of a layer differ; the baseline is untrained heads.
    """

    heads: dict[str, dict[str, Measure]]
    layers: dict[str, dict[str, Measure]]
    untrained: dict[str, dict[str, Measure]]
    best: dict[str, dict[str, Report]]
    relations: list[Relation]
    relations_of_heads: dict[Asked, Measure]
    alignment: dict[str, dict[str, Measure]]
    lost: dict[str, dict[str, Measure]]
    needed: dict[str, Measure]
    pruned: dict[str, Measure]
    removable: dict[float, Measure]
    importance: dict[str, Measure]
    order: list[list[tuple[str, int, int]]]
    stability: dict[str, Stability]
    similarity: dict[str, np.ndarray]
    differences: dict[str, dict[str, Measure]]


TOLERATED = (0.01, 0.05, 0.1)  # shares of the perplexity


def examine(model: Examined, trained: Sequence[Any], untrained: Sequence[Any], console: Console) -> Findings:
    """Measure every head of every model.

    Args:
      model: functions and sentences.
      trained: parameters of each seed.
      untrained: parameters of each seed before training.
      console: for progress.
    """
    look, cost = measure.looks(model), costs.costs(model)
    seen, before, worth = list[Looks](), list[Looks](), list[Costs]()
    with work.shown_on(console), work.piece("measuring heads", 3 * len(trained) + 1, "steps", note="") as steps:
        for params, early in zip(trained, untrained, strict=True):
            seen.append(look(params))
            steps.advance()
            before.append(look(early))
            steps.advance()
            worth.append(cost(params))
            steps.advance()
        with work.piece("intervals", 1, "step", note=""):
            return _findings(model, seen, before, worth)


def of_one(model: Examined, params: Any) -> dict[str, dict[str, Measure]]:
    """The heads of one model: kind → measure → [L, N]: distance, entropy, and the relations with the best rule.

    The rule is chosen on the sentences on which it is reported, which flatters it; `examine` does not.
    """
    measures, relations = measure.brief(model, params)
    rules = {asked: by_rule for asked, by_rule in measure.guesses(model).items() if not asked[1]}
    found = _each(statistics.estimate, measures)
    for relation in model.relations:
        tally = relations[relation.key, ""]
        if np.asarray(tally.count).any():
            best = max(rules[relation.key, ""].values(), key=lambda rule: np.sum(rule.total))
            guessed = np.broadcast_to(np.asarray(best.total)[:, None, None], np.shape(tally.total))
            found[relation.kind][relation.name] = statistics.estimate(tally._replace(baseline=guessed))
    return found


def _findings(model: Examined, seen: list[Looks], before: list[Looks], worth: list[Costs]) -> Findings:
    measures, early = (_stacked([look.measures for look in looks]) for looks in (seen, before))
    relations = _stacked([look.relations for look in seen])
    similarity, stability = {}, {}
    for kind in model.kinds:
        similarity[kind.name] = _similarity([look.outputs[kind.name] for look in seen])
        if len(seen) > 2:
            start = _similarity([look.outputs[kind.name] for look in before])
            blocks = np.repeat(np.arange(kind.layers), kind.heads)
            stability[kind.name] = matching.stability(similarity[kind.name], untrained=start, blocks=blocks)
    lost = _stacked([cost.lost for cost in worth])
    pruned = _stacked([cost.pruned for cost in worth])
    return Findings(
        heads=_each(_of_heads, measures),
        layers=_each(_of_layers, measures),
        untrained=_each(_of_layers, early),
        best={
            kind: {name: _best_head(_whole(tally)) for name, tally in of.items() if name not in measure.SPREAD}
            for kind, of in measures.items()
        },
        relations=_relations(model, relations, _stacked([look.relations for look in before])),
        relations_of_heads=_each(_of_heads, relations),
        alignment=_error_rates(_stacked([look.agreement for look in seen])),
        lost=_each(_of_heads, lost),
        needed={category: _needed(of_kind) for category, of_kind in lost.items()},
        pruned={order: _over_seeds(_turned(tally)) for order, tally in pruned.items()},
        removable={share: _removable(pruned, share) for share in TOLERATED},
        importance=_each(_of_heads, _stacked([cost.importance for cost in worth])),
        order=[cost.order for cost in worth],
        stability=stability,
        similarity=similarity,
        differences=_differences(
            _stacked([look.differences for look in seen]), _stacked([look.differences for look in before])
        ),
    )


def _differences(trained: Any, untrained: Any) -> Any:
    """Over seeds and sentences, with the same of untrained models for baseline."""
    against = lambda tally, early: _over_seeds(_whole(tally)._replace(baseline=_whole(early).total))  # noqa: E731
    return jax.tree.map(against, trained, untrained, is_leaf=_is_tally)


def _is_tally(node: Any) -> bool:
    return isinstance(node, Tally)


def _each(function: Callable[[Tally], Any], tree: Any) -> Any:
    """The function of every Tally of a tree of dicts."""
    return jax.tree.map(function, tree, is_leaf=_is_tally)


def _stacked(models: list[Any]) -> Any:
    """The Tallies of several models as one, with an axis of seeds in front."""
    return jax.tree.map(lambda *parts: np.stack(np.broadcast_arrays(*parts)), *models)


def _whole(tally: Tally) -> Tally:
    return Tally(*np.broadcast_arrays(*tally))


def _of_heads(tally: Tally) -> Measure:
    """Tally [seeds, sentences, L, N] → every head of every seed, over its sentences."""
    return statistics.estimate(_whole(tally), axis=1)


def _of_layers(tally: Tally) -> Measure:
    """Tally [seeds, sentences, L, N] → every layer, over heads, sentences and seeds."""
    return _over_seeds(Tally(*(part.sum(-1) for part in _whole(tally))))


def _over_seeds(tally: Tally) -> Measure:
    """Tally [seeds, sentences, …] over both; over sentences alone for one seed."""
    tally = _whole(tally)
    if len(tally.total) == 1:
        return statistics.estimate(Tally(*(part[0] for part in tally)), axis=0)
    return statistics.estimate(tally, axis=(0, 1))


def _turned(tally: Tally) -> Tally:
    """[seeds, removals + 1, sentences] → [seeds, sentences, removals + 1]."""
    total, baseline = (np.moveaxis(np.asarray(part), 1, 2) for part in (tally.total, tally.baseline))
    return _whole(Tally(total, np.asarray(tally.count)[..., None], baseline))


def _relations(model: Examined, found: dict[Asked, Tally], early: dict[Asked, Tally]) -> list[Relation]:
    rules = measure.guesses(model)
    answers = []
    for relation in model.relations:
        for part in ("", *relation.parts):
            asked = (relation.key, part)
            tally, names = _whole(found[asked]), list(rules[asked])
            if not tally.count.sum():
                continue
            guessed = _stacked_rules([rules[asked][name] for name in names])
            report = _best_head(tally, guessed)
            best = int(np.argmax(guessed.total[0].sum(0).ravel()))
            against = tally._replace(baseline=np.broadcast_to(guessed.total[..., best : best + 1], tally.total.shape))
            answers.append(
                Relation(
                    name=relation.name, kind=relation.kind, part=part, found=report,
                    untrained=_best_head(_whole(early[asked])).best,
                    rule=names[best], asked=int(tally.count[0, :, 0, 0].sum()),
                    seeds=sum(_some_head(Tally(*(a[seed] for a in against))) < ALPHA for seed in range(len(tally[0]))),
                )
            )  # fmt: skip
    return answers


def _error_rates(agreement: dict[tuple[str, str], Tally]) -> dict[str, dict[str, Measure]]:
    """The best head of each seed by its alignment error rate."""
    found: dict[str, dict[str, Measure]] = {}
    for (reading, baseline), tally in agreement.items():
        best = _best_head(_whole(tally)).best
        found.setdefault(reading, {})[baseline] = Measure(
            1 - best.value, 1 - best.high, 1 - best.low, 1 - best.baseline
        )
    return found


def _best_head(tally: Tally, alternatives: Tally | None = None) -> Report:
    """The best head of each seed, of a tally [seeds, sentences, L, N]; over sentences alone for one seed."""
    if len(tally.total) > 1:
        return statistics.select_and_report(tally, axis=(0, 1), heads=(2, 3), alternatives=alternatives)
    one, others = (None if t is None else Tally(*(part[0] for part in t)) for t in (tally, alternatives))
    assert one is not None
    return statistics.select_and_report(one, axis=0, heads=(1, 2), alternatives=others)


def _stacked_rules(rules: list[Tally]) -> Tally:
    """Rules as heads: [1, sentences, 1, rules]."""
    return Tally(*(np.stack([np.asarray(rule[part], float) for rule in rules], -1)[None, :, None] for part in range(3)))


def _some_head(tally: Tally) -> float:
    """p of "there is a head that does better than the baseline", [sentences, L, N]."""
    return statistics.max_statistic(*statistics.sign_flips(tally, resamples=1999)).any


def _needed(lost: Mapping[str, Tally]) -> Measure:
    """The share of the heads of a seed whose removal raises the loss; the baseline is heads that do nothing."""
    shares = []
    for seed in range(len(next(iter(lost.values())).total)):
        p = []
        for tally in lost.values():
            total, count = (np.asarray(a, float)[seed] for a in _whole(tally)[:2])
            rate = total.sum(0) / np.maximum(count.sum(0), 1)
            error = np.sqrt(((total - rate * count) ** 2).sum(0)) / np.maximum(count.sum(0), 1)
            z = np.divide(rate, error, out=np.zeros_like(rate), where=error > 0)
            p.append(stats.norm.sf(z).ravel())
        shares.append((statistics.benjamini_hochberg(np.concatenate(p)) < ALPHA).mean())
    return _of_numbers(shares, 0.0)


def _removable(pruned: Mapping[str, Tally], share: float) -> Measure:
    """How many heads go, in the order of importance, before the perplexity is that much higher."""

    def count(tally: Tally) -> np.ndarray:
        losses = np.asarray(tally.total).sum(-1) / np.asarray(tally.count).sum(-1)[:, None]  # [seeds, removals + 1]
        above = losses > losses[:, :1] + np.log1p(share)
        return np.where(above.any(1), np.argmax(above, axis=1) - 1, losses.shape[1] - 1)

    found = _of_numbers(count(pruned[costs.ORDERS[0]]), float(count(pruned[costs.ORDERS[1]]).mean()))
    return found._replace(low=np.maximum(found.low, 0))  # no fewer than none; NaN stays


def _of_numbers(values: Sequence[float] | np.ndarray, baseline: float) -> Measure:
    """One number per seed: their mean and its interval (none for one seed)."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return Measure(values[0], np.asarray(np.nan), np.asarray(np.nan), np.asarray(baseline))
    return statistics.estimate(Tally(values, np.ones_like(values), np.full_like(values, baseline)), axis=0)


def _similarity(outputs: list[np.ndarray]) -> np.ndarray:
    """CKA of what every head of every seed [tokens, L, N, Hv] writes: [seeds, seeds, L·N, L·N]."""
    heads = outputs[0][0, ..., 0].size
    flat = np.concatenate(
        [np.moveaxis(a.reshape(len(a), heads, -1), 1, 0) for a in outputs]
    )  # [seeds·heads, tokens, Hv]
    alike = np.asarray(diversity.debiased_cka(flat).total)
    return alike.reshape(len(outputs), heads, len(outputs), heads).swapaxes(1, 2)
