"""Where the files lie that a config names: beside the config, or where the command is typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from experiments import toml
from experiments.errors import DataError

_FILES = {"path"} | {f"{part}_{side}" for part in ("train", "validation", "test") for side in ("source", "target")}
_FOLDERS = {"root"}  # of a public data set; whether it is there, and how to get it, is said when it is read
Data = TypeVar("Data")


def absolute(table: str, data: Data, folder: Path, overrides: Sequence[str] = ()) -> Data:
    """A table that names files, with absolute paths.

    Args:
      table: its name.
      data: its dataclass, such as those of `corpora`.
      folder: of the config file; a relative path of the file is looked for here first, then in the current folder.
      overrides: as on the command line; a path that stands there is looked for in the current folder first.

    Raises:
      DataError: a file is in neither.
    """
    typed = {".".join(toml.parse_override(text)[0]) for text in overrides}
    found = {}
    for name, value in vars(data).items():
        if value is None or name not in _FILES | _FOLDERS or Path(value).expanduser().is_absolute():
            continue
        here, there = Path.cwd(), folder.absolute()
        places = (here, there) if typed & {f"{table}.{name}", table} else (there, here)
        candidates = list(dict.fromkeys(place / value for place in places))
        there_are = [path for path in candidates if _exists(path)]
        if there_are:
            found[name] = str(there_are[0])
        elif name in _FILES:
            raise DataError(_missing(f"{table}.{name}", value, candidates))
    return dataclasses.replace(data, **found)  # pyright: ignore[reportArgumentType]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _missing(name: str, value: str, candidates: list[Path]) -> str:
    folders = " and not in ".join(str(path.parent) for path in candidates)
    near = [
        str(path.parent / close)
        for path in candidates
        if _exists(path.parent) and path.parent.is_dir()
        for close in [toml.nearest(path.name, [file.name for file in path.parent.iterdir()])]
        if close
    ]
    hint = f"Did you mean {near[0]}?" if near else "Give an absolute path, or one relative to the config file."
    shown = value if len(value) <= 200 else f"{value[:197]}..."
    return f"{name} = {toml.literal(shown)}: there is no such file in {folders}. {hint}"
