"""What two heads do together that neither does alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import grid, inputs, page
from mhajax.figures.drawing import Drawing


def interaction_matrix(values: ArrayLike, num_layers: int, *, title: str, label: str) -> Drawing:
    """Draws one number for each pair of heads, with its own colour on each side of 0.

    The colours reach as far as the largest number off the diagonal; a diagonal beyond it (of a hessian: each head with
    itself) has the last colour. Numbers are written in the cells where there is room.

    Args:
      values: [M, M] of the M = L·N heads; head n of layer l is at l·N + n.
      num_layers: L.
      title: above the matrix.
      label: what the numbers are, with their unit.

    Returns:
      A Drawing; the table has one row a pair: layer, head, other_layer, other_head, value.

    Raises:
      ValueError: `values` is not square, a number is not finite, or L does not divide M.
    """
    who = "figures.interaction_matrix"
    matrix, num_heads = inputs.between_heads(who, "values", values, num_layers)
    count = len(matrix)
    off = matrix[~np.eye(count, dtype=bool)] if count > 1 else matrix
    reach = float(np.abs(off).max()) or float(np.abs(matrix).max()) or 1.0
    texts = inputs.same_decimals(matrix, 2 * reach)

    with page.style():
        cell = grid.cell_size(count, 6.6)
        side = cell * count
        left, head, bottom = 0.2 + grid.LABELS, 0.45 + grid.labels_above(num_layers, num_heads, cell), 0.2
        width = left + max(side + 1.25, page.head_width(title))
        height = head + max(side, 1.2) + bottom
        figure = page.figure(width, height, title, left)
        axes = page.axes(figure, left, height - head - side, side, side)
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        if page.width(list(texts.values()), 7) < cell - 0.05:
            for where, text in texts.items():
                ink = page.ink_on(image, float(matrix[where]))
                axes.text(where[1], where[0], text, fontsize=7, color=ink, ha="center", va="center")
        grid.name_heads(axes, num_layers, num_heads, cell)
        page.color_bar(figure, image, left + side + 0.15, height - head, max(side, 1.2), label, [-reach, 0, reach])
    header = ("layer", "head", "other_layer", "other_head", "value")
    rows = [
        (*divmod(i, num_heads), *divmod(j, num_heads), inputs.number(matrix[i, j])) for i, j in np.ndindex(matrix.shape)
    ]
    return Drawing(figure, (header, rows))
