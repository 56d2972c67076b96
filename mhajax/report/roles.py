"""One word for each head: what it does more than any baseline would, if there is such a thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mhajax.report.results import Results, WhereHeadsLook
from mhajax.report.subject import Kind, Subject
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


Roles = dict[tuple[str, int, int], Role]  # kind, layer, head


def roles(subject: Subject, results: Results, seed: int) -> Roles:
    """The role of every head of one seed.

    A head has the role on which the lower end of its interval is furthest above the baseline, as a share of what there
    is above it, if that is a quarter or more. The baseline of a relation is the best of the subject's baselines, that
    of other roles uniform attention.
    """
    candidates = _candidates(subject, results.heads)
    followed = {(answer.kind, answer.name): answer for answer in results.relations if not answer.part}
    for relation in subject.relations:
        answer = followed.get((relation.kind, relation.name))
        if answer is not None:
            of_heads = results.relations_of_heads[relation.key, ""]
            baseline = np.broadcast_to(answer.found.best.baseline, of_heads.value.shape)
            candidates[relation.kind].append((relation.role, relation.name, of_heads._replace(baseline=baseline)))
    return _chosen(subject.kinds, candidates, seed)


def roles_of_patterns(subject: Subject, looks: WhereHeadsLook, seed: int = 0) -> Roles:
    """The same from the weights alone: `roles` without relations."""
    return _chosen(subject.kinds, _candidates(subject, looks.heads), seed)


Candidates = dict[str, list[tuple[str, str, Measure]]]


def _candidates(subject: Subject, heads: Mapping[str, Mapping[str, Measure]]) -> Candidates:
    return {
        kind.name: [(word, name, heads[kind.name][name]) for name, word in _WORDS.items() if name in heads[kind.name]]
        for kind in subject.kinds
    }


def _chosen(kinds: Sequence[Kind], candidates: Candidates, seed: int) -> Roles:
    return {
        (kind.name, layer, head): _best(candidates[kind.name], (seed, layer, head))
        for kind in kinds
        for layer, head in np.ndindex(kind.layers, kind.heads)
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
