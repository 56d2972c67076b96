"""Heads of two trainings, before and after they are put in the same order."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import grid, inputs, page
from mhajax.figures.drawing import Drawing


def matched_heads(
    similarity: ArrayLike,
    order: ArrayLike,
    num_layers: int,
    *,
    title: str,
    label: str = "similarity",
    names: tuple[str, str] = ("first", "second"),
) -> Drawing:
    """Draws the similarities of the heads of two models twice, as they come and in the order of a matching.

    The diagonal is framed, or runs between two lines where cells are small: after the matching it holds the pairs.

    Args:
      similarity: [M, M], head i of the first model (rows) with head j of the second (columns); M = L·N, head n of layer
        l is at l·N + n.
      order: [M] integers; head `order[i]` of the second model belongs to head i of the first.
      num_layers: L.
      title: above both.
      label: what the numbers are.
      names: of the two models.

    Returns:
      A Drawing; the table has one row a pair of heads: layer, head, other_layer, other_head, value, matched (1 or 0).

    Raises:
      ValueError: the matrix is not square or not finite, L does not divide M, or the order is not a permutation.
    """
    who = "figures.matched_heads"
    matrix, num_heads = inputs.between_heads(who, "similarity", similarity, num_layers)
    count = len(matrix)
    pairs = np.asarray(order)
    if pairs.shape != (count,) or pairs.dtype.kind not in "iu" or sorted(pairs) != list(range(count)):
        raise ValueError(
            f"{who}: order must hold each of the heads 0 to {count - 1} once, got {pairs.dtype}{pairs.shape} "
            f"{pairs.ravel()[:8].tolist()}{'…' if pairs.size > 8 else ''}; "
            "it is the column that belongs to each row."
        )
    low, high = float(matrix.min()), float(matrix.max())
    if low < 0:
        colors, low, high = "RdBu_r", -max(high, -low), max(high, -low)
    else:
        colors, low, high = "Blues", 0.0, high or 1.0

    with page.style():
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        left, gap, bottom = 0.35 + grid.LABELS, 0.2 + grid.LABELS, 0.25
        cell = min(0.30, max(0.02, (page.WIDE - left - gap - 1.1) / 2 / count))
        side = max(cell * count, 1.5)
        cell = side / count
        head = 0.92 + grid.labels_above(num_layers, num_heads, cell)
        width = left + max(2 * side + gap + 1.1, page.head_width(title))
        height = head + side + bottom
        figure = page.figure(width, height, title, left)
        image = None
        for panel, (state, columns) in enumerate((("before", np.arange(count)), ("after", pairs))):
            shown = matrix[:, columns]
            x = left + panel * (side + gap)
            axes = page.axes(figure, x, bottom, side, side)
            image = axes.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            if grid.heads_named(cell):
                frames = [Rectangle((i - 0.5, i - 0.5), 1, 1) for i in range(count)]
                axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=page.MARK, linewidth=1.4))
            else:  # frames would hide what they frame
                axes.autoscale(False)
                for beside in (-1.6, 1.6):
                    axes.axline((0, beside), slope=1, color=page.MARK, linewidth=0.7)
            grid.name_heads(axes, num_layers, num_heads, cell)
            if panel and grid.heads_named(cell):
                axes.set_xticks(range(count), ["{}·{}".format(*divmod(int(j), num_heads)) for j in pairs])
            elif panel:
                axes.set_xticks([])  # the columns no longer stand by layers
            text = f"{state}: diagonal {np.diag(shown).mean():.2f}"
            figure.text(x / width, 1 - 0.42 / height, text, fontsize=9, color=page.INK, ha="left", va="top")
            page.faint(figure, x + side / 2, height - 0.76, page.wrapped(f"heads of {names[1]}", 8, side), fontsize=8)
        page.faint(figure, 0.2, bottom + side / 2, f"heads of {names[0]}", rotation=90, fontsize=8)
        page.color_bar(figure, image, left + 2 * side + gap + 0.15, bottom + side, side, label, None)
    header = ("layer", "head", "other_layer", "other_head", "value", "matched")
    rows = [
        (*divmod(i, num_heads), *divmod(j, num_heads), inputs.number(matrix[i, j]), int(pairs[i] == j))
        for i, j in np.ndindex(matrix.shape)
    ]
    return Drawing(figure, (header, rows))
