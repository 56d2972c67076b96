"""The attention of one head beside the links that people drew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing


def alignment_matrix(
    weights: ArrayLike,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    sure: Iterable[tuple[int, int]],
    possible: Iterable[tuple[int, int]] = (),
    title: str,
) -> Drawing:
    """Draws the attention of one head, with frames around the gold links and a dot at the strongest key of each query.

    Args:
      weights: [T, S], attention of the target words (queries) to the source words (keys).
      row_labels: the T target words.
      column_labels: the S source words.
      sure: (t, s) of the links that are certain; a solid frame.
      possible: (t, s) of the links that may be; a dashed frame, where the link is not also sure.
      title: above the matrix.

    Returns:
      A Drawing; the table has one row a weight: target and source index and word, weight, gold (sure, possible or "").

    Raises:
      ValueError: shapes and labels do not fit, weights are not attention, or a link lies outside.

    References:
      Och & Ney 2003, "A Systematic Comparison of Various Statistical Alignment Models", section 5: sure and possible.
    """
    who = "figures.alignment_matrix"
    values = inputs.attention(who, "weights", weights, "[T, S]")
    num_rows, num_columns = values.shape
    inputs.same_length(who, "row_labels", row_labels, "T", num_rows, "words", "the targets are weights.shape[0]")
    inputs.same_length(who, "column_labels", column_labels, "S", num_columns, "words", "the sources: weights.shape[1]")
    gold = {}
    for kind, links in (("possible", possible), ("sure", sure)):
        for t, s in links:
            if not (0 <= t < num_rows and 0 <= s < num_columns):
                raise ValueError(
                    f"{who}: {kind} must hold (t, s) below (T, S)={values.shape}, got ({t}, {s}); "
                    "a link is (target, source), counted from 0."
                )
            gold[int(t), int(s)] = kind
    rows, columns = [str(word) for word in row_labels], [str(word) for word in column_labels]

    kinds = set(gold.values())
    note = " · ".join(
        ["frame: gold link"] * (kinds == {"sure"})
        + ["solid frame: sure link", "dashed: possible"] * ("possible" in kinds)
        + ["dot: strongest source of a target word"]
    )
    cell = max(0.11, min(0.30, 7.5 / num_columns, 8 / num_rows))
    size = min(9.0, max(5.0, 0.7 * 72 * cell))
    step = math.ceil(1.25 * size / 72 / cell)
    with page.style():
        from matplotlib.patches import Rectangle

        left = 0.44 + page.width(rows[::step], size)
        bottom, head = 0.46 + page.width(columns[::step], size), 0.68
        grid = num_columns * cell, num_rows * cell
        width = left + max(grid[0] + 1.1, page.head_width(title, note))
        height = head + max(grid[1], 1.2) + bottom
        figure = page.figure(width, height, title, left, note)
        top = height - head
        axes = page.axes(figure, left, top - grid[1], *grid)
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (t, s), kind in sorted(gold.items()):
            style = "-" if kind == "sure" else (0, (2, 1.2))
            place = s - 0.5 + 0.03 / cell, t - 0.5 + 0.03 / cell
            side = 1 - 0.06 / cell
            axes.add_patch(
                Rectangle(place, side, side, fill=False, edgecolor=page.MARK, linewidth=1.6, linestyle=style)
            )
        best = values.argmax(1)
        inks = [page.ink_on(image, values[t, s]) for t, s in enumerate(best)]
        axes.scatter(best, range(num_rows), s=min(14, (16 * cell) ** 2), color=inks, linewidths=0, zorder=3)
        axes.tick_params(length=0, pad=3, labelsize=size, labelcolor=page.INK)
        axes.set_yticks(range(0, num_rows, step), rows[::step])
        axes.set_xticks(range(0, num_columns, step), columns[::step], rotation=90)
        page.faint(figure, 0.18, top - grid[1] / 2, "target", rotation=90)
        page.faint(figure, left + grid[0] / 2, top - grid[1] - bottom + 0.18, "source")
        page.color_bar(figure, image, left + grid[0] + 0.15, top, max(grid[1], 1.2), "attention weight", [0, 0.5, 1])
    header = ("target_index", "target_word", "source_index", "source_word", "weight", "gold")
    table = [
        (t, rows[t], s, columns[s], inputs.number(values[t, s]), gold.get((t, s), ""))
        for t, s in np.ndindex(values.shape)
    ]
    return Drawing(figure, (header, table))
