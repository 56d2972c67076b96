"""The results as plain objects for JSON: every number with its interval and its baseline."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhajax.report import roles
from mhajax.report.results import Results, WhereHeadsLook
from mhajax.report.subject import Subject
from mhajax.statistics import Measure, Report


def as_json(subject: Subject, results: Results, seeds: int) -> dict[str, Any]:
    """Everything in `Results` but the similarities of heads.

    Returns:
      "heads": a row for each head of each seed, with its role and measures; "relations", "layers", "best_heads",
      "needed", "removable", "pruned", "stability", "differences": over the seeds. A measure is {"value", "low", "high",
      "baseline"}; null is a number that could not be had, such as an interval from one seed.
    """
    return {
        "seeds": seeds,
        "sentences": subject.size,
        "relations": [
            {
                "relation": answer.name, "attention": answer.kind, "distance": answer.part or "any",
                "questions": answer.asked, "best_head": measure(answer.found.best), "best_rule": answer.baseline,
                "difference": measure(answer.found.difference), "best_untrained_head": measure(answer.untrained),
                "seeds_significant": answer.seeds,
                "chosen": _indices(answer.found.chosen, subject, answer.kind),
            }
            for answer in results.relations
        ],
        "alignment_error_rate": {
            reading: {baseline: measure(one) for baseline, one in of.items()}
            for reading, of in results.alignment.items()
        },
        "needed": {category: measure(one) for category, one in results.needed.items()},
        "removable": {f"{share:.0%}": measure(one) for share, one in results.removable.items()},
        "pruned": {order: _list(one) for order, one in results.pruned.items()},
        "layers": {kind: {name: _list(one) for name, one in of.items()} for kind, of in results.layers.items()},
        "best_heads": {
            kind: {name: _best(one, subject, kind) for name, one in of.items()} for kind, of in results.best.items()
        },
        "differences": {
            kind: {name: _list(one) for name, one in of.items()} for kind, of in results.differences.items()
        },
        "stability": {
            kind: {
                "matched": measure(one.matched),
                "untrained": None if one.untrained is None else measure(one.untrained),
            }
            for kind, one in results.stability.items()
        },
        "heads": _heads(subject, results, seeds),
    }  # fmt: skip


def brief_as_json(subject: Subject, heads: dict[str, dict[str, Measure]]) -> list[dict[str, Any]]:
    """A row for each head of one model: its attention, layer, number and measures."""
    return [
        {
            "attention": kind.name, "layer": layer, "head": head,
            "measures": {name: measure(one, (layer, head)) for name, one in heads[kind.name].items()},
        }
        for kind in subject.kinds
        for layer, head in np.ndindex(kind.layers, kind.heads)
    ]  # fmt: skip


def patterns_as_json(subject: Subject, looks: WhereHeadsLook) -> dict[str, Any]:
    """What the weights alone tell, of one model: "heads", "layers", "best_heads", "differences" as in `as_json`."""
    role = roles.roles_of_patterns(subject, looks)
    return {
        f"{subject.sequence}s": subject.size,
        "heads": [
            {
                "attention": kind.name, "layer": layer, "head": head, "role": role[kind.name, layer, head].word or None,
                "measures": {name: measure(one, (0, layer, head)) for name, one in looks.heads[kind.name].items()},
            }
            for kind in subject.kinds
            for layer, head in np.ndindex(kind.layers, kind.heads)
        ],
        "layers": {kind: {name: _list(one) for name, one in of.items()} for kind, of in looks.layers.items()},
        "best_heads": {
            kind: {name: _best(one, subject, kind) for name, one in of.items()} for kind, of in looks.best.items()
        },
        "differences": {kind: {name: _list(one) for name, one in of.items()} for kind, of in looks.differences.items()},
    }  # fmt: skip


def _best(one: Report, subject: Subject, kind: str) -> dict[str, Any]:
    return {**measure(one.best), "chosen": _indices(one.chosen, subject, kind)}


def measure(one: Measure, place: tuple[int, ...] = ()) -> dict[str, float | None]:
    """One measure as an object."""
    return {name: _number(np.asarray(part)[place]) for name, part in one._asdict().items()}


def _heads(subject: Subject, results: Results, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        role = roles.roles(subject, results, seed)
        for kind in subject.kinds:
            for layer, head in np.ndindex(kind.layers, kind.heads):
                place = (seed, layer, head)
                measures = {name: measure(one, place) for name, one in results.heads[kind.name].items()}
                for relation in subject.relations:
                    if relation.kind == kind.name:
                        measures[relation.name] = measure(results.relations_of_heads[relation.key, ""], place)
                measures |= {
                    f"lost on {category}": measure(of[kind.name], place) for category, of in results.ablation.items()
                }
                measures["importance"] = measure(results.michel[kind.name], place)
                rows.append({
                    "seed": seed, "attention": kind.name, "layer": layer, "head": head,
                    "role": role[kind.name, layer, head].word or None, "measures": measures,
                })  # fmt: skip
    return rows


def _list(one: Measure) -> list[dict[str, float | None]]:
    return [measure(one, (place,)) for place in range(len(one.value))]


def _indices(chosen: np.ndarray, subject: Subject, kind: str) -> list[list[list[int]]]:
    """For each half of the sentences and each seed the [layer, head] that was chosen."""
    heads = subject.kind(kind).heads
    return [[[int(n) // heads, int(n) % heads] for n in np.ravel(half)] for half in np.asarray(chosen)]


def _number(value: Any) -> float | None:
    value = float(value)
    return round(value, 6) if np.isfinite(value) else None
