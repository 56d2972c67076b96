"""How heads change with depth: a dot a head, a bar for the mean of each layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing


def by_layer(
    measures: Mapping[str, ArrayLike],
    *,
    title: str,
    baselines: Mapping[str, ArrayLike] | None = None,
    baseline_name: str = "uniform attention",
) -> Drawing:
    """Draws measures of heads over the layers, one panel a measure: mean distance, entropy.

    Within a layer the heads stand from left (head 0) to right.

    Args:
      measures: label of the panel ("mean distance (tokens)") -> values [L, N].
      title: above the panels.
      baselines: label of the panel -> what the baseline has there, [L] or [L, N] (whose mean over the heads is drawn),
        as a dashed bar.
      baseline_name: what the dashed bar is.

    Returns:
      A Drawing; the table has one row a measure and head: measure, layer, head, value, and baseline if there is any.

    Raises:
      ValueError: values are not [L, N], a number is not finite, or a baseline has no measure or other layers.
    """
    who = "figures.by_layer"
    if not measures:
        raise ValueError(f"{who}: measures must have one entry or more, got none; pass {{label: values [L, N]}}.")
    values = {name: inputs.array(who, f"measures[{name!r}]", value, "[L, N]") for name, value in measures.items()}
    expected = {}
    for name, given in (baselines or {}).items():
        if name not in values:
            raise ValueError(f"{who}: baselines[{name!r}] must belong to a measure, got measures {', '.join(values)}.")
        axes_of = "[L]" if np.ndim(given) == 1 else "[L, N]"
        baseline = inputs.array(who, f"baselines[{name!r}]", given, axes_of)
        count = len(values[name])
        inputs.same_length(who, f"baselines[{name!r}]", baseline, "L", count, "numbers", "one for each layer")
        if baseline.ndim == 1:
            baseline = np.broadcast_to(baseline[:, None], values[name].shape)
        inputs.same_shape(who, f"baselines[{name!r}]", baseline, values[name], f"measures[{name!r}]")
        expected[name] = baseline

    note = "dots: heads, from left to right · bar: mean of the layer"
    note += f" · dashed: {baseline_name}" if expected else ""
    with page.style():
        from matplotlib.ticker import MaxNLocator

        left, inner, tall, head, foot = 0.75, 3.55, 2.5, 0.72, 0.5
        across = min(2, len(values))
        down = -(-len(values) // across)
        pitch = left + inner, tall + foot + 0.2
        width = max(across * pitch[0] + 0.15, left + page.head_width(title, note))
        height = head + down * pitch[1] - 0.15
        figure = page.figure(width, height, title, left, note)
        for index, (name, numbers) in enumerate(values.items()):
            row, column = divmod(index, across)
            y = height - head - row * pitch[1] - tall
            axes = page.axes(figure, left + column * pitch[0], y, inner, tall)
            num_layers, num_heads = numbers.shape
            spread = 0.6 * ((np.arange(num_heads) + 0.5) / num_heads - 0.5)
            places = np.arange(num_layers)[:, None] + spread  # [L, N]
            axes.plot(places.ravel(), numbers.ravel(), "o", color=page.COLORS[0], markersize=3.5, alpha=0.65, mew=0)
            # A layer is no point of a curve: its mean is a bar over its own heads, and joins no other layer's.
            ends = np.arange(num_layers) - 0.36, np.arange(num_layers) + 0.36
            axes.hlines(numbers.mean(1), *ends, color=page.COLORS[1], linewidth=2.0)
            if name in expected:
                axes.hlines(expected[name].mean(1), *ends, color=page.COLORS[-1], linewidth=1.1, linestyle="dashed")
            axes.set_xlim(-0.5, num_layers - 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
            axes.set_xlabel("layer", color=page.INK)
            axes.set_ylabel(page.wrapped(name, 9, tall), color=page.INK)
            page.plain(axes)
    header = ("measure", "layer", "head", "value") + (("baseline",) if expected else ())
    rows = []
    for name, numbers in values.items():
        for where in np.ndindex(numbers.shape):
            row = name, *where, inputs.number(numbers[where])
            if expected:
                row += (inputs.number(expected[name][where]) if name in expected else "",)
            rows.append(row)
    return Drawing(figure, (header, rows))
