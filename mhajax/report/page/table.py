"""A table of measures as HTML, each cell with its interval and its baseline, and as numbers for a CSV file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mhajax.report.page.markup import Html, element, join
from mhajax.statistics import Measure

_MARK = "\N{RING OPERATOR}"


class Column(NamedTuple):
    """A column.

    Attributes:
      name: its heading.
      form: how a number is written, as `format` takes it: ".2f", ".0%", ...
      better: on which side of the baseline a measure is better; "" if neither is: then nothing is marked.
    """

    name: str
    form: str = ".2f"
    better: Literal["higher", "lower", ""] = "higher"


def beats_baseline(measure: Measure, better: str = "higher") -> bool | None:
    """Whether the whole interval is better than the baseline; None if there is nothing to compare.

    >>> beats_baseline(Measure(0.9, 0.8, 0.95, 0.5)), beats_baseline(Measure(0.9, 0.4, 0.95, 0.5))
    (True, False)
    """
    low, high, baseline = float(measure.low), float(measure.high), float(measure.baseline)
    if not better or any(map(math.isnan, (float(measure.value), low, high, baseline))):
        return None
    return low > baseline if better == "higher" else high < baseline


def as_html(columns: Sequence[Column], rows: Sequence[Sequence[object]], caption: str, link: Html) -> Html:
    """The table in a box that scrolls sideways where it is too wide, with what the marks mean below it."""
    body, measured, marked = [], False, False
    for row in rows:
        cells = [element("th", str(row[0]), scope="row")]
        for column, value in zip(columns[1:], row[1:], strict=True):
            beats = beats_baseline(value, column.better) if isinstance(value, Measure) else None
            measured |= isinstance(value, Measure)
            marked |= beats is False
            cells.append(_cell(column, value, beats))
        body.append(element("tr", *cells))
    numeric = [any(isinstance(row[place], Measure | float | int) for row in rows) for place in range(1, len(columns))]
    heads = [
        element("th", column.name, scope="col", class_="number" if is_number else None)
        for column, is_number in zip(columns, [False, *numeric], strict=True)
    ]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *body))
    box = element("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)
    legend = " Each value with its 95 % interval, and what its baseline reaches (vs)." if measured else ""
    legend += (
        f" {_MARK} marks what does not beat its baseline: not all of the interval is on the better side of it."
        if marked
        else ""
    )
    return element("figure", box, element("figcaption", caption, element("small", legend), " ", link), class_="table")


def as_numbers(columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of a CSV file; a column with measures becomes four: value, low, high, baseline.

    Raises:
      ValueError: a row has not as many cells as there are columns, or a Measure is not of scalars.
    """
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"page.table: rows[{number}] must have {len(columns)} cells, one for each column, got {len(row)}."
            )
        for column, value in zip(columns, row, strict=True):
            sizes = [getattr(part, "shape", ()) for part in value] if isinstance(value, Measure) else []
            if any(sizes):
                raise ValueError(
                    f"page.table: rows[{number}], {column.name!r} must be a Measure of scalars, got shapes {sizes}; "
                    "take one head of it."
                )
    split = [any(isinstance(row[place], Measure) for row in rows) for place in range(len(columns))]
    header, out = [], []
    for column, several in zip(columns, split, strict=True):
        header += (
            [column.name, *(f"{column.name}, {part}" for part in Measure._fields[1:])] if several else [column.name]
        )
    for row in rows:
        cells: list[object] = []
        for value, several in zip(row, split, strict=True):
            if isinstance(value, Measure):
                cells += [float(part) for part in value]
            else:
                cells += [value, "", "", ""] if several else [value]
        out.append(cells)
    return header, out


def _cell(column: Column, value: object, beats: bool | None) -> Html:
    if isinstance(value, Measure):
        number, low, high, baseline = (_number(float(part), column.form) for part in value)
        if math.isnan(float(value.value)):
            return element("td", number, class_="number")
        interval = None if math.isnan(float(value.low)) else f"{low}\N{EN DASH}{high}"
        against = None if math.isnan(float(value.baseline)) else f"vs {baseline}"
        below = element("small", " ".join(filter(None, (interval, against))))
        if beats is False:
            mark = element("span", _MARK, class_="mark", role="img", aria_label="not better than its baseline:")
            return element("td", mark, " ", number, below, class_="number unproven")
        return element("td", element("strong", number) if beats else number, below, class_="number")
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return element("td", join("" if value is None else value))
    if isinstance(value, int):
        return element("td", f"{value:,}", class_="number")
    return element("td", _number(float(value), column.form), class_="number")  # pyright: ignore[reportArgumentType]


def _number(value: float, form: str) -> str:
    """A dash for NaN; a minus that is one."""
    return "\N{EN DASH}" if math.isnan(value) else format(value, form).replace("-", "\N{MINUS SIGN}")
