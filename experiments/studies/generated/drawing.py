"""The figure of a study of a generated task: a panel for each case, a row for each arm, and what theory says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from experiments.studies import paired
from mhajax.figures import Drawing, page

DASHES = ("-", (0, (3, 2)), ":", "-.")
PITCH, HEAD, FOOT = 0.27, 0.86, 0.52  # inches: of a row, above and below the panels
ROOM = 4.9  # for all panels of a row of them; few panels are as wide as WIDEST
WIDEST, LEAST, GAP = 3.2, 2.1, 0.22


class Panel(NamedTuple):
    """One case.

    Attributes:
      name: above the panel.
      rows: arm → number of each seed.
      lines: name → where an upright line stands; every panel has the same names.
    """

    name: str
    rows: Mapping[str, ArrayLike]
    lines: Mapping[str, float]


def draw(panels: Sequence[Panel], *, title: str, label: str, faint: set[str]) -> Drawing:
    """Draws the panels, two to a row.

    Args:
      panels: one or more, with the same arms and lines.
      title: above all.
      label: what the numbers are.
      faint: arms that are drawn faint.

    Returns:
      A Drawing; the table has a row for each seed: case, arm, seed, value; and for each line.
    """
    names = list(panels[0].rows)
    low, high = _range(panels)
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    note = "ring: a seed · bar: mean and its 95 % interval"
    note += "".join(f" · {_DASH_WORDS[i % 4]}: {name}" for i, name in enumerate(panels[0].lines))
    with page.style():
        left = 0.3 + page.width(names, 9)
        inner = min(max((ROOM - GAP * (across - 1)) / across, LEAST), WIDEST)
        tall = PITCH * len(names)
        width = max(left + across * inner + GAP * across, 0.2 + page.head_width(title, note))
        height = HEAD + down * tall + (down - 1) * 0.42 + FOOT
        figure = page.figure(width, height, title, 0.2, note)
        for number, panel in enumerate(panels):
            row, column = divmod(number, across)
            bottom = height - HEAD - (row + 1) * tall - row * 0.42
            axes = page.axes(figure, left + column * (inner + GAP), bottom, inner, tall)
            _panel(axes, panel, faint, (low, high))
            axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
            if number + across >= len(panels):
                axes.set_xlabel(page.wrapped(label, 9, inner), color=page.INK)
            else:
                axes.set_xticklabels([])
    table = [
        (panel.name, name, seed, float(value))
        for panel in panels
        for name, values in panel.rows.items()
        for seed, value in enumerate(np.asarray(values, float))
    ]
    table += [(panel.name, name, "", value) for panel in panels for name, value in panel.lines.items()]
    return Drawing(figure, (("case", "arm", "seed", "value"), table))


_DASH_WORDS = ("line", "dashed", "dotted", "dash-dotted")


def _range(panels: Sequence[Panel]) -> tuple[float, float]:
    numbers = np.concatenate([np.ravel(np.asarray(one, float)) for panel in panels for one in
                              (*panel.rows.values(), *panel.lines.values())])  # fmt: skip
    low, high = float(numbers.min()), float(numbers.max())
    reach = (high - low) or 1.0
    found = [paired.over_seeds(one, 0.0) for panel in panels for one in panel.rows.values()]
    # intervals too, unless few seeds make them so long that nothing else could be seen
    low = max(min([low, *(float(one.low) for one in found)]), low - reach / 2)
    high = min(max([high, *(float(one.high) for one in found)]), high + reach / 2)
    return low - 0.04 * reach, high + 0.04 * reach


def _panel(axes: Any, panel: Panel, faint: set[str], limits: tuple[float, float]) -> None:
    for number, value in enumerate(panel.lines.values()):
        axes.axvline(value, color=page.MARK, linewidth=1.2, linestyle=DASHES[number % len(DASHES)])
    for place, (name, values) in enumerate(panel.rows.items()):
        found = paired.over_seeds(values, 0.0)
        color = page.FAINT if name in faint else page.COLORS[0]
        axes.plot([float(found.low), float(found.high)], [place, place], "-", color=color, linewidth=1.6)
        axes.plot(values, [place] * len(np.asarray(values)), "o", color=color, markersize=4, mew=0.8, fillstyle="none")
        axes.plot([float(found.value)], [place], "|", color=color, markersize=10, mew=2)
    axes.set_xlim(*limits)
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_title(panel.name, fontsize=9, color=page.INK, loc="left", pad=4)
    page.plain(axes, grid="x")
    axes.spines["left"].set_visible(False)
