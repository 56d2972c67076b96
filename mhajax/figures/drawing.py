"""A picture with its numbers, as files and as a piece of a web page."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mhajax.figures import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawing(NamedTuple):
    """A figure and the numbers in it.

    Attributes:
      figure: a matplotlib Figure.
      table: (header, rows), the content of the CSV file.
    """

    figure: Figure
    table: tuple[tuple[str, ...], list[tuple]]


def save(drawing: Drawing, stem: str | Path) -> list[Path]:
    """Writes `stem`.svg, `stem`.pdf, `stem`.png and `stem`.csv, and returns their paths.

    The same drawing gives the same bytes: no dates, no versions, no random ids.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("svg", "pdf", "png", "csv")]
    vector, printed, pixels, table = paths
    with page.style():
        drawing.figure.savefig(vector, dpi=200, metadata={"Date": None, "Creator": None})
        drawing.figure.savefig(printed, dpi=200, metadata={"CreationDate": None, "Creator": None, "Producer": None})
        drawing.figure.savefig(pixels, dpi=200, metadata={"Software": None})
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(drawing.table[0])
        writer.writerows(drawing.table[1])
    return paths


def svg(drawing: Drawing) -> str:
    """The picture as an `<svg>` element to be put into an HTML page, never wider than its place.

    Its ids begin with a hash of the picture, so that several pictures in a page do not take each other's letters or
    clips; its style rules hold for itself only. The title is what a screen reader says.
    """
    file = io.StringIO()
    with page.style():
        drawing.figure.savefig(file, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :].rstrip()
    text = re.sub(r"\s*<!--.*?-->|\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    own = f"f{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    text = re.sub(r'\bid="([^"]*)"', rf'id="{own}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{own}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{own}-\1)", text)
    text = text.replace('<style type="text/css">*{', f'<style type="text/css">#{own} *{{')
    title = drawing.figure.texts[0].get_text() if drawing.figure.texts else ""
    start = f'<svg id="{own}" role="img" aria-label="{escape(title)}" style="max-width: 100%; height: auto" '
    return start + text.removeprefix("<svg ")
