"""Rows for people, one table a case, and for programs, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.bench.case import OURS, Row

LEGEND = (
    "ms: median of rounds in which everybody takes a turn. ±: half the distance of the quartiles. × ours: median ratio "
    "within a round, above 1 is slower than ours. % matmul: of the rate of a 2048 × 2048 product measured in between. "
    "temp: what XLA plans."
)
_EXTRA = {
    "tokens_per_second": ("tokens / s", "{:,.0f}"),
    "peak_mib": ("peak MiB", "{:,.0f}"),
    "import_mib": ("import MiB", "{:,.0f}"),
}


def lines(rows: Sequence[Row]) -> list[str]:
    """One JSON object for every row."""
    return [json.dumps(row.record(), ensure_ascii=False) for row in rows]


def table(rows: Sequence[Row]) -> Table:
    """The rows of one case; the fastest of the others is what ours has to be compared with, so it is in bold."""
    case = rows[0].case
    extra = [name for name in _EXTRA if any(name in (row.extra or {}) for row in rows)]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("library", no_wrap=True)
    planned = any(row.temporary is not None for row in rows)
    numbers = ["ms", "±", "× ours", *(["GF/s", "% matmul"] if case.flops else []), *(["temp MiB"] if planned else [])]
    for heading in [*numbers, *(_EXTRA[name][0] for name in extra)]:
        shown.add_column(heading, justify="right")  # a heading may be broken, a number is not
    rivals = [row for row in rows if row.milliseconds is not None and row.implementation != OURS]
    best = min(rivals, key=lambda row: row.relative_to_ours or 0, default=None)
    for row in rows:
        if row.milliseconds is None:
            continue
        cells = [
            significant(row.milliseconds),
            significant(row.spread),
            "" if row.implementation == OURS else f"{row.relative_to_ours:.2f}",
        ]
        if case.flops:
            cells += [
                significant(row.gflops),
                "–" if row.matmul_fraction is None else f"{row.matmul_fraction:.0%}",
            ]
        if planned:
            cells.append("–" if row.temporary is None else f"{row.temporary / 2**20:,.1f}")
        for name in extra:
            value = (row.extra or {}).get(name)
            cells.append("–" if value is None else _EXTRA[name][1].format(value))
        style = "green" if row.implementation == OURS else "bold" if row is best else ""
        shown.add_row(row.implementation, *cells, style=style)
    return shown


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the table of one case, and below it who was not timed and why."""
    rounds = max(row.rounds for row in rows)
    console.print(f"[bold]{rows[0].case.title}[/bold] [dim]· {rounds} rounds[/dim]", highlight=False, soft_wrap=True)
    console.print(table(rows))
    for row in rows:
        if row.note is not None:
            wrong = row.note.startswith("WRONG")
            console.print(
                f"  {row.implementation}: {row.note}",
                style="bold red" if wrong else "dim",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    console.print()


def significant(value: float | None) -> str:
    """Three significant digits without an exponent.

    >>> [significant(x) for x in (1234.4, 123.4, 12.34, 1.234, 0.01234, None)]
    ['1,234', '123', '12.3', '1.23', '0.012', '–']
    """
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
