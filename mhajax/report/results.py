"""From what was counted to answers: values with intervals and baselines, over sentences and over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from mhajax import statistics
from mhajax.heads import diversity, matching
from mhajax.heads.matching import Stability
from mhajax.report import importance, patterns
from mhajax.report.importance import Importance
from mhajax.report.patterns import Asked, Patterns, Tallies
from mhajax.report.progress import Progress, silent
from mhajax.report.subject import Subject
from mhajax.statistics import Measure, Report, Tally

ALPHA = 0.05


class Followed(NamedTuple):
    """How well heads follow a relation.

    Attributes:
      name, kind: what is asked, and of which attention.
      part: "", or a range of distances.
      found: the best head of each seed, chosen on one half of the sentences and reported on the other; its baseline is
        the best of the subject's baselines, chosen in the same way.
      untrained: the best head of untrained models, chosen in the same way.
      baseline: which one that is.
      asked: questions per seed.
      seeds: in how many seeds "there is a head that does better than that baseline" has p < 0.05.
    """

    name: str
    kind: str
    part: str
    found: Report
    untrained: Measure
    baseline: str
    asked: int
    seeds: int


class WhereHeadsLook(NamedTuple):
    """What the attention weights alone tell, of one model or of several (seeds).

    Attributes:
      heads: kind → measure → [seeds, L, N], each head by itself, over sentences.
      layers: kind → measure → [L], the mean over the heads of a layer, over seeds and sentences.
      best: kind → measure → the head of each seed that looks there most, chosen on one half of the sentences and
        reported on the other.
      differences: kind → measure → [L]: how the heads of a layer differ.
    """

    heads: dict[str, dict[str, Measure]]
    layers: dict[str, dict[str, Measure]]
    best: dict[str, dict[str, Report]]
    differences: dict[str, dict[str, Measure]]


class Results(NamedTuple):
    """What is known of the heads of a model, or of several (seeds).

    Attributes:
      heads, layers, best: as in `WhereHeadsLook`.
      untrained: kind → measure → [L], the value before training.
      relations: what the gold was asked.
      relations_of_heads: (relation, part) → [seeds, L, N].
      alignment: reading → the alignment error rate of the best head of each seed (lower is better), chosen on the other
        half of the sentences; by baseline.
      ablation: category → kind → [seeds, L, N]: the ablation effect, nats per token, above 0 where the head is of use.
      needed: category → fraction of heads whose removal raises the loss (false discoveries held at 5 %), over seeds.
      pruned: order of removal → [removals + 1]: loss per token, over seeds and sentences.
      removable: for each of `TOLERATED`, how many heads go before the perplexity is that much higher: mean and interval
        over seeds; the baseline removes them in one random order.
      michel: kind → [seeds, L, N], Michel's importance.
      order: for each seed, heads from the least important to the most.
      stability: kind → how alike the heads of the seeds are after matching; empty for fewer than 3 seeds.
      similarity: kind → [seeds, seeds, L·N, L·N], CKA of outputs.
      differences: kind → measure → [L]: how the heads of a layer differ; the baseline is untrained heads.
    """

    heads: dict[str, dict[str, Measure]]
    layers: dict[str, dict[str, Measure]]
    untrained: dict[str, dict[str, Measure]]
    best: dict[str, dict[str, Report]]
    relations: list[Followed]
    relations_of_heads: dict[Asked, Measure]
    alignment: dict[str, dict[str, Measure]]
    ablation: dict[str, dict[str, Measure]]
    needed: dict[str, Measure]
    pruned: dict[str, Measure]
    removable: dict[float, Measure]
    michel: dict[str, Measure]
    order: list[list[tuple[str, int, int]]]
    stability: dict[str, Stability]
    similarity: dict[str, np.ndarray]
    differences: dict[str, dict[str, Measure]]


TOLERATED = (0.01, 0.05, 0.1)  # rises of the perplexity


def examine(subject: Subject, trained: Sequence[Any], untrained: Sequence[Any], progress: Progress = silent) -> Results:
    """Measure every head of every model.

    Args:
      subject: functions and sentences.
      trained: parameters of each seed.
      untrained: parameters of each seed before training.
      progress: told how far it is.
    """
    look, depend = patterns.make_measure(subject, progress), importance.make_measure(subject, progress)
    after, before, worth = list[Patterns](), list[Patterns](), list[Importance]()
    with progress("measuring heads", 3 * len(trained) + 1, "steps") as steps:
        for params, early in zip(trained, untrained, strict=True):
            after.append(look(params))
            steps.advance()
            before.append(look(early))
            steps.advance()
            worth.append(depend(params))
            steps.advance()
        with progress("intervals", 1, "steps"):
            return _results(subject, after, before, worth)


def examine_briefly(subject: Subject, params: Any, progress: Progress = silent) -> dict[str, dict[str, Measure]]:
    """The heads of one model: kind → measure → [L, N]: distance, entropy, and the relations with the best baseline.

    The baseline is chosen on the sentences on which it is reported, which flatters it; `examine` does not.
    """
    measures, relations = patterns.measure_briefly(subject, params, progress)
    baselines = {asked: named for asked, named in patterns.measure_baselines(subject).items() if not asked[1]}
    found = _each(statistics.estimate, measures)
    for relation in subject.relations:
        tally = relations[relation.key, ""]
        if np.asarray(tally.count).any():
            best = max(baselines[relation.key, ""].values(), key=lambda guessed: np.sum(guessed.total))
            guessed = np.broadcast_to(np.asarray(best.total)[:, None, None], np.shape(tally.total))
            found[relation.kind][relation.name] = statistics.estimate(tally._replace(baseline=guessed))
    return found


def where_heads_look(models: Sequence[Patterns]) -> WhereHeadsLook:
    """What the weights alone tell, of the patterns of one model or of several (seeds)."""
    measures = _stacked([model.measures for model in models])
    differences = _stacked([model.differences for model in models])
    return WhereHeadsLook(
        heads=_each(_of_heads, measures),
        layers=_each(_of_layers, measures),
        best=_best(measures),
        differences=_each(_over_seeds, differences),
    )


def _best(measures: Tallies) -> dict[str, dict[str, Report]]:
    return {
        kind: {name: _best_head(_whole(tally)) for name, tally in named.items() if name not in patterns.NOT_SHARES}
        for kind, named in measures.items()
    }


def _results(subject: Subject, after: list[Patterns], before: list[Patterns], worth: list[Importance]) -> Results:
    measures, early = (_stacked([model.measures for model in models]) for models in (after, before))
    relations = _stacked([model.relations for model in after])
    similarity, stability = {}, {}
    for kind in subject.kinds:
        similarity[kind.name] = _similarity([model.outputs[kind.name] for model in after])
        if len(after) > 2:
            start = _similarity([model.outputs[kind.name] for model in before])
            blocks = np.repeat(np.arange(kind.layers), kind.heads)
            stability[kind.name] = matching.stability(similarity[kind.name], untrained=start, blocks=blocks)
    ablation = _stacked([model.ablation for model in worth])
    pruned = _stacked([model.pruned for model in worth])
    return Results(
        heads=_each(_of_heads, measures),
        layers=_each(_of_layers, measures),
        untrained=_each(_of_layers, early),
        best=_best(measures),
        relations=_relations(subject, relations, _stacked([model.relations for model in before])),
        relations_of_heads=_each(_of_heads, relations),
        alignment=_error_rates(_stacked([model.agreement for model in after])),
        ablation=_each(_of_heads, ablation),
        needed={category: _needed(of_kind) for category, of_kind in ablation.items()},
        pruned={order: _over_seeds(_sentences_first(tally)) for order, tally in pruned.items()},
        removable={share: _removable(pruned, share) for share in TOLERATED},
        michel=_each(_of_heads, _stacked([model.michel for model in worth])),
        order=[model.order for model in worth],
        stability=stability,
        similarity=similarity,
        differences=_differences(
            _stacked([model.differences for model in after]), _stacked([model.differences for model in before])
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


def _sentences_first(tally: Tally) -> Tally:
    """[seeds, removals + 1, sentences] → [seeds, sentences, removals + 1]."""
    total, baseline = (np.moveaxis(np.asarray(part), 1, 2) for part in (tally.total, tally.baseline))
    return _whole(Tally(total, np.asarray(tally.count)[..., None], baseline))


def _relations(subject: Subject, found: dict[Asked, Tally], early: dict[Asked, Tally]) -> list[Followed]:
    baselines = patterns.measure_baselines(subject)
    answers = []
    for relation in subject.relations:
        for part in ("", *relation.parts):
            asked = (relation.key, part)
            tally, names = _whole(found[asked]), list(baselines[asked])
            if not tally.count.sum():
                continue
            guessed = _as_heads([baselines[asked][name] for name in names])
            report = _best_head(tally, guessed)
            best = int(np.argmax(guessed.total[0].sum(0).ravel()))
            against = tally._replace(baseline=np.broadcast_to(guessed.total[..., best : best + 1], tally.total.shape))
            answers.append(
                Followed(
                    name=relation.name, kind=relation.kind, part=part, found=report,
                    untrained=_best_head(_whole(early[asked])).best,
                    baseline=names[best], asked=int(tally.count[0, :, 0, 0].sum()),
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


def _as_heads(baselines: list[Tally]) -> Tally:
    """Baselines as if they were heads: [1, sentences, 1, baselines]."""
    return Tally(*(np.stack([np.asarray(b[part], float) for b in baselines], -1)[None, :, None] for part in range(3)))


def _some_head(tally: Tally) -> float:
    """p of "there is a head that does better than the baseline", [sentences, L, N]."""
    return statistics.max_statistic(*statistics.sign_flips(tally, resamples=1999)).any


def _needed(effects: Mapping[str, Tally]) -> Measure:
    """The fraction of the heads of a seed whose removal raises the loss; the baseline is heads that do nothing."""
    shares = []
    for seed in range(len(next(iter(effects.values())).total)):
        p = []
        for tally in effects.values():
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

    found = _of_numbers(count(pruned[importance.ORDERS[0]]), float(count(pruned[importance.ORDERS[1]]).mean()))
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
