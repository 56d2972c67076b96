"""The scoreboard: every study, the verdicts on its claims, and what they cost. `python -m experiments claims`."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import environment, kinds, run
from experiments import folder as folders
from experiments.errors import UserError
from experiments.folder import ENVIRONMENT, REPORT, RESULT, write
from experiments.studies import board
from experiments.studies.study import COLOURS
from mhajax import figures, training

NOT_RUN = "not run"


def command(arguments: list[str]) -> int:
    """`python -m experiments claims [CONFIG …]`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments claims",
        description="Run the studies that have no result yet, and write what all of them say to claims.md, claims.json "
        "and claims.svg. What is finished is not run again, of an interrupted sweep neither a finished arm; a config "
        "that was changed is another study.",
    )
    parser.add_argument("configs", metavar="CONFIG", nargs="*", help="studies (default: every one under configs/)")
    parser.add_argument("--runs", metavar="FOLDER", default="runs", help="where their folders are (default: runs)")
    parser.add_argument("--to", metavar="FOLDER", help="where the scoreboard is written, and the result and the "
                        "figures of every study (default: RUNS, where these are already)")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="run nothing: only what is there already")
    parser.add_argument("--quick", action="store_true", help="quick looks: do they run from end to end?")
    options = parser.parse_args(arguments)
    console = Console()
    paths = options.configs or every_study(Path("configs"))
    if not paths:
        raise UserError("claims: there is no study under configs/ here; name configs, or go to their folder.")
    rows = [row for path in paths for row in rows_of(path, options.runs, console, options.show, options.quick)]
    folder = Path(options.to or options.runs)
    folder.mkdir(parents=True, exist_ok=True)
    if options.to:
        rows = [_published(row, folder) for row in rows]
    whole = {**manifest(Path(options.runs)), "claims": rows}
    write(folder / "claims.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    write(folder / "claims.md", markdown(rows))
    drawing = board.draw([(row["said"], row["claim"], row["word"]) for row in rows], _title(rows))
    write(folder / "claims.svg", figures.svg(drawing))
    show(rows, console)
    return 0


def every_study(root: Path) -> list[str]:
    """The configs of studies in a folder and those below it."""
    return [str(path) for path in sorted(root.rglob("*.toml")) if _read(path).get("kind") in kinds.STUDIES]


def rows_of(path: str, runs: str, console: Console, show: bool, quick: bool) -> list[dict[str, Any]]:
    """A row for each verdict of a study: run it unless it has a result, or `show` says not to."""
    text = _read(Path(path))
    told = {
        "config": path, "asked": fingerprint(text), "said": text.get("said", ""),
        "command": f"python -m experiments {path}" + " --quick" * quick,
    }  # fmt: skip
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
        made = folders.read_json(folder / ENVIRONMENT, "data_sha256", "packages")
    except (UserError, training.NonFinite) as error:  # of the others there is an answer
        return [{**told, "claim": path, "word": NOT_RUN, "because": str(error), "seconds": None}]
    ran = time.strftime("%Y-%m-%d", time.gmtime((folder / RESULT).stat().st_mtime))
    told |= {"date": ran, "jax": made["packages"]["jax"], "data": made["data_sha256"]}
    told |= {"folder": str(folder), "report": str(folder / REPORT)}
    return [{**told, **verdict, "seconds": round(result["seconds"])} for verdict in result["verdicts"]]


def fingerprint(config: dict[str, Any]) -> str:
    """What a config asks as a hash: all that stands in the file but comments and `said`; defaults are left out."""
    asked = {name: value for name, value in config.items() if name != "said"}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _published(row: dict[str, Any], to: Path) -> dict[str, Any]:
    """The row, with its result and its figures beside the scoreboard, and no path of this machine."""
    if "folder" not in row:
        return row
    source, own = Path(row["folder"]), to / Path(row["config"]).stem
    own.mkdir(exist_ok=True)
    shutil.copy(source / RESULT, own / RESULT)
    drawings = sorted((source / "figures").glob("*.svg"))
    for drawing in drawings:
        shutil.copy(drawing, own / drawing.name)
    rest = {name: value for name, value in row.items() if name not in ("folder", "report")}
    return {**rest, "result": f"{own.name}/{RESULT}", "figures": [f"{own.name}/{one.name}" for one in drawings]}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = ["| said | measured | verdict | because | seconds | command |", "|---|---|---|---|---|---|"]
    for row, said in zip(rows, _once(rows), strict=True):
        drawn = "".join(f", [{Path(one).stem}]({one})" for one in row.get("figures", ()) if said)
        texts = (said, row["claim"], f"**{row['word']}**", row["because"], _seconds(row), f"`{row['command']}`{drawn}")
        lines.append(f"| {' | '.join(map(cell, texts))} |")
    return "\n".join(lines) + "\n"


def _once(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was said, where it is not what was said in the row before."""
    before = None
    for row in rows:
        yield "" if row["said"] == before else row["said"]
        before = row["said"]


def _seconds(row: dict[str, Any]) -> str:
    return "" if row["seconds"] is None else f"{row['seconds']:.0f}"


def _title(rows: Sequence[dict[str, Any]]) -> str:
    words = [row["word"] for row in rows]
    counted = [f"{words.count(word)} {word}" for word in (*COLOURS, NOT_RUN) if word in words]
    return f"{len(rows)} claims about heads: {', '.join(counted)}"


def manifest(runs: Path) -> dict[str, Any]:
    """Versions, and the machine in words."""
    from experiments.bench import machine

    found = environment.describe({}, runs)
    words = f"{machine.processor()}, {machine.threads()} threads, {', '.join(found['devices'])}"
    return {"python": found["python"], "packages": found["packages"], "machine": words}


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows."""
    table = Table(box=None, padding=(0, 1), header_style="")
    for name in ("verdict", "claim", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for row in rows:
        colour = COLOURS.get(row["word"], "dim")
        because = escape(row["because"])
        table.add_row(f"[{colour}]{row['word']}[/]", f"{escape(row['claim'])}\n[dim]{because}[/dim]", _seconds(row))
    console.print(table)


def _read(path: Path) -> dict[str, Any]:
    """What stands in a config; nothing if it cannot be read, which is for whoever runs it to say."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
