"""Pictures from arrays: attention patterns, training curves, tables of heads.

Every function takes arrays and returns a Drawing: the figure, and the numbers it shows as a table, so that no picture
is without its data. `save` writes both, byte for byte the same each time. Layers and heads are counted from 0 in
pictures and tables alike: "layer 1 · head 3" is `weights[1, 3]`.

matplotlib is imported only when something is drawn, and only its object interface is used: no pyplot, no windows.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {
    "font.family": "DejaVu Sans",  # the font that matplotlib brings along, so that every machine draws the same
    "font.size": 9,
    "axes.edgecolor": "0.6",
    "axes.linewidth": 0.6,
    "text.parse_math": False,  # a word may hold a $
    "svg.hashsalt": "mhajax",
}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
_INK, _FAINT = "0.15", "0.45"


class Drawing(NamedTuple):
    """A figure and the numbers in it.

    Attributes:
      figure: a matplotlib Figure.
      table: (header, rows), the content of the CSV file.
    """

    figure: Figure
    table: tuple[tuple[str, ...], list[tuple]]


def save(drawing: Drawing, stem: str | Path) -> list[Path]:
    """Writes `stem`.svg, `stem`.png and `stem`.csv, and returns their paths.

    The same drawing gives the same bytes: no dates, no versions, no random ids.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    svg, png, table = (stem.with_name(f"{stem.name}.{ending}") for ending in ("svg", "png", "csv"))
    with _style():
        drawing.figure.savefig(svg, dpi=200, metadata={"Date": None, "Creator": None})
        drawing.figure.savefig(png, dpi=200, metadata={"Software": None})
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(drawing.table[0])
        writer.writerows(drawing.table[1])
    return [svg, png, table]


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
    values = _array(who, "weights", weights, "[L, N, T, S]")
    num_layers, num_heads, num_queries, num_keys = values.shape
    _same_length(who, "row_labels", row_labels, "T", num_queries, "words", "the queries are weights.shape[2]")
    _same_length(who, "column_labels", column_labels, "S", num_keys, "words", "the keys are weights.shape[3]")
    if layer_names is not None:
        _same_length(who, "layer_names", layer_names, "L", num_layers, "names", "the layers are weights.shape[0]")
    if values.min() < 0 or values.max() > 1.01:  # bfloat16 rounds a little above 1
        raise ValueError(
            f"{who}: weights must be between 0 and 1, got {values.min():.4g} to {values.max():.4g}; "
            "pass the attention after the softmax, not the logits."
        )
    rows, columns = [str(word) for word in row_labels], [str(word) for word in column_labels]
    layers = [f"layer {layer}" for layer in range(num_layers)] if layer_names is None else [*map(str, layer_names)]

    # A cell is as large as a page allows; words thin out only where they would be too small to read.
    across, down = num_heads * num_keys, num_layers * num_queries
    cell = max(min(0.30, 9 / across, 8 / down), min(0.125, 16 / across, 12 / down))
    size = min(9.0, max(5.0, 0.7 * 72 * cell))
    step = math.ceil(1.25 * size / 72 / cell)
    with _style():
        names = [[f"{layer} · head {head}" for head in range(num_heads)] for layer in layers]
        left = 0.44 + _width(rows[::step], size)
        bottom = 0.46 + _width(columns[::step], size)
        pitch = max(num_keys * cell, _width(sum(names, []), 8)) + 0.16, num_queries * cell + 0.30
        grid = num_heads * pitch[0], num_layers * pitch[1]
        width = max(left + grid[0] + 0.85, left + _width([title], 11) + 0.15)
        height = bottom + max(grid[1], 1.2) + 0.36
        figure = _figure(width, height, title, left)
        top = height - 0.36
        image = None
        for layer, head in np.ndindex(num_layers, num_heads):
            x, y = left + head * pitch[0], top - (layer + 1) * pitch[1]
            axes = _axes(figure, x, y, num_keys * cell, num_queries * cell)
            image = axes.imshow(
                values[layer, head], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            axes.set_title(names[layer][head], fontsize=8, color=_INK, loc="left", pad=3)
            axes.tick_params(length=0, pad=3, labelsize=size, labelcolor=_INK)
            axes.set_yticks(range(0, num_queries, step), rows[::step] if head == 0 else [])
            last = layer == num_layers - 1
            axes.set_xticks(range(0, num_keys, step), columns[::step] if last else [], rotation=90)
        base = top - grid[1]
        figure.text(
            0.18 / width, (base + grid[1] / 2) / height, "query", rotation=90, color=_FAINT, ha="center", va="center"
        )
        figure.text(
            (left + grid[0] / 2 - 0.08) / width,
            (base - bottom + 0.18) / height,
            "key",
            color=_FAINT,
            ha="center",
            va="center",
        )
        _color_bar(figure, image, left + grid[0] + 0.05, top - 0.30, grid[1] - 0.30, "attention weight", [0, 0.5, 1])
    table = [
        (layers[layer] if layer_names else layer, head, t, rows[t], s, columns[s], _number(values[layer, head, t, s]))
        for layer, head, t, s in np.ndindex(values.shape)
    ]
    return Drawing(figure, (("layer", "head", "query_index", "query_word", "key_index", "key_word", "weight"), table))


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
    who = "figures.training_curve"
    if not series:
        raise ValueError(f"{who}: series must have one entry or more, got none; pass {{name: (steps, values)}}.")
    spread = spread or {}
    for name in spread:
        if name not in series:
            raise ValueError(f"{who}: spread[{name!r}] must belong to a series, got series {', '.join(series)}.")
    lines, bands = {}, {}
    for name, (steps, values) in series.items():
        lines[name] = (
            _array(who, f"series[{name!r}] steps", steps, "[P]"),
            _array(who, f"series[{name!r}]", values, "[P]"),
        )
        count = len(lines[name][0])
        _same_length(who, f"series[{name!r}]", lines[name][1], "P", count, "values", "one for each step")
        if (np.diff(lines[name][0]) <= 0).any():
            raise ValueError(
                f"{who}: series[{name!r}] steps must increase, got a step that does not; sort and merge them."
            )
        if name in spread:
            bands[name] = tuple(_array(who, f"spread[{name!r}]", side, "[P]") for side in spread[name])
            for side in bands[name]:
                _same_length(who, f"spread[{name!r}]", side, "P", count, "values", "one for each step of the series")

    with _style():
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        left, bottom, inner, tall = 0.85, 0.55, 5.0, 2.9
        named_at_ends = len(lines) <= len(_COLORS)  # beyond that colours repeat, and only a legend shows the dashes
        names = (0.3 if named_at_ends else 0.7) + _width(list(lines), 9)
        width = left + max(inner + names, _width([title], 11) + 0.15)
        height = bottom + tall + 0.5
        figure = _figure(width, height, title, left)
        axes = _axes(figure, left, bottom, inner, tall)
        for index, (name, (steps, values)) in enumerate(lines.items()):
            color = _COLORS[index % len(_COLORS)]
            dash = ("-", "--", ":", "-.")[index // len(_COLORS) % 4]
            dots = "o" if len(steps) <= 50 else ""
            axes.plot(steps, values, dash, color=color, linewidth=1.4, marker=dots, markersize=3.5, label=name)
            if name in bands:
                axes.fill_between(steps, *bands[name], color=color, alpha=0.18, linewidth=0)
        axes.set_xlabel("step", color=_INK)
        axes.set_ylabel(ylabel, color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if len({float(step) for steps, _ in lines.values() for step in steps}) == 1:
            axes.set_xticks([float(next(iter(lines.values()))[0][0])])
        if named_at_ends:
            _label_ends(axes, {name: float(values[-1]) for name, (_, values) in lines.items()}, gap=0.16 / tall)
        else:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8, labelcolor=_INK)
    header, rows = ("series", "step", "value"), []
    if bands:
        header += ("low", "high")
    for name, (steps, values) in lines.items():
        for i, (step, value) in enumerate(zip(steps, values, strict=True)):
            sides = tuple(_number(side[i]) for side in bands[name]) if name in bands else ("", "") if bands else ()
            count = int(step) if float(step).is_integer() else _number(step)
            rows.append((name, count, _number(value), *sides))
    return Drawing(figure, (header, rows))


def head_table(values: ArrayLike, *, title: str, label: str, baseline: float | None = None) -> Drawing:
    """Draws one number a head, layers down and heads across, as colour and in figures.

    Args:
      values: [L, N].
      title: above the table.
      label: what the numbers are, with their unit.
      baseline: the value that means "no effect"; it gets the neutral colour, and both sides of it their own.

    Returns:
      A Drawing; the table has one row a head.

    Raises:
      ValueError: `values` is not [L, N], or a number is not finite.
    """
    who = "figures.head_table"
    numbers = _array(who, "values", values, "[L, N]")
    low, high = float(numbers.min()), float(numbers.max())
    if baseline is not None:
        if not math.isfinite(baseline):
            raise ValueError(f"{who}: baseline must be a finite number, got {baseline}; leave it out if there is none.")
        reach = max(high - baseline, baseline - low) or 1.0
        low, high = baseline - reach, baseline + reach
    elif low == high:
        low, high = low - 0.5, high + 0.5
    num_layers, num_heads = numbers.shape
    texts = _same_decimals(numbers, high - low if baseline is None else high - baseline)

    with _style():
        cell = max(0.46, 0.16 + _width(list(texts.values()), 8)), 0.32
        left, bottom = 0.75, 0.25
        grid = num_heads * cell[0], num_layers * cell[1]
        width = left + max(grid[0] + 1.1, _width([title], 11) + 0.15)
        height = bottom + max(grid[1], 1.2) + 0.85
        figure = _figure(width, height, title, left)
        top = height - 0.85
        axes = _axes(figure, left, top - grid[1], *grid)
        colors = "Blues" if baseline is None else "RdBu_r"
        image = axes.imshow(numbers, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        for layer, head in np.ndindex(numbers.shape):
            red, green, blue, _ = image.cmap(image.norm(numbers[layer, head]))
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else _INK
            axes.text(head, layer, texts[layer, head], fontsize=8, color=ink, ha="center", va="center")
        axes.set_xticks(range(num_heads))
        axes.set_yticks(range(num_layers))
        axes.tick_params(length=0, labelcolor=_INK, top=True, bottom=False, labeltop=True, labelbottom=False)
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("head", color=_FAINT)
        axes.set_ylabel("layer", color=_FAINT)
        ticks = None if baseline is None else [low, baseline, high]
        _color_bar(figure, image, left + grid[0] + 0.15, top, max(grid[1], 1.2), label, ticks)
    table = [(layer, head, _number(numbers[layer, head])) for layer, head in np.ndindex(numbers.shape)]
    return Drawing(figure, (("layer", "head", "value"), table))


def _style() -> Any:
    """The look of all figures, for a `with`: matplotlib's defaults, not the user's, and back again afterwards."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError('figures: drawing needs matplotlib; pip install "mhajax[experiments]"') from error
    return matplotlib.style.context(["default", _STYLE])


def _figure(width: float, height: float, title: str, left: float) -> Figure:
    """An empty figure of a size in inches. Layouts are reckoned in inches here, so that nothing moves or overlaps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.text(left / width, 1 - 0.14 / height, title, fontsize=11, color=_INK, ha="left", va="top")
    return figure


def _axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes whose lower left corner and size are given in inches."""
    across, down = figure.get_size_inches()
    return figure.add_axes((x / across, y / down, width / across, height / down))


def _width(texts: Sequence[str], size: float) -> float:
    """The width of the widest text, in inches, for a font size in points."""
    from matplotlib.textpath import TextPath

    return max(TextPath((0, 0), text, size=size).get_extents().width for text in texts) / 72 if any(texts) else 0.0


def _color_bar(figure: Figure, image: Any, x: float, top: float, height: float, label: str, ticks: list | None) -> None:
    height = min(height, 2.0)
    bar = figure.colorbar(image, cax=_axes(figure, x, top - height, 0.10, height), ticks=ticks)
    bar.outline.set_visible(False)  # type: ignore
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=_INK)
    bar.set_label(label, size=8, color=_FAINT)


def _label_ends(axes: Axes, ends: Mapping[str, float], gap: float) -> None:
    """Names the lines at their right ends, moved apart to at least `gap` (in axes heights)."""
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda name: ends[name])
    heights = [(ends[name] - low) / (high - low) for name in names]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
    for name, height in zip(names, heights, strict=True):
        axes.text(1.02, height, name, color=colors[name], transform=axes.transAxes, va="center")


def _array(who: str, name: str, value: ArrayLike, shape: str) -> np.ndarray:
    """Checks the number of axes, that none is empty and that all numbers are finite."""
    array = np.asarray(value)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64 if array.dtype.kind in "iub" else np.float32)  # bfloat16 is not NumPy's own
    if array.ndim != shape.count(",") + 1 or array.size == 0:
        raise ValueError(f"{who}: {name} must be {shape} with no empty axis, got {array.shape}.")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{who}: {name} must be finite, got {array[where]} at {where}; find out where it comes from.")
    return array


def _same_length(who: str, name: str, items: Any, letter: str, length: int, noun: str, hint: str) -> None:
    if len(items) != length:
        raise ValueError(f"{who}: {name} must have {letter}={length} {noun}, got {len(items)}; {hint}.")


def _number(value: Any) -> float:
    """The number that prints shortest and still reads back as `value` in its own precision: 0.1, not 0.10000000149."""
    return float(str(value))


def _same_decimals(values: np.ndarray, span: float) -> dict[tuple[int, ...], str]:
    """Writes numbers with as many decimals as it takes to tell them apart: index -> text."""
    decimals = max(0, 2 - math.ceil(math.log10(span)))
    form = f".{decimals}f" if decimals <= 4 and np.abs(values).max() < 1e5 else ".1e"
    texts = {index: format(float(value), form) for index, value in np.ndenumerate(values)}
    return {
        i: text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}") for i, text in texts.items()
    }
