"""HTML from Python: one function makes elements and escapes whatever is not HTML already."""

from __future__ import annotations

import html

_EMPTY = {"meta", "link", "br", "col"}


class Html(str):
    """Text that is HTML; everything else is escaped when it becomes part of an element."""


def element(tag: str, *children: object, **attributes: object) -> Html:
    """An element. `class_` is the attribute class and `http_equiv` is http-equiv; None and False leave one out.

    >>> element("p", "a < b ", element("em", "&"), class_="x", hidden=True)
    '<p class="x" hidden>a &lt; b <em>&amp;</em></p>'
    """
    written = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        written.append(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"')
    start = f"<{tag}{''.join(written)}>"
    return Html(start) if tag in _EMPTY else Html(f"{start}{join(*children)}</{tag}>")


def join(*parts: object) -> Html:
    """Parts one after the other; None is nothing."""
    texts = (part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None)
    return Html("".join(texts))
