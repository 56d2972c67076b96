"""Every measure of every head on the held-out sentences, one trained model at a time.

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

from experiments.heads import gold
from experiments.heads.examined import Examined
from mhajax.heads import alignment, diversity, patterns, roles
from mhajax.statistics import Tally

Tallies = dict[str, dict[str, Tally]]  # kind of attention → measure → [sentences, L, N]


# Where a head looks, for what share of its attention: a row is in the report, with the head that does it most, and in
# heads.json of every head. The functions take weights [L, B, N, T, S], visible keys [1, B, 1, T, S] and, in a text that
# attends to itself, its tokens [B, 1, T]; they give a Tally whose parts broadcast to [L, B, N].
MEASURES: dict[str, Callable[[Array, Array], Tally]] = {"first token": roles.sink}
MEASURES_OF_TEXT: dict[str, Callable[[Array, Array, Array], Tally]] = {
    "previous token": lambda weights, keys, ids: roles.previous_token(weights, keys),
    "itself": lambda weights, keys, ids: roles.offset(weights, keys, 0),
    "next token": lambda weights, keys, ids: roles.offset(weights, keys, 1),
    "same word before": roles.duplicate_token,
    "after the same word": roles.induction,
}
SPREAD = ("distance", "entropy")  # how far and how widely: the measures that are no share

Asked = tuple[str, str]  # key of a relation, and a part of it by distance; "" is all of it


class Looks(NamedTuple):
    """Where the heads of one model look.

    Attributes:
      measures: kind → measure → [sentences, L, N]: distance, entropy, and the roles that need no gold.
      relations: relation (or part of one) → [sentences, L, N]: hits of the strongest key; the baseline is a key drawn
        from the visible ones.
      agreement: (reading, baseline) → [sentences, L, N]: 1 - alignment error rate of cross attention; empty without
        gold.
      differences: kind → measure → [sentences, L]: how the heads of a layer differ from each other.
      outputs: kind → [tokens, L, N, Hv], what every head gives at every real query, to compare models with.
    """

    measures: Tallies
    relations: dict[Asked, Tally]
    agreement: dict[tuple[str, str], Tally]
    differences: Tallies
    outputs: dict[str, np.ndarray]


def looks(model: Examined) -> Callable[[Any], Looks]:
    """A function from parameters to where the heads look; compiled once for all models of this shape."""

    @jax.jit
    def step(params, batch, visible, tokens, right):
        seen = model.capture(params, batch, ("weights", "heads"))
        measures, agreement, differences = {}, {}, {}
        for kind, arrays in seen.items():
            measures[kind] = _measures(arrays["weights"], visible[kind], tokens[kind], own=kind != "cross")
            differences[kind] = _differences(**arrays, visible=visible[kind][None, :, None])
        if (gold.ALIGNED.key, "") in right:
            agreement = _agreement(seen["cross"]["weights"], visible["cross"], right[gold.ALIGNED.key, ""])
        heads = {kind: arrays["heads"] for kind, arrays in seen.items()}
        return (measures, _hits(seen, visible, right), agreement, differences), heads

    def run(params: Any) -> Looks:
        found = []
        for batch in model.watched("where heads look"):
            visible = model.visible(batch)
            sums, heads = jax.device_get(step(params, batch, visible, model.tokens(batch), _right(model, batch)))
            outputs = {
                kind: np.moveaxis(a, (1, 3), (0, 1))[visible[kind].any(-1)] for kind, a in heads.items()
            }  # [L, B, N, T, Hv] → [B, T, L, N, Hv] → [tokens, L, N, Hv]
            found.append((*_of_sentences(model, batch, sums), outputs))
        return Looks(*jax.tree.map(lambda *parts: np.concatenate(parts), *found))

    return run


def brief(model: Examined, params: Any) -> tuple[Tallies, dict[Asked, Tally]]:
    """Of all that only distance and entropy, and the relations: for a table at the end of a run."""

    @jax.jit
    def step(params, batch, visible, right):
        seen = model.capture(params, batch, ("weights",))
        measures = {kind: _spread(arrays["weights"], visible[kind]) for kind, arrays in seen.items()}
        return measures, _hits(seen, visible, right)

    found = [
        _of_sentences(model, batch, jax.device_get(step(params, batch, model.visible(batch), _right(model, batch))))
        for batch in model.watched("where heads look")
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def _of_sentences(model: Examined, batch: Any, sums: Any) -> Any:
    """Arrays [L, B, …] as [sentences, L, …], without the rows of filling."""
    return jax.tree.map(lambda a: np.moveaxis(a, 1, 0)[model.rows(batch)], sums)


def guesses(model: Examined) -> dict[Asked, dict[str, Tally]]:
    """What simple rules reach on the same relations: relation (or part of one) → rule → [sentences].

    The rules are those of `gold.rules`: every fixed offset, and for relations that may be far also nouns.
    """
    found: dict[Asked, dict[str, list[Tally]]] = {}
    relations = {relation.key: relation for relation in model.relations}
    for batch in model.batches:
        real = model.index(batch) >= 0
        rules = {key: model.rules(batch, relation) for key, relation in relations.items()}
        for asked, right in _right(model, batch).items():
            count = right.any(-1).sum(-1)[real]
            for rule, guess in rules[asked[0]].items():
                hit = (right & guess).any(-1).sum(-1)[real]
                found.setdefault(asked, {}).setdefault(rule, []).append(Tally(hit, count, 0 * count))
    return {
        asked: {rule: jax.tree.map(lambda *parts: np.concatenate(parts), *tallies) for rule, tallies in rules.items()}
        for asked, rules in found.items()
    }


def _right(model: Examined, batch: Any) -> dict[Asked, np.ndarray]:
    """The right keys [B, T, S] of every relation, and of its parts."""
    found = {}
    right = model.right(batch)
    for relation in model.relations:
        found[relation.key, ""] = right[relation.key]
        for part, bounds in relation.parts.items():
            found[relation.key, part] = gold.within(right[relation.key], *bounds)
    return found


def _kind(asked: Asked) -> str:
    return asked[0].split(":")[0]


def _hits(seen: Any, visible: dict[str, Array], right: dict[Asked, Array]) -> dict[Asked, Tally]:
    """How often the strongest key is a right one, [L, B, N] for each relation; those of a kind together."""
    found = {}
    for kind, arrays in seen.items():
        asked = [one for one in right if _kind(one) == kind]
        if asked:
            weights, keys = arrays["weights"], visible[kind][:, None]
            ask = lambda links, w=weights, keys=keys: _whole(roles.strongest(w, links[:, None], keys), w.shape[:3])  # noqa: E731
            tallies = jax.vmap(ask)(jnp.stack([right[one] for one in asked]))
            found |= {one: jax.tree.map(lambda a, n=n: a[n], tallies) for n, one in enumerate(asked)}
    return found


def _spread(weights: Array, visible: Array) -> dict[str, Tally]:
    """How far and how widely heads look, [L, B, N] each."""
    visible = visible[None, :, None]
    found = {"distance": patterns.distance(weights, visible), "entropy": patterns.spread(weights, visible)}
    return {name: _whole(tally, weights.shape[:3]) for name, tally in found.items()}


def _measures(weights: Array, visible: Array, tokens: tuple[Array, Array], *, own: bool) -> dict[str, Tally]:
    """What needs no gold, [L, B, N] each; `own` is the attention of a text to itself."""
    keys = visible[None, :, None]
    found = {name: of(weights, keys) for name, of in MEASURES.items()}
    if own:
        ids = tokens[0][:, None]  # [B, 1, T]
        found |= {name: of(weights, keys, ids) for name, of in MEASURES_OF_TEXT.items()}
    found = {name: _whole(tally, weights.shape[:3]) for name, tally in found.items()}
    return {**_spread(weights, visible), **found}


READINGS = {"where a word is written": alignment.at_output, "where a word is read": alignment.at_input}
BASELINES = ("diagonal", "another sentence")


def _agreement(weights: Array, visible: Array, sure: Array) -> dict[tuple[str, str], Tally]:
    """1 - alignment error rate of the strongest keys, [L, B, N], for each reading and baseline."""
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


def _differences(weights: Array, heads: Array, visible: Array) -> dict[str, Tally]:
    """How the heads of a layer differ, [L, B] each."""
    real = jnp.any(visible[:, :, 0], axis=-1)  # [1, B, T]
    pairs = {
        "where they look (bits)": diversity.jensen_shannon(weights, visible),
        "likeness of outputs (cosine)": diversity.cosines(heads, real),
    }
    return {name: _whole(diversity.between(tally), weights.shape[:2]) for name, tally in pairs.items()}


def _whole(tally: Tally, shape: tuple[int, ...]) -> Tally:
    """The same with all of its parts written out."""
    return jax.tree.map(lambda part: jnp.broadcast_to(part, shape), tally)
