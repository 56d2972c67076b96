"""Measures of heads: arrays and functions in, arrays out; what must know a model (ablation, surgery) says so.

patterns       where heads look: distance, entropy, variability, fixed offsets
roles          what they look at: the token before, duplicates, induction, sinks, rare words, any relation
copying        whether they write what they read
importance     what depends on them: ablations, Michel, interactions, Shapley shares, takeovers, pruning curves
ablation       all single-head ablations of a stack or a translator, which share their work
gates          learning which to keep: hard concrete, causal gates, exactly K
surgery        prune, permute, merge, transplant, pool key and value heads
diversity      how different heads are: disagreement, Jensen–Shannon, CKA
circuits       what their weights could do: angles, effective rank, composition
alignment      rollout, norm-weighted attention, links between words and their error rate
matching       the same head in another seed

What they count is a `statistics.Tally`, of which `mhajax.statistics` makes values with intervals and baselines.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # each is imported when it is named, below
    from mhajax.heads import (
        ablation,
        alignment,
        circuits,
        copying,
        diversity,
        gates,
        importance,
        matching,
        patterns,
        roles,
        surgery,
    )

__all__ = [
    "ablation",
    "alignment",
    "circuits",
    "copying",
    "diversity",
    "gates",
    "importance",
    "matching",
    "patterns",
    "roles",
    "surgery",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"mhajax.heads.{name}")
    raise AttributeError(f"module 'mhajax.heads' has no attribute {name!r}; dir(mhajax.heads) names what it has.")


def __dir__() -> list[str]:
    return list(__all__)
