"""A view as text: for a page of your own, and framed for a notebook."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

_PARTS = ("dom.js", "heads.js", "links.js", "matrix.js", "view.js")  # each uses what stands before it


@dataclass(frozen=True)
class View:
    """An interactive view of heads; made by `view.heads`.

    Attributes:
      title: its name.
      summary: how much is in it.
      data: what is shown, as JSON has it.
    """

    title: str
    summary: str
    data: dict[str, Any] = field(repr=False)

    def html(self) -> str:
        """The view for a page: its data and its script, nothing from outside.

        Any number of views may stand on a page. Each lives in a shadow tree, so that neither its style nor its ids meet
        those of the page; it is dark if the page's `color-scheme` lets it be and the reader prefers it.
        """
        return f"{self.markup()}<script>{script()}</script>"

    def markup(self) -> str:
        """The data alone, for a page that has the text of `view.script()` once, in a <script> after all its views."""
        text = json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        return (
            f'<div class="mhajax-view"><script type="application/json">{text}</script>'
            f"<noscript>{html.escape(self.title)}: this view needs JavaScript.</noscript></div>"
        )

    def _repr_html_(self) -> str:
        """In a notebook: a frame that the notebook's style does not reach, as tall as what is in it."""
        document = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><style>:root{color-scheme:light dark}'
            "body{margin:0;padding:4px 2px}</style>" + self.html() + f"<script>{_text('frame.js')}</script>"
        )
        return (
            f'<iframe title="{html.escape(self.title)}" srcdoc="{html.escape(document)}" '
            'style="width:100%;height:640px;border:0;display:block"></iframe>'
        )

    def __repr__(self) -> str:
        return f"View({self.title!r}, {self.summary})"


@cache
def script() -> str:
    """The script that brings every view to life that stands before it on a page; harmless to run more than once.

    A page with a Content-Security-Policy allows it by the SHA-256 of this very text, and `style-src 'unsafe-inline'`.
    """
    style = json.dumps(_text("view.css")).replace("<", "\\u003c")
    return "".join(['(() => {\n"use strict";\n', f"const STYLE = {style};\n", *map(_text, _PARTS), "})();\n"])


def _text(name: str) -> str:
    return resources.files("mhajax.view").joinpath("assets", name).read_text(encoding="utf-8")
