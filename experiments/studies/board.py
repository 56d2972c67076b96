"""The scoreboard as a picture: a line for each claim, with its verdict as a word, a mark and a colour."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mhajax.figures import Drawing, page

# word → (mark, colour): the marks can be told apart without colours
_MARKS = {"supported": ("●", page.COLORS[2]), "refuted": ("✕", page.COLORS[1]), "not resolved": ("○", page.FAINT)}
_LINE, _WIDE = 0.205, 6.2  # inches


def draw(rows: Sequence[tuple[str, str, str]], title: str) -> Drawing:
    """Draw the claims under what was said.

    Args:
      rows: (what was said, claim, verdict), those of one saying together.
      title: above them.
    """
    lines: list[tuple[str, str, str]] = []  # (kind of line, text, verdict)
    before = None
    for said, claim, word in rows:
        if said and said != before:
            lines += [("said", part, "") for part in textwrap.wrap(f"“{said}”", 92)]
        before = said
        parts = textwrap.wrap(claim, 92)
        lines += [("claim", part, word if number == 0 else "") for number, part in enumerate(parts)]
    heads = sum(kind == "said" and not (i and lines[i - 1][0] == "said") for i, (kind, *_) in enumerate(lines))
    height = 0.55 + _LINE * len(lines) + 0.12 * heads
    with page.style():
        width = max(_WIDE + 1.5, page.head_width(title) + 0.2)
        figure = page.figure(width, height, title, 0.15)
        y = height - 0.5
        for number, (kind, text, word) in enumerate(lines):
            if kind == "said" and not (number and lines[number - 1][0] == "said"):
                y -= 0.12
            left = 0.15 if kind == "said" else 0.4
            ink = {"color": page.FAINT, "size": 9} if kind == "said" else {"color": page.INK, "size": 8.5}
            figure.text(left / width, y / height, text, ha="left", va="center", **ink)
            if word:
                mark, color = _MARKS.get(word, ("", page.FAINT))
                figure.text((_WIDE + 0.3) / width, y / height, mark, color=color, ha="center", va="center", size=9)
                figure.text((_WIDE + 0.45) / width, y / height, word, color=color, ha="left", va="center", size=8.5)
            y -= _LINE
    return Drawing(figure, (("said", "claim", "verdict"), [tuple(row) for row in rows]))
