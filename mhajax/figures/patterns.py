"""Who attends to whom: one panel a head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing


def attention_patterns(
    weights: ArrayLike,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    layer_names: Sequence[str] | None = None,
) -> Drawing:
    """Draws who attends to whom: one panel a head, a row of panels a layer, one colour scale from 0 to 1.

    Args:
      weights: [L, N, T, S], attention after the softmax, between 0 and 1.
      row_labels: the T query words.
      column_labels: the S key words.
      title: above the panels.
      layer_names: L names; "layer 0", "layer 1", ... if not given.

    Returns:
      A Drawing; the table has one row a weight.

    Raises:
      ValueError: shapes and labels do not fit, or a weight is not finite or not between 0 and 1.
    """
    who = "figures.attention_patterns"
    values = inputs.attention(who, "weights", weights, "[L, N, T, S]")
    num_layers, num_heads, num_queries, num_keys = values.shape
    inputs.same_length(who, "row_labels", row_labels, "T", num_queries, "words", "the queries are weights.shape[2]")
    inputs.same_length(who, "column_labels", column_labels, "S", num_keys, "words", "the keys are weights.shape[3]")
    if layer_names is not None:
        inputs.same_length(who, "layer_names", layer_names, "L", num_layers, "names", "the layers are weights.shape[0]")
    rows, columns = [str(word) for word in row_labels], [str(word) for word in column_labels]
    layers = [f"layer {layer}" for layer in range(num_layers)] if layer_names is None else [*map(str, layer_names)]

    # A cell is as large as a page allows; words thin out only where they would be too small to read.
    across, down = num_heads * num_keys, num_layers * num_queries
    cell = max(min(0.30, 9 / across, 8 / down), min(0.125, 16 / across, 12 / down))
    size = min(9.0, max(5.0, 0.7 * 72 * cell))
    step = math.ceil(1.25 * size / 72 / cell)
    with page.style():
        names = [[f"{layer} · head {head}" for head in range(num_heads)] for layer in layers]
        if layer_names is None and num_heads * page.width(sum(names, []), 8) > page.WIDE:
            names = [[f"{layer}·{head}" for head in range(num_heads)] for layer in range(num_layers)]
        left = 0.44 + page.width(rows[::step], size)
        bottom = 0.46 + page.width(columns[::step], size)
        pitch = max(num_keys * cell, page.width(sum(names, []), 8)) + 0.16, num_queries * cell + 0.30
        grid = num_heads * pitch[0], num_layers * pitch[1]
        width = max(left + grid[0] + 0.85, left + page.width([title], 11) + 0.15)
        height = bottom + max(grid[1], 1.2) + 0.36
        figure = page.figure(width, height, title, left)
        top = height - 0.36
        image = None
        for layer, head in np.ndindex(num_layers, num_heads):
            x, y = left + head * pitch[0], top - (layer + 1) * pitch[1]
            axes = page.axes(figure, x, y, num_keys * cell, num_queries * cell)
            image = axes.imshow(
                values[layer, head], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            axes.set_title(names[layer][head], fontsize=8, color=page.INK, loc="left", pad=3)
            axes.tick_params(length=0, pad=3, labelsize=size, labelcolor=page.INK)
            axes.set_yticks(range(0, num_queries, step), rows[::step] if head == 0 else [])
            last = layer == num_layers - 1
            axes.set_xticks(range(0, num_keys, step), columns[::step] if last else [], rotation=90)
        base = top - grid[1]
        page.faint(figure, 0.18, base + grid[1] / 2, "query", rotation=90)
        page.faint(figure, left + grid[0] / 2 - 0.08, base - bottom + 0.18, "key")
        page.color_bar(
            figure, image, left + grid[0] + 0.05, top - 0.30, grid[1] - 0.30, "attention weight", [0, 0.5, 1]
        )
    table = [
        (
            layers[layer] if layer_names else layer,
            head,
            t,
            rows[t],
            s,
            columns[s],
            inputs.number(values[layer, head, t, s]),
        )
        for layer, head, t, s in np.ndindex(values.shape)
    ]
    return Drawing(figure, (("layer", "head", "query_index", "query_word", "key_index", "key_word", "weight"), table))
