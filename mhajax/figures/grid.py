"""Axes of a matrix of all heads against all heads: lines between the layers, and names as far as they can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mhajax.figures import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = 0.5  # inches, the room that the names of heads or layers need left of a matrix


def cell_size(count: int, room: float) -> float:
    """The side of a cell, in inches, of a matrix of `count` heads in `room` inches."""
    return min(0.46, room / count)


def labels_above(num_layers: int, num_heads: int, cell: float) -> float:
    """The room that the names need above a matrix, in inches."""
    return LABELS if _names(num_layers, num_heads, cell)[2] else 0.2


def name_heads(axes: Axes, num_layers: int, num_heads: int, cell: float) -> None:
    """Names heads "layer·head" where cells are large enough, else layers; lines separate the layers."""
    places, names, turned = _names(num_layers, num_heads, cell)
    axes.set_xticks(places, names, rotation=90 if turned else 0)
    axes.set_yticks(places, names)
    axes.tick_params(
        length=0, pad=2, labelsize=7, labelcolor=page.INK, top=True, bottom=False, labeltop=True, labelbottom=False
    )
    for edge in np.arange(1, num_layers) * num_heads - 0.5:
        axes.axhline(edge, color="0.35", linewidth=0.6)
        axes.axvline(edge, color="0.35", linewidth=0.6)


def heads_named(cell: float) -> bool:
    """Whether cells are large enough for the name of each head."""
    return cell >= 0.13


def _names(num_layers: int, num_heads: int, cell: float) -> tuple[np.ndarray, list[str], bool]:
    """Places, names, and whether those above the matrix must be turned."""
    if heads_named(cell):
        names = [f"{layer}·{head}" for layer, head in np.ndindex(num_layers, num_heads)]
        return np.arange(num_layers * num_heads), names, cell <= 0.3
    step = int(np.ceil(0.14 / (cell * num_heads)))
    layers = np.arange(0, num_layers, step)
    return layers * num_heads + (num_heads - 1) / 2, [f"layer {n}" for n in layers], cell * num_heads * step < 0.5
