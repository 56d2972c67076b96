"""The look of all figures, and their layout in inches: no automatic layout that moves or overlaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mhajax.figures import inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
INK, FAINT, MARK = "0.15", "0.45", "#D55E00"
WIDE = 9.3  # inches: 900 pixels of a browser, where 8 points are 11 pixels

_STYLE = {
    "font.family": "DejaVu Sans",  # the font that matplotlib brings along, so that every machine draws the same
    "font.size": 9,
    "axes.edgecolor": "0.6",
    "axes.linewidth": 0.6,
    "text.parse_math": False,  # a word may hold a $
    "svg.hashsalt": "mhajax",
    "pdf.fonttype": 42,  # text that can be searched, and that journals accept
}


def style() -> Any:
    """The look of all figures, for a `with`: matplotlib's defaults, not the user's, and back again afterwards."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError('figures: drawing needs matplotlib; pip install "mhajax[experiments]"') from error
    return matplotlib.style.context(["default", _STYLE])


def figure(width: float, height: float, title: str, left: float, note: str = "") -> Figure:
    """An empty figure of a size in inches, with its title and a faint line below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.text(left / width, 1 - 0.14 / height, title, fontsize=11, color=INK, ha="left", va="top")
    if note:
        figure.text(left / width, 1 - 0.37 / height, note, fontsize=8, color=FAINT, ha="left", va="top")
    return figure


def axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes whose lower left corner and size are given in inches."""
    across, down = figure.get_size_inches()
    return figure.add_axes((x / across, y / down, width / across, height / down))


def faint(figure: Figure, x: float, y: float, text: str, **options: Any) -> None:
    """Faint text, centred on a place given in inches."""
    across, down = figure.get_size_inches()
    figure.text(x / across, y / down, text, color=FAINT, ha="center", va="center", **options)


def width(texts: Sequence[str], size: float) -> float:
    """The width of the widest text, in inches, for a font size in points; a little more, as pixels round up."""
    from matplotlib.textpath import TextPath

    widths = [TextPath((0, 0), text, size=size).get_extents().width for text in {*texts} - {""}]
    return 1.04 * max(widths, default=0.0) / 72


def head_width(title: str, note: str = "") -> float:
    """The room that a title and the line below it need, in inches."""
    return max(width([title], 11), width([note], 8)) + 0.15


def wrapped(text: str, size: float, room: float) -> str:
    """The text in lines that are at most `room` inches wide, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        if lines and width([f"{lines[-1]} {word}"], size) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def ink_on(image: Any, value: float) -> str:
    """The colour in which text can be read on the colour that an image gives to `value`."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK


def plain(axes: Axes, grid: str | None = "y") -> None:
    """Axes of a plot: two spines, faint lines across, no tick marks."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="0.9", linewidth=0.6)  # type: ignore
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)


def color_bar(
    figure: Figure, image: Any, x: float, top: float, height: float, label: str, ticks: Sequence[float] | None
) -> None:
    """What the colours mean; `x`, `top` and `height` in inches. Reaches 0.95 to the right for two lines of label."""
    height = min(height, 2.0)
    bar = figure.colorbar(image, cax=axes(figure, x, top - height, 0.10, height), ticks=ticks)
    if ticks:
        texts = list(inputs.same_decimals(np.array(ticks), max(ticks) - min(ticks)).values())
        while all("." in text and text.endswith("0") for text in texts):
            texts = [text[:-1].removesuffix(".") for text in texts]
        bar.set_ticklabels(texts)
    bar.outline.set_visible(False)  # type: ignore
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    bar.set_label(wrapped(label, 8, height), size=8, color=FAINT)


def label_ends(axes: Axes, ends: Mapping[str, float], gap: float) -> None:
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
