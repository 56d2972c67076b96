"""The findings as plain objects for JSON: every number with its interval and its baseline."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.heads import roles
from experiments.heads.examined import Examined
from experiments.heads.findings import Findings
from mhajax.statistics import Measure


def as_json(model: Examined, found: Findings, seeds: int) -> dict[str, Any]:
    """Everything in `Findings` but the similarities of heads.

    Returns:
      "heads": a row for each head of each seed, with its role and measures; "relations", "layers", "best_heads",
      "needed", "removable", "pruned", "stability", "differences": over the seeds. A measure is {"value", "low", "high",
      "baseline"}; null is a number that could not be had, such as an interval from one seed.
    """
    return {
        "seeds": seeds,
        "sentences": sum(int((model.index(batch) >= 0).sum()) for batch in model.batches),
        "relations": [
            {
                "relation": answer.name, "attention": answer.kind, "distance": answer.part or "any",
                "questions": answer.asked, "best_head": measure(answer.found.best), "best_rule": answer.rule,
                "difference": measure(answer.found.difference), "best_untrained_head": measure(answer.untrained),
                "seeds_significant": answer.seeds,
                "chosen": _places(answer.found.chosen, model, answer.kind),
            }
            for answer in found.relations
        ],
        "alignment_error_rate": {
            reading: {baseline: measure(one) for baseline, one in of.items()} for reading, of in found.alignment.items()
        },
        "needed": {category: measure(one) for category, one in found.needed.items()},
        "removable": {f"{share:.0%}": measure(one) for share, one in found.removable.items()},
        "pruned": {order: _list(one) for order, one in found.pruned.items()},
        "layers": {kind: {name: _list(one) for name, one in of.items()} for kind, of in found.layers.items()},
        "best_heads": {
            kind: {
                name: {**measure(one.best), "chosen": _places(one.chosen, model, kind)} for name, one in of.items()
            }
            for kind, of in found.best.items()
        },
        "differences": {kind: {name: _list(one) for name, one in of.items()} for kind, of in found.differences.items()},
        "stability": {
            kind: {
                "matched": measure(one.matched),
                "untrained": None if one.untrained is None else measure(one.untrained),
            }
            for kind, one in found.stability.items()
        },
        "heads": _heads(model, found, seeds),
    }  # fmt: skip


def of_one(model: Examined, heads: dict[str, dict[str, Measure]]) -> list[dict[str, Any]]:
    """A row for each head of one model: its attention, layer, number and measures."""
    return [
        {
            "attention": kind.name, "layer": layer, "head": head,
            "measures": {name: measure(one, (layer, head)) for name, one in heads[kind.name].items()},
        }
        for kind in model.kinds
        for layer, head in np.ndindex(kind.layers, kind.heads)
    ]  # fmt: skip


def measure(one: Measure, place: tuple[int, ...] = ()) -> dict[str, float | None]:
    """One measure as an object."""
    return {name: _number(np.asarray(part)[place]) for name, part in one._asdict().items()}


def _heads(model: Examined, found: Findings, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):
        role = roles.roles(model, found, seed)
        for kind in model.kinds:
            for layer, head in np.ndindex(kind.layers, kind.heads):
                place = (seed, layer, head)
                measures = {name: measure(one, place) for name, one in found.heads[kind.name].items()}
                for relation in model.relations:
                    if relation.kind == kind.name:
                        measures[relation.name] = measure(found.relations_of_heads[relation.key, ""], place)
                measures |= {
                    f"lost on {category}": measure(of[kind.name], place) for category, of in found.lost.items()
                }
                measures["importance"] = measure(found.importance[kind.name], place)
                rows.append({
                    "seed": seed, "attention": kind.name, "layer": layer, "head": head,
                    "role": role[kind.name, layer, head].word or None, "measures": measures,
                })  # fmt: skip
    return rows


def _list(one: Measure) -> list[dict[str, float | None]]:
    return [measure(one, (place,)) for place in range(len(one.value))]


def _places(chosen: np.ndarray, model: Examined, kind: str) -> list[list[list[int]]]:
    """For each half of the sentences and each seed the [layer, head] that was chosen."""
    heads = next(one.heads for one in model.kinds if one.name == kind)
    return [[[int(n) // heads, int(n) % heads] for n in np.ravel(half)] for half in np.asarray(chosen)]


def _number(value: Any) -> float | None:
    value = float(value)
    return round(value, 6) if np.isfinite(value) else None
