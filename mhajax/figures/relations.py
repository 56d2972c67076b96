"""How well relations are found, beside what the baseline finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing


def relation_accuracy(
    relations: Mapping[str, Sequence[ArrayLike]],
    *,
    title: str,
    label: str,
    baseline_name: str = "baseline",
    second: Mapping[str, ArrayLike] | None = None,
    second_name: str = "second baseline",
) -> Drawing:
    """Draws a value with its interval for each relation, and its baseline as a mark; the highest value on top.

    Args:
      relations: name -> (value, low, high, baseline), four numbers, as in a `statistics.Measure` of one head.
      title: above the dots.
      label: what the numbers are, with their unit.
      baseline_name: what the mark is ("best fixed offset").
      second: name -> another baseline, of every relation, drawn as a ring ("best random head").
      second_name: what the ring is.

    Returns:
      A Drawing; the table has one row a relation, in the order of the picture: relation, value, low, high, baseline,
      and second if there is one.

    Raises:
      ValueError: there is no relation, a number is not finite, there are not four, the interval is upside down, or a
        relation has no second baseline where others have.
    """
    who = "figures.relation_accuracy"
    if not relations:
        raise ValueError(
            f"{who}: relations must have one entry or more, got none; pass {{name: (value, low, high, baseline)}}."
        )
    rows = []
    for name, numbers in relations.items():
        if len(numbers) != 4:
            raise ValueError(f"{who}: relations[{name!r}] must be (value, low, high, baseline), got {len(numbers)}.")
        parts = zip(("value", "low", "high", "baseline"), numbers, strict=True)
        value, low, high, baseline = (
            inputs.array(who, f"relations[{name!r}] {part}", number, "a number") for part, number in parts
        )
        inputs.interval(who, f"relations[{name!r}]", (low, high), value, "its value", "a number")
        rows.append((name, *map(inputs.number, (value, low, high, baseline))))
        if second is not None:
            if name not in second:
                raise ValueError(f"{who}: second must have a number for every relation, got none for {name!r}.")
            ring = inputs.array(who, f"second[{name!r}]", second[name], "a number")
            rows[-1] += (inputs.number(ring),)
    rows.sort(key=lambda row: -row[1])

    note = f"dot: value, with its 95 % interval · upright mark: {baseline_name}"
    note += "" if second is None else f" · ring: {second_name}"
    lowest, highest = min(min(row[1:]) for row in rows), max(max(row[1:]) for row in rows)
    if 0 <= lowest and highest <= 1:
        lowest, highest = 0.0, 1.0
    reach = (highest - lowest) or 1.0
    with page.style():
        sides = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for _, value, low, high, *_ in rows]
        inner, pitch, head, foot = 4.2, 0.27, 0.68, 0.5
        left = 0.35 + page.width([row[0] for row in rows], 9)
        beside = page.width(sides, 8) + 0.15
        tall = max(pitch * len(rows), 0.5)
        width = max(left + inner + beside + 0.15, 0.2 + page.head_width(title, note))
        height = head + tall + foot
        figure = page.figure(width, height, title, 0.2, note)
        axes = page.axes(figure, left, foot, inner, tall)
        for place, (_, value, low, high, baseline, *rings) in enumerate(rows):
            above = value > max([baseline, *rings])
            color = page.COLORS[0] if above else page.FAINT
            axes.plot([low, high], [place, place], "-", color=color, linewidth=1.6, solid_capstyle="butt")
            axes.plot([value], [place], "o", color=color, markersize=6, mew=0)
            axes.plot([baseline], [place], "|", color=page.MARK, markersize=12, mew=2.0)
            axes.plot(rings, [place] * len(rings), "o", color=page.FAINT, markersize=5, mew=1.1, fillstyle="none")
            axes.text(
                highest + 0.06 * reach, place, sides[place], fontsize=8, color=page.INK, va="center", clip_on=False
            )
        axes.set_xlim(lowest - 0.03 * reach, highest + 0.03 * reach)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_xlabel(label, color=page.INK)
        page.plain(axes, grid="x")
        axes.spines["left"].set_visible(False)
    header = ("relation", "value", "low", "high", "baseline") + (() if second is None else ("second",))
    return Drawing(figure, (header, rows))
