"""Every head of one model in a terminal: how far and how widely it looks, and which relations it follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from mhajax.report.subject import Kind
from mhajax.statistics import Measure

_DECIMALS = {"distance": 1, "entropy": 2}  # of the measures that are not shares
_FIRST, _SHARE = 30, 13  # columns of a terminal that the first three take, and each share


def show(console: Console, kinds: Sequence[Kind], heads: Mapping[str, Mapping[str, Measure]], unit: str) -> None:
    """Print a table for each kind of attention.

    Args:
      console: where.
      kinds: of attention.
      heads: kind → measure → [L, N], from `results.examine_briefly`.
      unit: what a token is, for a reader: "word", "character" or "token".
    """
    relations = False
    for kind in kinds:
        shares = [name for name in heads[kind.name] if name not in _DECIMALS]
        left_out = shares[max(1, (console.width - _FIRST) // _SHARE) :]  # no room for them
        measures = {name: one for name, one in heads[kind.name].items() if name not in left_out}
        shares = [name for name in shares if name in measures]
        relations |= bool(shares)
        table = Table(title=kind.title, title_justify="left", title_style="bold", header_style="", box=None)
        table.add_column("layer·head", no_wrap=True)
        for name in measures:
            table.add_column(name, justify="right", max_width=13)
        best = {name: np.nanmax(measures[name].value) for name in shares if not np.isnan(measures[name].value).all()}
        for place in np.ndindex(kind.layers, kind.heads):
            cells = [_cell(name, measures[name], place, best) for name in measures]
            table.add_row(f"{place[0]}·{place[1]}", *cells)
        if best:
            baselines = [f"{100 * measures[n].baseline[0, 0]:.0f}{' ' * 8}" if n in best else "" for n in measures]
            table.add_row("baseline", *baselines, style="dim")
        console.print(table)
        if left_out:
            console.print(f"no room for: {', '.join(left_out)}", style="dim", highlight=False)
        console.print()
    console.print(
        f"distance: {unit}s between query and what it looks at; entropy: 0 is one key, 1 all alike."
        + (
            " Relations: % of the queries whose most attended key is a right one, with the 95 % interval over "
            "sentences; baseline is what the best fixed offset or the nearest noun would reach."
            if relations
            else ""
        ),
        style="dim", highlight=False,
    )  # fmt: skip
    console.print()


def _cell(name: str, measure: Measure, place: tuple[int, ...], best: Mapping[str, float]) -> str:
    value, low, high = (float(part[place]) for part in measure[:3])
    if np.isnan(value):
        return "–"
    if name in _DECIMALS:
        return f"{value:.{_DECIMALS[name]}f}"
    number = f"[bold]{100 * value:.0f}[/bold]" if value == best[name] else f"{100 * value:.0f}"
    interval = f"{100 * low:.0f}–{100 * high:.0f}"
    return f"{number} [dim]{interval:>7}[/dim]"
