"""What the folder of a run holds, and how its files are read and written.

runs/grammar-1a2b3c4d/            named by the config file and a hash of every value in it
  config.toml         every value, defaults spelled out
  environment.json    versions of packages, hashes of data, config and vocabulary, the machine
  metrics.jsonl       a line a batch (loss, gradient norm, …) and a line an evaluation
  times.json          how long it took
  checkpoints/        latest states, best parameters
  vocabulary.json     the tokenizer
  figures/            pictures, each as SVG, PDF and PNG with its CSV
  report.html         what the heads do (if it was asked for); heads.json has its numbers
  result.json         written last: a run with a result is finished
  origin.json         where it goes on from, if it is an earlier run continued with other values
runs/grammar-1a2b3c4d+5e6f7a8b/   that run, continued with other values: begun from a copy of its checkpoints

One process works on a folder at a time. A file is written whole or not at all. What another program damaged is named
where it matters to the numbers, and ignored where it does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import DataError, UserError

try:
    import fcntl
except ImportError:  # Windows has none; there, nobody watches that a folder has one process
    fcntl = None

CONFIG, ENVIRONMENT, METRICS, TIMES = "config.toml", "environment.json", "metrics.jsonl", "times.json"
VOCABULARY, CHECKPOINTS, RESULT, ORIGIN = "vocabulary.json", "checkpoints", "result.json", "origin.json"
HEADS, REPORT = "heads.json", "report.html"
_LOCK = "lock"
_CONTINUED = re.compile(r"(.+)\+[0-9a-f]{8}")


def write(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(content, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """With null for what is no number, of which JSON knows nothing."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def name(stem: str, config: str) -> str:
    """The name of the folder of a run: that of its config file, and a hash of the resolved config."""
    return f"{stem}-{digest(config)[:8]}"


def continued(source: Path, config: str) -> Path:
    """The folder of a run that goes on from `source` with another config."""
    source = source.resolve()
    return source.with_name(f"{source.name}+{digest(config)[:8]}")


def source_of(folder: Path) -> Path | None:
    """The run that a new folder begins from, known by its name; None for one that begins from nothing."""
    found = _CONTINUED.fullmatch(folder.name)
    source = folder.with_name(found[1]) if found and not (folder / CONFIG).is_file() else None
    return source if source is not None and (source / CONFIG).is_file() else None


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[None]:
    """A run folder to work in: made, and this process's alone until the end.

    A folder that was made here and got no config.toml is gone afterwards: the trial failed before there was a run.

    Raises:
      UserError: another process works on it, or it cannot be made or written, now or later.
    """
    if "\0" in str(folder):
        raise UserError(f"{str(folder)!r}: the name of a folder cannot have a NUL character.")
    made: list[Path] = []
    with _told(folder):
        for path in (folder, *folder.parents):
            if path.exists():
                break
            made.append(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                yield
        finally:
            if made and not (folder / CONFIG).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                for path in made[1:]:
                    with contextlib.suppress(OSError):  # others may have put something there
                        path.rmdir()


def copy(source: Path, folder: Path) -> None:
    """Begin a run where another one stands: its checkpoints and all that belongs to them, not its results.

    Raises:
      UserError: another process works on `source`.
    """
    with _told(source), _locked(source):
        for part in (VOCABULARY, ENVIRONMENT, METRICS, TIMES):
            if (source / part).is_file():
                shutil.copyfile(source / part, folder / part)
        if (source / CHECKPOINTS).is_dir():
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            shutil.copytree(source / CHECKPOINTS, folder / CHECKPOINTS)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock of a folder, which the system takes back from a process however it ends."""
    with open(folder / _LOCK, "a+", encoding="utf-8") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read(200).strip() or "unknown"
                raise UserError(
                    f"{folder}: another process works on this run ({holder}). Wait for it, stop it, or give this one "
                    "another folder with --runs FOLDER."
                ) from None
            except OSError:
                pass  # a file system without locks
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Say in one line that something could not be written or read."""
    try:
        yield
    except (BrokenPipeError, ConnectionError):
        raise
    except OSError as error:
        if error.strerror is None and error.args:  # its message says everything
            raise UserError(str(error)) from error
        where = error.filename if isinstance(error.filename, (str, Path)) else folder
        raise UserError(
            f"{where}: cannot be written or read: {error.strerror}. The run folder is {folder}; what it holds is kept. "
            "Make room, check the permissions, or give another place with --runs FOLDER."
        ) from error


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object from a file, with the keys that are needed.

    Raises:
      DataError: the file is not that; it names the file and the line.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}{_line_of(path, error)}: expected JSON, the file is damaged ({_why(error)}).") from None
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        raise DataError(f"{path}: expected an object with {' and '.join(needed)}, the file is damaged.")
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a last line cut off by a kill is not one. None without a file.

    Raises:
      DataError: a line is not an object with a step and numbers; it names the file and the line.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    found = []
    for number, raw in enumerate(whole, start=1):
        try:
            line = json.loads(raw.decode("utf-8"))
            problem = _problem(line)
        except (ValueError, RecursionError) as error:
            problem = _why(error)
        if problem:
            raise DataError(
                f"{path}, line {number}: this is no line of metrics ({problem}). The file was damaged since it was "
                f"written: bring it back from a copy, or delete line {number}, and the figure lacks its batch."
            )
        found.append(line)
    return found


def times(path: Path) -> list[dict[str, float]]:
    """The entries of times.json; none where the file is damaged, for no number of a result hangs on it but seconds."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    keys = {"step", "seconds", "training_seconds", "tokens"}
    whole = isinstance(entries, list) and all(
        isinstance(entry, dict) and set(entry) == keys and all(_is_number(value) for value in entry.values())
        for entry in entries
    )
    return entries if whole else []


def check(folder: Path) -> None:
    """Refuse a config or a vocabulary that is not the one that the run was trained with.

    Raises:
      DataError: a file is not as it was written.
    """
    if not (folder / ENVIRONMENT).is_file():
        return
    files = read_json(folder / ENVIRONMENT, "data_sha256").get("files_sha256", {})
    for part, advice in (
        (CONFIG, f"to go on with other values: python -m experiments {folder} key=value"),
        (VOCABULARY, "its parameters belong to the vocabulary that they were trained with"),
    ):
        path, before = folder / part, files.get(part) if isinstance(files, dict) else None
        if before is not None and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != before:
            raise DataError(
                f"{path}: this file changed since the run was trained (its SHA-256 is not that in {ENVIRONMENT}). "
                f"Bring it back; {advice}."
            )


def sums(folder: Path) -> dict[str, str]:
    """What `check` compares: SHA-256 of the files that the parameters belong to."""
    paths = [folder / part for part in (CONFIG, VOCABULARY)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def _problem(line: Any) -> str | None:
    if not isinstance(line, dict):
        return "not an object"
    if type(line.get("step")) is not int or line["step"] < 0:
        return "without a step"
    for key, value in line.items():
        if not all(_is_number(number) for number in (value if isinstance(value, list) and value else [value])):
            return f"{key!r:.40} is not a number"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return getattr(error, "msg", None) or type(error).__name__


def _line_of(path: Path, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f", line {path.read_bytes()[: error.start].count(10) + 1}"
    return f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
