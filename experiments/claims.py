"""The scoreboard: every study, the verdicts on its claims, and what they cost. `python -m experiments claims`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import environment, kinds, run
from experiments import folder as folders
from experiments.errors import UserError
from experiments.folder import REPORT, RESULT, write
from experiments.studies.study import COLOURS
from mhajax import training

NOT_RUN = "not run"


def command(arguments: list[str]) -> int:
    """`python -m experiments claims [CONFIG …]`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments claims",
        description="Run the studies that have no result yet, and write what all of them say to RUNS/claims.md and "
        "RUNS/claims.json. What is finished is not run again, of an interrupted sweep neither a finished arm.",
    )
    parser.add_argument("configs", metavar="CONFIG", nargs="*", help="studies (default: every one under configs/)")
    parser.add_argument("--runs", metavar="FOLDER", default="runs", help="where their folders are (default: runs)")
    parser.add_argument("--show", action="store_true", help="run nothing: only what is there already")
    parser.add_argument("--quick", action="store_true", help="quick looks: do they run from end to end?")
    options = parser.parse_args(arguments)
    console = Console()
    paths = options.configs or every_study(Path("configs"))
    if not paths:
        raise UserError("claims: there is no study under configs/ here; name configs, or go to their folder.")
    rows = [row for path in paths for row in rows_of(path, options.runs, console, options.show, options.quick)]
    Path(options.runs).mkdir(parents=True, exist_ok=True)
    board = {"date": time.strftime("%Y-%m-%d"), **manifest(Path(options.runs)), "claims": rows}
    write(Path(options.runs) / "claims.json", json.dumps(board, indent=2, ensure_ascii=False) + "\n")
    write(Path(options.runs) / "claims.md", markdown(rows))
    show(rows, console)
    return 0


def every_study(root: Path) -> list[str]:
    """The configs of studies in a folder and those below it."""
    return [str(path) for path in sorted(root.rglob("*.toml")) if _kind(path) in kinds.STUDIES]


def rows_of(path: str, runs: str, console: Console, show: bool, quick: bool) -> list[dict[str, Any]]:
    """A row for each verdict of a study: run it unless it has a result, or `show` says not to."""
    told = {"config": path, "command": f"python -m experiments {path}" + " --quick" * quick}
    try:
        config, folder = run.load(path, [], runs, small=quick)
        if config.kind not in kinds.STUDIES:
            raise UserError(f"{path}: this is a training ({config.kind}); claims are answered by studies.")
        if (folder / RESULT).is_file():
            result = folders.read_json(folder / RESULT, "verdicts", "seconds")
        elif show:
            return [{**told, "claim": path, "word": NOT_RUN, "because": "there is no result yet", "seconds": None}]
        else:
            console.print(
                f"[bold]{escape(path)}[/bold] [dim]{escape(str(folder))}[/dim]", highlight=False, soft_wrap=True
            )
            result = run.run(config, folder, console)
    except (UserError, training.NonFinite) as error:  # of the others there is an answer
        return [{**told, "claim": path, "word": NOT_RUN, "because": str(error), "seconds": None}]
    report = str(folder / REPORT)
    return [{**told, **verdict, "seconds": result["seconds"], "report": report} for verdict in result["verdicts"]]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = ["| claim | verdict | because | seconds | command |", "|---|---|---|---|---|"]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        texts = (row["claim"], f"**{row['word']}**", row["because"], seconds, f"`{row['command']}`")
        lines.append(f"| {' | '.join(map(cell, texts))} |")
    return "\n".join(lines) + "\n"


def manifest(runs: Path) -> dict[str, Any]:
    """Versions and machine."""
    found = environment.describe({}, runs)
    return {name: found[name] for name in ("python", "packages", "machine", "cpus", "devices")}


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows."""
    table = Table(box=None, padding=(0, 1), header_style="")
    for name in ("verdict", "claim", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        colour = COLOURS.get(row["word"], "dim")
        because = escape(row["because"])
        table.add_row(f"[{colour}]{row['word']}[/]", f"{escape(row['claim'])}\n[dim]{because}[/dim]", seconds)
    console.print(table)


def _kind(path: Path) -> str | None:
    """What a config says of its kind; None if it cannot be read, which is for whoever runs it to say."""
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError):
        return None
