"""One word for each head: what it does more than any rule would, if there is such a thing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.heads.examined import Examined
from experiments.heads.findings import Findings
from mhajax.statistics import Measure

_ENOUGH = 0.25  # of the way from the baseline to 1, for the lower end of the interval
_WORDS = {
    "first token": "first",
    "previous token": "previous",
    "itself": "itself",
    "next token": "next",
    "same word before": "repeat",
    "after the same word": "induction",
}


class Role(NamedTuple):
    """What a head does.

    Attributes:
      word: for a cell of a table; "" for no role.
      note: for a reader, with value, interval and baseline; "" for no role.
    """

    word: str
    note: str


def roles(model: Examined, found: Findings, seed: int) -> dict[tuple[str, int, int], Role]:
    """The role of every head (kind, layer, head) of one seed.

    A head has the role on which the lower end of its interval is furthest above the baseline, as a share of what there
    is above it, if that is a quarter or more. The baseline of a relation is the best rule, that of other roles uniform
    attention.
    """
    candidates: dict[str, list[tuple[str, str, Measure]]] = {kind.name: [] for kind in model.kinds}
    for kind, measures in found.heads.items():
        for name, word in _WORDS.items():
            if name in measures:
                candidates[kind].append((word, name, measures[name]))
    rules = {(answer.kind, answer.name): answer for answer in found.relations if not answer.part}
    for relation in model.relations:
        answer = rules.get((relation.kind, relation.name))
        if answer is not None:
            of_heads = found.relations_of_heads[relation.key, ""]
            rule = np.broadcast_to(answer.found.best.baseline, of_heads.value.shape)
            candidates[relation.kind].append((relation.role, relation.name, of_heads._replace(baseline=rule)))
    return {
        (kind.name, layer, head): _best(candidates[kind.name], (seed, layer, head))
        for kind in model.kinds
        for layer in range(kind.layers)
        for head in range(kind.heads)
    }


def _best(candidates: list[tuple[str, str, Measure]], place: tuple[int, int, int]) -> Role:
    best, reached = Role("", ""), _ENOUGH
    for word, name, measure in candidates:
        value, low, high, baseline = (float(part[place]) for part in measure)
        excess = (low - baseline) / max(1 - baseline, 1e-9)
        if excess >= reached:
            reached = excess
            best = Role(word, f"{name}: {value:.0%} [{low:.0%}, {high:.0%}], baseline {baseline:.0%}")
    return best
