"""What can be asked of the heads of one trained model: MEASUREMENTS, to which a row adds a question.

A measurement is a function of a `Seed` and of what a claim asks. It gives one number, and what the number must beat,
each by name; a study has them from every seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import heads
from experiments.errors import ConfigError
from experiments.studies.study import Models
from experiments.task import seeds_of
from mhajax import statistics
from mhajax.report import patterns
from mhajax.report.patterns import Asked, Patterns
from mhajax.report.subject import FILLER, Subject
from mhajax.statistics import Tally


class Seed(NamedTuple):
    """A trained model, the same before its training, and where the heads of both look.

    Attributes:
      subject: the functions of the model, and its held-out sentences.
      params, untrained: of the model.
      after, before: where the heads look after and before the training.
      guesses: relation (or part of one) → name → [sentences]: what is reached without attention.
      losses: (params, gates) → {category: Tally [sentences]}: nats of its words, with heads gated.
      attentions: parameters → {kind: attention.Params}, every leaf [L, ...].
    """

    subject: Subject
    params: Any
    untrained: Any
    after: Patterns
    before: Patterns
    guesses: dict[Asked, dict[str, Tally]]
    losses: Callable[[Any, Any], dict[str, Tally]]
    attentions: Callable[[Any], dict[str, Any]]


class Question(NamedTuple):
    """What a claim asks.

    Attributes:
      of: what it is asked of: a relation, or a kind of attention.
      part: of the relation, by distance; "" is all of it.
      words: the category of words whose loss is looked at; "" where none is.
    """

    of: str
    part: str = ""
    words: str = ""


class Found(NamedTuple):
    """A number, what it must beat, and what else a reader should know.

    Attributes:
      value: of the trained model.
      others: name → the same of what it must beat.
      note: in a word or two, such as which head it is.
    """

    value: float
    others: dict[str, float]
    note: str = ""


def follows(seed: Seed, asked: Question) -> Found:
    """How often the key with most weight is a right one: the head that follows a relation best.

    The head is chosen on one half of the sentences and judged on the other, and the other way round; in the same way
    the best guess without attention and the best head before the training.
    """
    relation = _relation(seed, asked)
    guesses = seed.guesses[relation]
    others = Tally(*(np.stack([np.asarray(guess[part], float) for guess in guesses.values()], -1) for part in range(3)))
    found = _best(seed.after.relations[relation], Tally(*(part[:, None] for part in others)))
    early = _best(seed.before.relations[relation])
    assert found.chosen_baseline is not None  # there were alternatives
    guess = list(guesses)[int(np.ravel(found.chosen_baseline)[0])]
    return Found(
        float(found.best.value),
        {"the best guess by position": float(found.best.baseline), "the best untrained head": float(early.best.value)},
        f"{_heads(seed, relation, found.chosen)}; {guess}",
    )


def needed(seed: Seed, asked: Question) -> Found:
    """Nats by which a word of a category costs more while the head that follows a relation best is gated off.

    The head is the one that one half of the sentences chooses; the loss is that of the other half. It must cost more
    than the other heads of its layer do, on average.
    """
    relation = _relation(seed, asked)
    category = _one_of("words", asked.words, seed.subject.categories)
    kind = relation[0].split(":")[0]
    tally = _tally(seed.after.relations[relation])
    halves = np.array_split(np.random.default_rng(0).permutation(len(tally.total)), 2)
    rises = {}  # (layer, head) → nats by sentence
    all_on = _costs(seed, category, kind, None)
    lost, others, chosen = [], [], []
    for choose, judge in (halves, halves[::-1]):
        rate = tally.total[choose].sum(0) / np.maximum(tally.count[choose].sum(0), 1)
        layer, best = (int(i) for i in np.unravel_index(rate.argmax(), rate.shape))
        chosen.append(best + layer * rate.shape[1])
        for head in range(rate.shape[1]):
            if (layer, head) not in rises:
                rises[layer, head] = _costs(seed, category, kind, (layer, head)).total - all_on.total
        words = max(float(all_on.count[judge].sum()), 1.0)
        by_head = [float(rises[layer, head][judge].sum()) / words for head in range(rate.shape[1])]
        lost.append(by_head.pop(best))
        others.append(np.mean(by_head) if by_head else 0.0)
    return Found(
        float(np.mean(lost)), {"another head of its layer": float(np.mean(others))},
        _heads(seed, relation, np.asarray(chosen)),
    )  # fmt: skip


def reach(seed: Seed, asked: Question) -> Found:
    """By how many tokens the head that looks farthest, on average, looks farther than the one that looks nearest.

    Mean distance between query and key, weighed by attention; both heads are chosen on one half of the windows and
    measured on the other. Heads that attend to all alike differ by nothing.
    """
    kind = _one_of("of", asked.of, list(seed.after.measures))
    near, far = _ends(_tally(seed.after.measures[kind]["distance"]))
    early = _ends(_tally(seed.before.measures[kind]["distance"]))
    return Found(far - near, {"untrained heads": early[1] - early[0]}, f"{near:.1f} to {far:.1f} {seed.subject.unit}s")


def apart(seed: Seed, asked: Question) -> Found:
    """How much the subspaces of two heads of a layer overlap: mean squared cosine of their principal angles.

    Of what the heads read to make queries, keys and values (the columns of w_q, w_k and w_v), averaged over these, all
    pairs and layers. Random subspaces of H channels in D overlap by H / D (Absil et al. 2006).
    """
    kind = _one_of("of", asked.of, list(seed.attentions(seed.params)))
    after, before = (_overlap(seed.attentions(params)[kind]) for params in (seed.params, seed.untrained))
    head_dim, d_model = _shape(seed.attentions(seed.params)[kind])
    return Found(after, {"random subspaces": head_dim / d_model, "untrained heads": before}, f"{head_dim} of {d_model}")


def differ(seed: Seed, asked: Question) -> Found:
    """How differently two heads of a layer look: Jensen–Shannon divergence of their attention, in bits, 0 to 1."""
    kind = _one_of("of", asked.of, list(seed.after.differences))
    after, before = (
        float(np.sum(tally.total) / np.sum(tally.count))
        for tally in (_tally(one.differences[kind]["where they look (bits)"]) for one in (seed.after, seed.before))
    )
    return Found(after, {"untrained heads": before})


MEASUREMENTS: dict[str, Callable[[Seed, Question], Found]] = {
    "apart": apart, "differ": differ, "follows": follows, "needed": needed, "reach": reach,
}  # fmt: skip


def seeds(models: Models, sentences: int) -> list[Seed]:
    """Every seed of a training, measured.

    Args:
      models: what was trained; what a training begins with follows from its seed.
      sentences: how many held-out sentences (windows of a text) are measured.
    """
    task = models.task
    subject = task.examine(sentences)
    look = patterns.make_measure(subject, heads.progress)
    guesses = patterns.measure_baselines(subject)
    losses = _make_losses(subject)
    found = []
    for number, one in enumerate(seeds_of(models.params)):
        trained = task.functional(one)
        untrained = task.functional(task.init_params(jax.random.key(models.first_seed + number)))
        looks = look(trained), look(untrained)
        found.append(Seed(subject, trained, untrained, *looks, guesses, losses, models.attentions))
    return found


def _make_losses(subject: Subject) -> Callable[[Any, Any], dict[str, Tally]]:
    @jax.jit
    def step(params, batch, predicted, gates):
        nats = subject.losses(params, batch, gates)
        return jnp.einsum("bt,btc->bc", nats, predicted), jnp.sum(predicted, axis=1)

    def losses(params: Any, gates: Any) -> dict[str, Tally]:
        parts = []
        for batch in subject.batches:
            totals = jax.device_get(step(params, batch, subject.predicted(batch).astype(np.float32), gates))
            kept = np.asarray(subject.index(batch)) != FILLER
            parts.append([part[kept] for part in totals])
        totals, counts = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return {name: Tally(totals[:, c], counts[:, c], 0 * counts[:, c]) for c, name in enumerate(subject.categories)}

    return losses


def _costs(seed: Seed, category: str, kind: str, off: tuple[int, int] | None) -> Tally:
    gates = {name: np.array(one) for name, one in seed.subject.gates.items()}
    if off is not None:
        gates[kind][off] = 0
    return seed.losses(seed.params, gates)[category]


def _relation(seed: Seed, asked: Question) -> Asked:
    key = _one_of("of", asked.of, [relation.key for relation in seed.subject.relations])
    parts = next(relation.parts for relation in seed.subject.relations if relation.key == key)
    if asked.part and asked.part not in parts:
        raise ConfigError(f"part must be a part of {key!r} ({', '.join(parts) or 'it has none'}), got {asked.part!r}.")
    if not np.sum(_tally(seed.after.relations[key, asked.part]).count):
        raise ConfigError(f"none of the held-out sentences asks {key!r} {asked.part}; take more sentences.")
    return key, asked.part


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(repr(one) for one in known) or 'none'}, got {value!r}.")
    return value


def _best(tally: Tally, alternatives: Tally | None = None) -> statistics.Report:
    return statistics.select_and_report(_tally(tally), axis=0, heads=(1, 2), alternatives=alternatives)


def _tally(tally: Tally) -> Tally:
    """All parts as whole arrays."""
    return Tally(*(np.array(part, float) for part in np.broadcast_arrays(*tally)))


def _heads(seed: Seed, relation: Asked, chosen: Any) -> str:
    kind = relation[0].split(":")[0]
    count = next(one.heads for one in seed.subject.kinds if one.name == kind)
    places = [divmod(int(head), count) for head in np.ravel(chosen)]
    return "head " + " and ".join(f"{layer}·{head}" for layer, head in sorted(set(places)))


def _ends(tally: Tally) -> tuple[float, float]:
    """The nearest and the farthest head, chosen on one half of the windows and measured on the other."""
    halves = np.array_split(np.random.default_rng(0).permutation(len(tally.total)), 2)
    found = []
    for choose, judge in (halves, halves[::-1]):
        means = [tally.total[half].sum(0).ravel() / tally.count[half].sum(0).ravel() for half in (choose, judge)]
        found.append((means[1][means[0].argmin()], means[1][means[0].argmax()]))
    near, far = np.mean(found, axis=0)
    return float(near), float(far)


def _overlap(params: Any) -> float:
    """Mean over layers, over w_q, w_k and w_v, and over pairs of heads, of the squared cosines of principal angles."""
    overlaps = []
    for name in ("w_q", "w_k", "w_v"):
        weights = np.asarray(getattr(params, name), float)  # [L, N, D, H]
        for layer in weights:
            bases = [np.linalg.qr(head)[0] for head in layer]
            overlaps += [np.mean(np.sum((a.T @ b) ** 2, axis=0)) for a, b in itertools.combinations(bases, 2)]
    return float(np.mean(overlaps)) if overlaps else float("nan")


def _shape(params: Any) -> tuple[int, int]:
    """H and D."""
    *_, d_model, head_dim = np.shape(params.w_q)
    return head_dim, d_model
