"""Where every head looks, sentence by sentence, one model at a time.

A compiled step turns a batch of sentences into sums per sentence and head; the attention weights of a corpus are never
together in memory. What comes out is `Tally`s whose axes are [sentences, L, N]; the models (seeds) are stacked in
front of them by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.heads import alignment, diversity, patterns, roles
from mhajax.report.progress import Progress, silent
from mhajax.report.subject import Subject
from mhajax.statistics import Tally

Tallies = dict[str, dict[str, Tally]]  # kind of attention → measure → [sentences, L, N]


# Where a head looks, for what share of its attention: a row is in the report, with the head that does it most, and in
# its numbers of every head. The functions take weights [L, B, N, T, S], visible keys [1, B, 1, T, S] and, in a text
# that attends to itself, its tokens [B, 1, T]; they give a Tally whose parts broadcast to [L, B, N].
MEASURES: dict[str, Callable[[Array, Array], Tally]] = {"first token": roles.sink}
MEASURES_OF_TEXT: dict[str, Callable[[Array, Array, Array], Tally]] = {
    "previous token": lambda weights, keys, ids: roles.previous_token(weights, keys),
    "itself": lambda weights, keys, ids: roles.offset(weights, keys, 0),
    "next token": lambda weights, keys, ids: roles.offset(weights, keys, 1),
    "same word before": roles.duplicate_token,
    "after the same word": roles.induction,
}
NOT_SHARES = ("distance", "entropy")  # how far and how widely: the measures that are no share

Asked = tuple[str, str]  # key of a relation, and a part of it by distance; "" is all of it


class Patterns(NamedTuple):
    """Where the heads of one model look.

    Attributes:
      measures: kind → measure → [sentences, L, N]: distance, entropy, and the roles that need no gold.
      relations: relation (or part of one) → [sentences, L, N]: how often the key with most weight is a right one; the
        baseline is a key drawn from the visible ones.
      agreement: (reading, baseline) → [sentences, L, N]: 1 - alignment error rate; empty unless the subject says what
        is aligned.
      differences: kind → measure → [sentences, L]: how the heads of a layer differ from each other.
      outputs: kind → [tokens, L, N, Hv], what every head gives at every valid query, to compare models with; empty
        where there are only weights.
    """

    measures: Tallies
    relations: dict[Asked, Tally]
    agreement: dict[tuple[str, str], Tally]
    differences: Tallies
    outputs: dict[str, np.ndarray]


def make_measure(subject: Subject, progress: Progress = silent) -> Callable[[Any], Patterns]:
    """A function from parameters to where the heads look; compiled once for all models of this shape.

    Args:
      subject: the functions of the model, and its sentences.
      progress: told how far it is.
    """
    aligned = subject.aligned_relation()
    is_self = {kind.name: kind.is_self for kind in subject.kinds}

    @jax.jit
    def step(params, batch, visible, tokens, gold):
        captured = subject.capture(params, batch, ("weights", "heads"))
        measures, agreement, differences = {}, {}, {}
        for kind, arrays in captured.items():
            measures[kind] = _measures(arrays["weights"], visible[kind], tokens[kind], is_self=is_self[kind])
            differences[kind] = _differences(**arrays, visible=visible[kind][None, :, None])
        if aligned is not None:
            kind = aligned.kind
            agreement = _agreement(captured[kind]["weights"], visible[kind], gold[aligned.key, ""])
        heads = {kind: arrays["heads"] for kind, arrays in captured.items() if "heads" in arrays}
        return (measures, _hits(captured, visible, gold), agreement, differences), heads

    def measure(params: Any) -> Patterns:
        found = []
        for batch in subject.watched("where heads look", progress):
            visible = subject.visible(batch)
            sums, heads = jax.device_get(step(params, batch, visible, subject.tokens(batch), _gold(subject, batch)))
            outputs = {
                kind: np.moveaxis(a, (1, 3), (0, 1))[visible[kind].any(-1)] for kind, a in heads.items()
            }  # [L, B, N, T, Hv] → [B, T, L, N, Hv] → [tokens, L, N, Hv]
            found.append((*_of_sentences(subject, batch, sums), outputs))
        return Patterns(*jax.tree.map(lambda *parts: np.concatenate(parts), *found))

    return measure


def measure_briefly(subject: Subject, params: Any, progress: Progress = silent) -> tuple[Tallies, dict[Asked, Tally]]:
    """Of all that only distance and entropy, and the relations: for a table at the end of a training."""

    @jax.jit
    def step(params, batch, visible, gold):
        captured = subject.capture(params, batch, ("weights",))
        measures = {kind: _far_and_wide(arrays["weights"], visible[kind]) for kind, arrays in captured.items()}
        return measures, _hits(captured, visible, gold)

    found = [
        _of_sentences(
            subject, batch, jax.device_get(step(params, batch, subject.visible(batch), _gold(subject, batch)))
        )
        for batch in subject.watched("where heads look", progress)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def _of_sentences(subject: Subject, batch: Any, sums: Any) -> Any:
    """Arrays [L, B, …] as [sentences, L, …], without the rows of filling."""
    return jax.tree.map(lambda a: np.moveaxis(a, 1, 0)[subject.rows(batch)], sums)


def measure_baselines(subject: Subject) -> dict[Asked, dict[str, Tally]]:
    """What the subject's baselines reach on the same relations: relation (or part of one) → name → [sentences]."""
    found: dict[Asked, dict[str, list[Tally]]] = {}
    relations = {relation.key: relation for relation in subject.relations}
    for batch in subject.batches:
        rows = subject.rows(batch)
        baselines = {key: subject.baselines(batch, relation) for key, relation in relations.items()}
        for asked, gold in _gold(subject, batch).items():
            count = gold.any(-1).sum(-1)[rows]
            for name, guess in baselines[asked[0]].items():
                hit = (gold & guess).any(-1).sum(-1)[rows]
                found.setdefault(asked, {}).setdefault(name, []).append(Tally(hit, count, 0 * count))
    return {
        asked: {name: jax.tree.map(lambda *parts: np.concatenate(parts), *tallies) for name, tallies in named.items()}
        for asked, named in found.items()
    }


def _gold(subject: Subject, batch: Any) -> dict[Asked, np.ndarray]:
    """The right keys [B, T, S] of every relation, and of its parts."""
    found = {}
    gold = subject.gold(batch)
    for relation in subject.relations:
        found[relation.key, ""] = gold[relation.key]
        for part, bounds in relation.parts.items():
            found[relation.key, part] = within(gold[relation.key], *bounds)
    return found


def within(gold: np.ndarray, low: int, high: int) -> np.ndarray:
    """Those of the right keys [B, T, S] that are between `low` and `high` tokens away.

    >>> within(np.ones((1, 1, 4), bool), 1, 2).tolist()
    [[[False, True, True, False]]]
    """
    t, s = gold.shape[1:]
    distance = np.abs(np.arange(t)[:, None] - np.arange(s))
    return gold & (distance >= low) & (distance <= high)


def _kind(asked: Asked) -> str:
    return asked[0].split(":")[0]


def _hits(captured: Any, visible: dict[str, Array], gold: dict[Asked, Array]) -> dict[Asked, Tally]:
    """How often the key with most weight is a right one, [L, B, N] for each relation; those of a kind together."""
    found = {}
    for kind, arrays in captured.items():
        asked = [one for one in gold if _kind(one) == kind]
        if asked:
            weights, keys = arrays["weights"], visible[kind][:, None]
            ask = lambda links, w=weights, keys=keys: _whole(roles.strongest(w, links[:, None], keys), w.shape[:3])  # noqa: E731
            tallies = jax.vmap(ask)(jnp.stack([gold[one] for one in asked]))
            found |= {one: jax.tree.map(lambda a, n=n: a[n], tallies) for n, one in enumerate(asked)}
    return found


def _far_and_wide(weights: Array, visible: Array) -> dict[str, Tally]:
    """How far and how widely heads look, [L, B, N] each."""
    visible = visible[None, :, None]
    found = {"distance": patterns.distance(weights, visible), "entropy": patterns.spread(weights, visible)}
    return {name: _whole(tally, weights.shape[:3]) for name, tally in found.items()}


def _measures(weights: Array, visible: Array, tokens: tuple[Array, Array], *, is_self: bool) -> dict[str, Tally]:
    """What needs no gold, [L, B, N] each."""
    keys = visible[None, :, None]
    found = {name: of(weights, keys) for name, of in MEASURES.items()}
    if is_self:
        ids = tokens[0][:, None]  # [B, 1, T]
        found |= {name: of(weights, keys, ids) for name, of in MEASURES_OF_TEXT.items()}
    found = {name: _whole(tally, weights.shape[:3]) for name, tally in found.items()}
    return {**_far_and_wide(weights, visible), **found}


READINGS = {"where a word is written": alignment.at_output, "where a word is read": alignment.at_input}
BASELINES = ("diagonal", "another sentence")


def _agreement(weights: Array, visible: Array, sure: Array) -> dict[tuple[str, str], Tally]:
    """1 - alignment error rate of the keys with most weight, [L, B, N], for each reading and baseline."""
    both = _without_last(jnp.swapaxes(_without_last(jnp.swapaxes(visible, -1, -2)), -1, -2))  # words, not the end
    both, sure = both[:, None, :-1], (sure & both)[:, None, :-1]
    found = {}
    for reading, rows in READINGS.items():
        read = rows(weights)
        linked = alignment.links(read, both)
        others = (alignment.diagonal(both), alignment.shuffled(read, both, axis=1))
        for name, other in zip(BASELINES, others, strict=True):
            wrong = alignment.error_rate(linked, sure, visible=both, baseline=other)
            right = Tally(wrong.count - wrong.total, wrong.count, wrong.count - wrong.baseline)
            found[reading, name] = _whole(right, weights.shape[:3])
    return found


def _without_last(visible: Array) -> Array:
    """The same without the last query that sees anything, [B, T, S]."""
    rows = jnp.any(visible, axis=-1)
    return visible & jnp.pad(rows[:, 1:], ((0, 0), (0, 1)))[..., None]


def _differences(weights: Array, visible: Array, heads: Array | None = None) -> dict[str, Tally]:
    """How the heads of a layer differ, [L, B] each."""
    valid = jnp.any(visible[:, :, 0], axis=-1)  # [1, B, T]
    pairs = {"where they look (bits)": diversity.jensen_shannon(weights, visible)}
    if heads is not None:
        pairs["likeness of outputs (cosine)"] = diversity.cosines(heads, valid)
    return {name: _whole(diversity.between(tally), weights.shape[:2]) for name, tally in pairs.items()}


def _whole(tally: Tally, shape: tuple[int, ...]) -> Tally:
    """The same with all of its parts written out."""
    return jax.tree.map(lambda part: jnp.broadcast_to(part, shape), tally)
