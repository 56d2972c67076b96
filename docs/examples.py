"""For mkdocstrings: examples in docstrings, from `>>>` to the next blank line, as blocks of code."""

from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Changes what is shown of a docstring, not the docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with every example between fences.

    >>> fenced("It adds.\\n\\n>>> add(1, 2)\\n3\\n\\nNo more.").splitlines()
    ['It adds.', '', '```pycon', '>>> add(1, 2)', '3', '```', '', 'No more.']
    """
    lines: list[str] = []
    indent: str | None = None  # of the example that is open
    inside = False  # of a block that is fenced already
    for line in [*text.splitlines(), ""]:
        if indent is None and line.lstrip().startswith(">>>") and not inside:
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        elif line.lstrip().startswith("```"):
            inside = not inside
        lines.append(line)
    return "\n".join(lines[:-1])
