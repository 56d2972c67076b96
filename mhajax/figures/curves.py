"""Lines with bands: a loss over the steps of a training, any number over a setting, a metric over heads removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]
Bands = Mapping[str, list[np.ndarray]]


def training_curve(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    ylabel: str,
    spread: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> Drawing:
    """Draws one line a series over the training steps, named at its end.

    A series of at most 50 points, as a validation usually is, shows each of them as a dot.

    Args:
      series: name -> (steps, values), each [P]; the steps increase.
      title: above the axes.
      ylabel: what the values are, with their unit.
      spread: name -> (low, high), each [P]; a band around that series, such as the range over the seeds.

    Returns:
      A Drawing; the table has one row a point, and the columns low and high if there is a spread.

    Raises:
      ValueError: lengths do not fit, a number is not finite, steps do not increase, or a spread has no series.
    """
    return _curve("figures.training_curve", series, spread, title, "step", ylabel)


def curve(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    spread: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> Drawing:
    """Draws one line a series over a number that was set, such as the number of heads, named at its end.

    Args:
      series: name -> (settings, values), each [P]; the settings increase.
      title: above the axes.
      xlabel: what is set.
      ylabel: what the values are, with their unit.
      spread: name -> (low, high), each [P]; a band around that series, such as an interval.

    Returns:
      A Drawing; the table has one row a point: series, what is set, value, and low and high if there is a spread.

    Raises:
      ValueError: lengths do not fit, a number is not finite, settings do not increase, or a spread has no series.
    """
    return _curve("figures.curve", series, spread, title, xlabel, ylabel)


def pruning_curve(
    removed: ArrayLike,
    orders: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    title: str,
    ylabel: str,
) -> Drawing:
    """Draws what is left of a metric when more and more heads are removed, one line an order of removal.

    Args:
      removed: [P], how many heads are removed at each point; increasing, usually from 0.
      orders: name of the order ("least important first", "random") -> (mean, low, high), each [P]; the band from low to
        high is over the seeds.
      title: above the axes.
      ylabel: the metric, with its unit.

    Returns:
      A Drawing; the table has one row a point: order, removed, mean, low, high.

    Raises:
      ValueError: lengths do not fit, a number is not finite, `removed` does not increase, or a low is above its high.

    References:
      Michel, Levy & Neubig 2019, "Are Sixteen Heads Really Better than One?", section 4, figure 3.
    """
    who = "figures.pruning_curve"
    counts = inputs.array(who, "removed", removed, "[P]")
    if (np.diff(counts) <= 0).any():
        raise ValueError(f"{who}: removed must increase, got a count that does not; sort the points.")
    if not orders:
        raise ValueError(f"{who}: orders must have one entry or more, got none; pass {{name: (mean, low, high)}}.")
    lines, bands, rows = {}, {}, []
    for name, (mean, low, high) in orders.items():
        values = inputs.array(who, f"orders[{name!r}] mean", mean, "[P]")
        inputs.same_length(who, f"orders[{name!r}] mean", values, "P", len(counts), "values", "one for each count")
        lines[name] = (counts, values)
        bands[name] = inputs.interval(who, f"orders[{name!r}]", (low, high), values, "its mean", "[P]")
        rows += [
            (name, _whole(count), *map(inputs.number, numbers))
            for count, *numbers in zip(counts, values, *bands[name], strict=True)
        ]
    figure = _draw(lines, bands, title, "heads removed", ylabel)
    return Drawing(figure, (("order", "removed", "mean", "low", "high"), rows))


def _curve(
    who: str,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    spread: Mapping[str, tuple[ArrayLike, ArrayLike]] | None,
    title: str,
    xlabel: str,
    ylabel: str,
) -> Drawing:
    if not series:
        raise ValueError(f"{who}: series must have one entry or more, got none; pass {{name: ({xlabel}, values)}}.")
    spread = spread or {}
    for name in spread:
        if name not in series:
            raise ValueError(f"{who}: spread[{name!r}] must belong to a series, got series {', '.join(series)}.")
    one = "step" if xlabel == "step" else "setting"
    lines, bands = {}, {}
    for name, (steps, values) in series.items():
        lines[name] = (
            inputs.array(who, f"series[{name!r}] {one}s", steps, "[P]"),
            inputs.array(who, f"series[{name!r}]", values, "[P]"),
        )
        count = len(lines[name][0])
        inputs.same_length(who, f"series[{name!r}]", lines[name][1], "P", count, "values", f"one for each {one}")
        if (np.diff(lines[name][0]) <= 0).any():
            raise ValueError(
                f"{who}: series[{name!r}] {one}s must increase, got a {one} that does not; sort and merge them."
            )
        if name in spread:
            for side in spread[name]:
                inputs.same_length(
                    who,
                    f"spread[{name!r}]",
                    np.asarray(side),
                    "P",
                    count,
                    "values",
                    f"one for each {one} of the series",
                )
            bands[name] = inputs.interval(
                who, f"spread[{name!r}]", spread[name], lines[name][1], f"series[{name!r}]", "[P]"
            )

    figure = _draw(lines, bands, title, xlabel, ylabel)
    header, rows = ("series", xlabel, "value"), []
    if bands:
        header += ("low", "high")
    for name, (steps, values) in lines.items():
        for i, (step, value) in enumerate(zip(steps, values, strict=True)):
            sides = tuple(inputs.number(side[i]) for side in bands[name]) if name in bands else ()
            sides = sides or (("", "") if bands else ())
            rows.append((name, _whole(step), inputs.number(value), *sides))
    return Drawing(figure, (header, rows))


def _whole(value: np.floating) -> int | float:
    return int(value) if float(value).is_integer() else inputs.number(value)


def _draw(lines: Lines, bands: Bands, title: str, xlabel: str, ylabel: str) -> Figure:
    """Lines over whole numbers, named at their ends or, if they are many, in a legend."""
    with page.style():
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        left, bottom, inner, tall = 0.85, 0.55, 5.0, 2.9
        named_at_ends = len(lines) <= len(page.COLORS)  # beyond that colours repeat, and only a legend shows the dashes
        names = (0.3 if named_at_ends else 0.7) + page.width(list(lines), 9)
        width = left + max(inner + names, page.head_width(title))
        height = bottom + tall + 0.5
        figure = page.figure(width, height, title, left)
        axes = page.axes(figure, left, bottom, inner, tall)
        for index, (name, (steps, values)) in enumerate(lines.items()):
            color = page.COLORS[index % len(page.COLORS)]
            dash = ("-", "--", ":", "-.")[index // len(page.COLORS) % 4]
            dots = "o" if len(steps) <= 50 else ""
            axes.plot(steps, values, dash, color=color, linewidth=1.4, marker=dots, markersize=3.5, label=name)
            if name in bands:
                low, high = bands[name]
                axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set_xlabel(xlabel, color=page.INK)
        axes.set_ylabel(page.wrapped(ylabel, 9, tall), color=page.INK)
        page.plain(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if len({float(step) for steps, _ in lines.values() for step in steps}) == 1:
            axes.set_xticks([float(next(iter(lines.values()))[0][0])])
        if named_at_ends:
            page.label_ends(axes, {name: float(values[-1]) for name, (_, values) in lines.items()}, gap=0.16 / tall)
        else:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8, labelcolor=page.INK)
    return figure
