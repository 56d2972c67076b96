"""The keywords of attention, declared once: every function and module that attends takes them as `Unpack` of these.

What they are, `attention.apply` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from jax import Array
from jax.typing import ArrayLike

from mhajax.interventions import Intervention
from mhajax.kernels.contract import Path
from mhajax.masks import Mask


class HeadOptions(TypedDict, total=False):
    """How heads attend, the keywords of every function that attends; what they are, `apply` says."""

    mask: Mask | ArrayLike | None
    bias: ArrayLike | None
    score: Callable[[Any, Any, Any, Any], Any] | None
    kernel: str | Path
    rotate: Callable[[Array, Array], Array] | None
    gates: ArrayLike | None
    intervention: Intervention
    real: Array | None
    dropout_rate: float
    dropout_key: Array | None


class LayerOptions(HeadOptions, total=False):
    """And where the tokens stand: the keywords of a layer, which takes its memory by place."""

    positions: Array | None
    memory_positions: Array | None


class Options(LayerOptions, total=False):
    """All keywords of `apply`."""

    memory: Array | None
