"""One file of a known SHA-256: downloaded, resumed, compared, and only then in its place."""

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


def download(name: str, file: File, target: Path, report: Report) -> None:
    """Downloads a file, or the rest of one; until it is right, it is target with ``.part`` behind it.

    Args:
        name: Of what it belongs to, for errors.
        file: What it must be.
        target: Where it goes; the folder must be there.
        report: As in `fetch.fetch`.

    Raises:
        DataError: There is no network, or the content is wrong.
        OSError: It cannot be written.
    """
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _receive(name, file, part, report)
    if resumed and files.sha256(part) != file.sha256:  # what an earlier call left may be of another version
        part.unlink()
        _receive(name, file, part, report)
    keep_if_right(file, part, target)


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
            raise DataError(f"{name}: {file.url} answered {error.code} {error.reason}. {use_a_folder(name)}") from None
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if _size(part) <= before:
            raise DataError(
                f"{name}: {file.url} could not be downloaded ({failure}); {_size(part)} of {file.size} bytes are here. "
                f"Is there a network? The same command resumes it. {use_a_folder(name)}"
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


def keep_if_right(file: File, received: Path, target: Path) -> None:
    """Gives a file its place, or sets it aside as ``*.bad`` where its content is wrong.

    Raises:
        DataError: The content is wrong.
    """
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


def use_a_folder(name: str) -> str:
    """What to do without a network."""
    return f"If you have the files, give their folder: data.root=FOLDER, or MHAJAX_DATA with FOLDER/{name} in it."
