"""One number a head, layers down and heads across."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing


def head_table(
    values: ArrayLike,
    *,
    title: str,
    label: str,
    baseline: float | None = None,
    words: Sequence[Sequence[str]] | None = None,
    interval: tuple[ArrayLike, ArrayLike] | None = None,
) -> Drawing:
    """Draws one number a head, layers down and heads across, as colour and in figures.

    Args:
      values: [L, N].
      title: above the table.
      label: what the numbers are, with their unit.
      baseline: the value that means "no effect"; it gets the neutral colour, and both sides of it their own.
      words: `[L][N]`, what is written above each number: the role of the head ("previous", "subject"), or "".
      interval: (low, high), each [L, N], written small below each number.

    Returns:
      A Drawing; the table has one row a head, with the columns low and high if there is an interval, and word if there
      are words.

    Raises:
      ValueError: `values` is not [L, N], a number is not finite, or words or intervals are not for these heads.
    """
    who = "figures.head_table"
    numbers = inputs.array(who, "values", values, "[L, N]")
    num_layers, num_heads = numbers.shape
    sides = [] if interval is None else inputs.interval(who, "interval", interval, numbers, "values", "[L, N]")
    if words is not None:
        inputs.same_length(who, "words", words, "L", num_layers, "rows", "one for each layer of values")
        for layer, row in enumerate(words):
            inputs.same_length(who, f"words[{layer}]", row, "N", num_heads, "words", 'one for each head, "" for none')
    low, high = float(numbers.min()), float(numbers.max())
    if baseline is not None:
        if not math.isfinite(baseline):
            raise ValueError(f"{who}: baseline must be a finite number, got {baseline}; leave it out if there is none.")
        reach = max(high - baseline, baseline - low) or 1.0
        low, high = baseline - reach, baseline + reach
    elif low == high:
        low, high = low - 0.5, high + 0.5
    span = high - low if baseline is None else high - baseline
    texts = inputs.same_decimals(numbers, span)
    small = {}
    if sides:
        ends = [inputs.same_decimals(side, span) for side in sides]
        # "0.12 to 0.34" takes too much room: ".12 to .34".
        small = {where: re.sub(r"\b0\.", ".", f"{ends[0][where]} to {ends[1][where]}") for where in texts}
    roles = {} if words is None else {where: str(words[where[0]][where[1]]) for where in texts}

    with page.style():
        left, bottom, margin = 0.75, 0.25, 1.1
        # Words shrink, down to 6 points, where the table would be wider than a page.
        room = (page.WIDE - left - margin) / num_heads - 0.08
        size = min(8.0, max(6.0, 8.0 * room / max(page.width(list(roles.values()), 8), 0.01)))
        widest = page.width(list(texts.values()), 8), page.width(list(small.values()), 6), 0.0
        wordy = page.width(list(roles.values()), size)
        cell = (
            max(0.46, widest[0] + 0.16, widest[1] + 0.08, wordy + 0.08),
            0.32 + 0.14 * bool(roles) + 0.11 * bool(small),
        )
        grid = num_heads * cell[0], num_layers * cell[1]
        width = left + max(grid[0] + margin, page.head_width(title))
        height = bottom + max(grid[1], 1.2) + 0.85
        figure = page.figure(width, height, title, left)
        top = height - 0.85
        axes = page.axes(figure, left, top - grid[1], *grid)
        colors = "Blues" if baseline is None else "RdBu_r"
        image = axes.imshow(numbers, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        rise = (0.07 * bool(roles) - 0.055 * bool(small)) / cell[1]  # of the number above the middle, in cells
        for where in np.ndindex(numbers.shape):
            layer, head = where
            style: dict[str, Any] = {"color": page.ink_on(image, float(numbers[where])), "ha": "center", "va": "center"}
            axes.text(head, layer + rise, texts[where], fontsize=8, **style)
            if roles.get(where):
                axes.text(head, layer + rise - 0.15 / cell[1], roles[where], fontsize=size, **style)
            if small:
                axes.text(head, layer + rise + 0.13 / cell[1], small[where], fontsize=6, **style)
        if roles or small:  # what is written belongs to one cell
            axes.set_xticks(np.arange(1, num_heads) - 0.5, minor=True)
            axes.set_yticks(np.arange(1, num_layers) - 0.5, minor=True)
            axes.grid(which="minor", color="white", linewidth=1.5)
            axes.tick_params(which="minor", length=0)
        axes.set_xticks(range(num_heads))
        axes.set_yticks(range(num_layers))
        axes.tick_params(length=0, labelcolor=page.INK, top=True, bottom=False, labeltop=True, labelbottom=False)
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("head", color=page.FAINT)
        axes.set_ylabel("layer", color=page.FAINT)
        ticks = None if baseline is None else [low, baseline, high]
        page.color_bar(figure, image, left + grid[0] + 0.15, top, max(grid[1], 1.2), label, ticks)
    header = ("layer", "head", "value") + (("low", "high") if sides else ()) + (("word",) if roles else ())
    table = [
        (
            *where,
            inputs.number(numbers[where]),
            *(inputs.number(side[where]) for side in sides),
            *([roles[where]] if roles else []),
        )
        for where in np.ndindex(numbers.shape)
    ]
    return Drawing(figure, (header, table))
