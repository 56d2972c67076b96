"""A page, its sections and what stands in them."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mhajax import figures, view
from mhajax.figures import Drawing
from mhajax.report.page import table as tables
from mhajax.report.page.markup import Html, element
from mhajax.report.page.table import Column
from mhajax.view import View


class Section:
    """A heading and what stands under it, in the order in which it was added; made by `Page.section`."""

    def __init__(self, page: Page, heading: str, level: int):
        self.heading, self.level = heading, level
        self.id = page._name(heading)
        self._page = page
        self._parts: list[Html | Section] = []

    def section(self, heading: str) -> Section:
        """A section inside this one."""
        if self.level >= 4:
            raise ValueError(f"page: sections go three deep, got {heading!r} inside level {self.level}; use text.")
        inner = Section(self._page, heading, self.level + 1)
        self._parts.append(inner)
        return inner

    def text(self, *paragraphs: str) -> None:
        """Paragraphs; what is not made by `markup.element` is escaped."""
        self._parts += [element("p", paragraph) for paragraph in paragraphs]

    def items(self, items: Sequence[str]) -> None:
        """A list."""
        self._parts.append(element("ul", *(element("li", item) for item in items)))

    def table(self, columns: Sequence[str | Column], rows: Sequence[Sequence[object]], *, caption: str) -> None:
        """A table; the first cell of a row is its name.

        A cell is text, a number, None, or a `statistics.Measure` of scalars. A Measure shows value, interval and
        baseline, and is marked unless the whole interval is on the better side of the baseline.

        Raises:
          ValueError: a row has not as many cells as there are columns, or a Measure is not of scalars.
        """
        columns = [column if isinstance(column, Column) else Column(column) for column in columns]
        link = _download(self._page._name(caption), *tables.as_numbers(columns, rows))
        self._parts.append(tables.as_html(columns, rows, caption, link))

    def figure(self, drawing: Drawing, caption: str, *, name: str | None = None) -> None:
        """A drawing, with its numbers as a CSV file to download, called `name` (made from the caption if not given)."""
        self._page._drawn += 1
        drawn = _inline(figures.svg(drawing), f"drawing-{self._page._drawn}")
        link = _download(self._page._name(name or caption), *drawing.table)
        box = element("div", drawn, class_="paper", tabindex=0, role="group", aria_label=caption)
        self._parts.append(element("figure", box, element("figcaption", caption, " ", link)))

    def view(self, shown: View, caption: str) -> None:
        """An interactive view of heads."""
        self._page._views = True
        self._parts.append(element("figure", Html(shown.markup()), element("figcaption", caption), class_="view"))

    def _html(self) -> Html:
        parts = [part._html() if isinstance(part, Section) else part for part in self._parts]
        return element("section", element(f"h{self.level}", self.heading, id=self.id), *parts)

    def _entry(self) -> Html:
        inner = [part._entry() for part in self._parts if isinstance(part, Section)]
        link = element("a", self.heading, href=f"#{self.id}")
        return element("li", link, element("ul", *inner) if inner and self.level < 3 else None)


class Page:
    """A report under construction.

    Args:
      title: of the page and the window.
      lead: paragraphs under the title, before the contents: the answer in short.
      language: of the text.
    """

    def __init__(self, title: str, *lead: str, language: str = "en"):
        self.title, self.lead, self.language = title, lead, language
        self._sections: list[Section] = []
        self._names: set[str] = set()
        self._drawn, self._views = 0, False

    def section(self, heading: str) -> Section:
        """A new section at the end of the page."""
        self._sections.append(Section(self, heading, 2))
        return self._sections[-1]

    def html(self) -> str:
        """The page as one file, without anything from outside: a policy in it forbids it to ask for it."""
        script = view.script() if self._views else None
        allowed = f"'sha256-{_digest(script)}'" if script else "'none'"
        policy = (
            f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        style = resources.files("mhajax.report.page").joinpath("page.css").read_text(encoding="utf-8")
        head = element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", self.title),
            element("link", rel="icon", href="data:,"),
            element("style", Html(style)),
        )
        contents = element("ul", *(section._entry() for section in self._sections))
        body = element(
            "body",
            element("header", element("h1", self.title), *(element("p", text, class_="lead") for text in self.lead)),
            element("nav", contents, aria_label="Contents") if self._sections else None,
            element("main", *(section._html() for section in self._sections)),
            element("script", Html(script)) if script else None,
        )
        return "<!doctype html>\n" + element("html", head, body, lang=self.language) + "\n"

    def save(self, path: str | Path) -> Path:
        """Writes the page."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # half of a surrogate pair, which a cut text may end with, has no UTF-8
        html = self.html().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        path.write_text(html, encoding="utf-8", newline="\n")
        return path

    def _name(self, text: str) -> str:
        """A name made of the words of a text, that nothing else on the page has."""
        base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "part"
        name, count = base, 1
        while name in self._names:
            count += 1
            name = f"{base}-{count}"
        self._names.add(name)
        return name


def _inline(svg: str, own: str) -> Html:
    """An <svg> inside HTML: no names of XML, and ids that begin with its own, also if the same picture comes twice."""
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    found = re.match(r'<svg id="([^"]+)"', svg)
    return Html(svg.replace(found[1], own) if found else svg)


def _download(name: str, header: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    data = base64.b64encode(file.getvalue().encode()).decode("ascii")
    link = f"data:text/csv;charset=utf-8;base64,{data}"
    return element("a", "CSV", href=link, download=f"{name}.csv", aria_label=f"{name}.csv: the numbers as CSV")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
