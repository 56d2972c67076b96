"""Two columns of words, and lines from each word to those that it attends to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing

LEAST = 0.02  # weights below are not drawn: they would be invisible, and files are large enough


def token_lines(
    weights: ArrayLike,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    head_names: Sequence[str] | None = None,
) -> Drawing:
    """Draws attention as lines from the queries on the left to the keys on the right, one panel a head.

    A line is the wider and the darker the larger its weight; weights below 0.02 are left out of the picture, but not of
    the table.

    Args:
      weights: [N, T, S], attention after the softmax, of the heads to be shown.
      row_labels: the T query words.
      column_labels: the S key words.
      title: above the panels.
      head_names: N names; "head 0", "head 1", ... if not given.

    Returns:
      A Drawing; the table has one row a weight: head, query index and word, key index and word, weight.

    Raises:
      ValueError: shapes and labels do not fit, or a weight is not finite or not between 0 and 1.

    References:
      Vig 2019, "A Multiscale Visualization of Attention in the Transformer Model", section 3.1 (attention-head view).
    """
    who = "figures.token_lines"
    values = inputs.attention(who, "weights", weights, "[N, T, S]")
    num_heads, num_queries, num_keys = values.shape
    inputs.same_length(who, "row_labels", row_labels, "T", num_queries, "words", "the queries are weights.shape[1]")
    inputs.same_length(who, "column_labels", column_labels, "S", num_keys, "words", "the keys are weights.shape[2]")
    if head_names is not None:
        inputs.same_length(who, "head_names", head_names, "N", num_heads, "names", "the heads are weights.shape[0]")
    rows, columns = [str(word) for word in row_labels], [str(word) for word in column_labels]
    names = [f"head {head}" for head in range(num_heads)] if head_names is None else [*map(str, head_names)]

    with page.style():
        from matplotlib.collections import LineCollection

        side, pitch, between = 0.2, 0.19, 1.15
        words = page.width(rows, 8), page.width(columns, 8)
        panel = max(words[0] + between + words[1] + 0.12, page.width(names, 9)) + 0.3
        across = max(1, min(num_heads, int((page.WIDE - side) / panel)))
        down = -(-num_heads // across)
        tall = pitch * max(num_queries, num_keys)
        head, step = 0.42, tall + 0.55
        width = side + max(across * panel, page.head_width(title))
        height = head + down * step + 0.05
        figure = page.figure(width, height, title, side)
        for index in range(num_heads):
            row, column = divmod(index, across)
            x = side + column * panel + words[0] + 0.06
            axes = page.axes(figure, x, height - head - row * step - 0.4 - tall, between, tall)
            axes.set_xlim(0, 1)
            axes.set_ylim(max(num_queries, num_keys) - 0.5, -0.5)
            axes.axis("off")
            # Strong lines lie on top.
            drawn = sorted((w, t, s) for (t, s), w in np.ndenumerate(values[index]) if w >= LEAST)
            strength = np.array([min(float(w), 1.0) for w, _, _ in drawn])
            color = page.COLORS[0]
            axes.add_collection(
                LineCollection(
                    [[(0.02, t), (0.98, s)] for _, t, s in drawn],
                    colors=color,
                    linewidths=0.4 + 2.6 * strength,
                    alpha=0.12 + 0.88 * strength if drawn else None,
                    capstyle="round",
                )
            )
            for words_of, place, where in ((rows, -0.05, "right"), (columns, 1.05, "left")):
                for line, word in enumerate(words_of):
                    axes.text(place, line, word, fontsize=8, color=page.INK, ha=where, va="center")
            above = -0.5 - 0.24 / pitch
            axes.text(0.5, above, names[index], fontsize=9, color=page.INK, ha="center", va="center")
            axes.text(-0.05, -0.5 - 0.06 / pitch, "query", fontsize=7, color=page.FAINT, ha="right", va="center")
            axes.text(1.05, -0.5 - 0.06 / pitch, "key", fontsize=7, color=page.FAINT, ha="left", va="center")
    header = ("head", "query_index", "query_word", "key_index", "key_word", "weight")
    table = [
        (names[n] if head_names else n, t, rows[t], s, columns[s], inputs.number(values[n, t, s]))
        for n, t, s in np.ndindex(values.shape)
    ]
    return Drawing(figure, (header, table))
