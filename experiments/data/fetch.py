"""Public data sets: where they come from, their SHA-256, and where they lie on this machine.

    python -m experiments fetch multi30k

A file is only ever complete and right, or not there: downloads grow in ``*.part``, are compared with the SHA-256 below,
and are then renamed. A broken download is resumed.
"""

import argparse
import difflib
import http
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.data import files
from experiments.errors import DataError

Report = Callable[[str, int, int], None]

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 16


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
        path: Relative to the data set's folder.
        url: Where it is published.
        sha256: Of its content, in hexadecimal.
        size: In bytes.
    """

    path: str
    url: str
    sha256: str
    size: int


@dataclass(frozen=True)
class DataSet:
    """A public data set: its files, on what terms, and where to read about it."""

    files: tuple[File, ...]
    licence: str
    home: str


def _multi30k(name: str, sha256: str, size: int) -> File:
    return File(name, f"https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{name}", sha256, size)


DATA_SETS: dict[str, DataSet] = {
    "multi30k": DataSet(
        files=(
            _multi30k("train.en.gz", "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f", 568_929),
            _multi30k("train.de.gz", "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6", 637_044),
            _multi30k("val.en.gz", "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28", 21_650),
            _multi30k("val.de.gz", "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a", 24_681),
            _multi30k(
                "test_2016_flickr.en.gz", "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9", 21_077
            ),
            _multi30k(
                "test_2016_flickr.de.gz", "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8", 22_890
            ),
            _multi30k(
                "test_2017_flickr.en.gz", "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074", 19_138
            ),
            _multi30k(
                "test_2017_flickr.de.gz", "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee", 21_471
            ),
        ),
        licence="the repository names none; captions of Flickr30k images, see the home page",
        home="https://github.com/multi30k/dataset",
    ),
    "tinyshakespeare": DataSet(
        files=(
            File(
                "input.txt",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                1_115_394,
            ),
        ),
        licence="public domain text",
        home="https://github.com/karpathy/char-rnn",
    ),
}


def fetch(name: str, root: str | os.PathLike[str], *, report: Report | None = None) -> Path:
    """Downloads a data set; what is there already and right is kept.

    Args:
        name: One of `DATA_SETS`.
        root: Folder of all data sets; the files go to root/name.
        report: Called as report(file, bytes there, bytes in all), often, for a progress bar.

    Returns:
        The folder root/name, which holds every file with the right content.

    Raises:
        DataError: The name is unknown, there is no network, or a file's content is wrong. A wrong file is set aside
            as ``*.bad``; a broken download stays as ``*.part`` and is resumed by the next call.
    """
    folder = Path(root).expanduser() / name
    for file in _data_set(name).files:
        target = folder / file.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                _keep_if_right(file, target, target)
            else:
                _download(name, file, target, report or _silent)
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written ({error.strerror or error}). Name a folder you may write to: "
                f"python -m experiments fetch {name} --root FOLDER"
            ) from None
        if report:
            report(file.path, file.size, file.size)
    return folder


def locate(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The folder that holds all files of a data set; their content was checked when `fetch` got them.

    Args:
        name: One of `DATA_SETS`.
        root: The folder of all data sets or that of this one; None for `default_root`.

    Returns:
        The first of root/name and root that has all its files.

    Raises:
        DataError: The name is unknown or files are missing.
    """
    data_set = _data_set(name)
    base = default_root() if root is None else Path(root).expanduser()
    candidates = (base / name, base)
    folder = min(candidates, key=lambda candidate: len(_missing(data_set, candidate)))
    missing = _missing(data_set, folder)
    if not missing:
        return folder
    where = "" if root is None else f" --root {base}"
    raise DataError(
        f"{name}: expected {len(data_set.files)} files in {folder}, {len(missing)} missing: {', '.join(missing)}. "
        f"Download them with `python -m experiments fetch {name}{where}`, "
        "or give the folder that has them as data.root=FOLDER."
    )


def default_root() -> Path:
    """The folder of all data sets: $MHAJAX_DATA, else mhajax in $XDG_CACHE_HOME, else ~/.cache/mhajax."""
    if data := os.environ.get("MHAJAX_DATA"):
        return Path(data).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG base directory specification: a relative path is invalid and to be ignored
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "mhajax"


def command(arguments: list[str]) -> int:
    """`python -m experiments fetch NAME... [--root DIR] [--list]`.

    Args:
        arguments: What follows "fetch".

    Returns:
        The exit status 0.

    Raises:
        DataError: As for `fetch`.
        SystemExit: The arguments cannot be used, or ask for help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments fetch", description="Downloads public data sets and checks their SHA-256."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of: {', '.join(DATA_SETS)}")
    parser.add_argument(
        "--root", metavar="DIR", help="folder of all data sets (default: %(default)s)", default=default_root()
    )
    parser.add_argument(
        "--list", action="store_true", help="list the data sets, their licences and whether they are here"
    )
    options = parser.parse_args(arguments)
    root = Path(options.root).expanduser()
    if options.list:
        for name in options.names or DATA_SETS:
            print(_description(name, root))
        return 0
    if not options.names:
        parser.error("name a data set, or ask for --list")
    for name in options.names:
        _data_set(name)  # a misspelt name is told before the first download, not after it
    for name in options.names:
        print(f"{name}: {_fetch_with_progress(name, root)}")
    return 0


def _fetch_with_progress(name: str, root: Path) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def report(path: str, done: int, total: int) -> None:
            if path not in tasks:  # there is a bar when there are bytes, not before: without a network there are none
                tasks[path] = progress.add_task(path, total=total)
            progress.update(tasks[path], completed=done)

        return fetch(name, root, report=report)


def _description(name: str, root: Path) -> str:
    data_set = _data_set(name)
    missing = len(_missing(data_set, root / name))
    state = "here" if not missing else "not here" if missing == len(data_set.files) else f"{missing} files missing"
    megabytes = sum(file.size for file in data_set.files) / 1e6
    return (
        f"{name}: {len(data_set.files)} files, {megabytes:.1f} MB, {state} ({root / name})\n"
        f"    licence: {data_set.licence}\n    home: {data_set.home}"
    )


def _data_set(name: str) -> DataSet:
    if name not in DATA_SETS:
        close = difflib.get_close_matches(name, DATA_SETS)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise DataError(f"{name}: no such data set. {hint}There are: {', '.join(DATA_SETS)}.")
    return DATA_SETS[name]


def _missing(data_set: DataSet, folder: Path) -> list[str]:
    return [file.path for file in data_set.files if not (folder / file.path).is_file()]


def _download(name: str, file: File, target: Path, report: Report) -> None:
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _receive(name, file, part, report)
    if resumed and files.sha256(part) != file.sha256:  # what an earlier call left may be of another version
        part.unlink()
        _receive(name, file, part, report)
    _keep_if_right(file, part, target)


def _receive(name: str, file: File, part: Path, report: Report) -> None:
    """Asks for what `part` lacks until the server has no more to send; gives up when a request brings nothing."""
    while (before := _size(part)) < file.size:
        failure: Exception | str = "the connection broke"
        try:
            if _request(file, part, report):
                return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # the server's file ends where `part` ends, or before
            raise DataError(f"{name}: {file.url} answered {error.code} {error.reason}. {_use_a_folder(name)}") from None
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if _size(part) <= before:
            raise DataError(
                f"{name}: {file.url} could not be downloaded ({failure}); {_size(part)} of {file.size} bytes are here. "
                f"Is there a network? The same command resumes it. {_use_a_folder(name)}"
            )


def _request(file: File, part: Path, report: Report) -> bool:
    """Appends to `part`, or writes it anew where the server gives no ranges; True if all that it announced came."""
    have = _size(part)
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        resumes = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = have if resumes else 0
        with part.open("ab" if resumes else "wb") as output:
            # one byte more than expected is enough to know that the content is wrong
            while done <= file.size and (chunk := response.read(_CHUNK)):
                output.write(chunk)
                done += len(chunk)
                report(file.path, done, file.size)
        return response.length == 0


def _keep_if_right(file: File, received: Path, target: Path) -> None:
    got = files.sha256(received)
    if got == file.sha256:
        os.replace(received, target)
        return
    bad = target.with_name(target.name + ".bad")
    os.replace(received, bad)
    raise DataError(
        f"{target}: wrong content: expected SHA-256 {file.sha256} ({file.size} bytes), got {got} "
        f"({_size(bad)} bytes). It was set aside as {bad}. Look at it; the same command downloads {file.url} anew."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _use_a_folder(name: str) -> str:
    return f"If you have the files, give their folder: data.root=FOLDER, or MHAJAX_DATA with FOLDER/{name} in it."


def _silent(path: str, done: int, total: int) -> None:
    pass
