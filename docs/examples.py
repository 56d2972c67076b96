"""For mkdocstrings: examples and lists in columns of docstrings become blocks of code."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Changes what is shown of a docstring, not the docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with every example between fences, and every list of names in two columns.

    >>> fenced("It adds.\\n\\n>>> add(1, 2)\\n3\\n\\nNo more.").splitlines()
    ['It adds.', '', '```pycon', '>>> add(1, 2)', '3', '```', '', 'No more.']
    >>> fenced("causal   back\\nwindow   near").splitlines()
    ['```text', 'causal   back', 'window   near', '```']
    """
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            paragraphs[-1].append(line)
        else:
            paragraphs += [[line], []]
    return "\n".join(line for paragraph in paragraphs for line in _fenced(paragraph))


def _fenced(paragraph: list[str]) -> list[str]:
    """A paragraph that may end with an example, or be a list in columns."""
    if len(paragraph) > 1 and re.match(r"\S+(, \S+)* {2,}\S", paragraph[0]):
        return ["```text", *paragraph, "```"]
    for place, line in enumerate(paragraph):
        if line.lstrip().startswith(">>>"):
            indent = line[: len(line) - len(line.lstrip())]
            return [*paragraph[:place], f"{indent}```pycon", *paragraph[place:], f"{indent}```"]
    return paragraph
