"""Every key of a config: its type, its default, what may stand there, and what it means; from the dataclasses alone.

python -m experiments keys [KIND]
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments import kinds, schema, toml
from experiments.errors import UserError


class Key(NamedTuple):
    """One key.

    Attributes:
      table: the table that it stands in, as in a file: "[model]", '[data] with kind = "files"', "" for the top.
      name: of the key.
      takes: what may stand there, in words: "a whole number", 'one of "bpe", "words" or "characters"'.
      default: what it is if it is left out, as TOML; None: it cannot be left out; "" if it is then not there.
      meaning: from the docstring.
    """

    table: str
    name: str
    takes: str
    default: str | None
    meaning: str


def configs() -> dict[str, type]:
    """The configs by their kind."""
    return {kind: module.Config for kind, module in (kinds.TRAININGS | kinds.STUDIES).items()}


def keys(kind: str) -> list[Key]:
    """Every key of the configs of one kind of experiment, in the order of the tables.

    Raises:
      UserError: there is no such kind.
    """
    known = configs()
    if kind not in known:
        near = toml.nearest(kind, known)
        hint = f"did you mean {near}?" if near else f"there are: {', '.join(known)}."
        raise UserError(f"keys: {kind} is no kind of experiment; {hint}")
    return list(_of_table(known[kind], "", "", dataclasses.MISSING))


def _of_table(table: type, path: str, label: str, preset: Any) -> Iterator[Key]:
    meanings, inner = described(table), []
    for name, (field, hint) in schema._fields(table).items():
        default = _default(field, name, preset)
        members = schema._alternatives(hint)
        if dataclasses.is_dataclass(members[0]):
            inner.append((f"{path}.{name}" if path else name, members, default))
            continue
        takes = schema._describe(hint)[0]
        shown = None if default is dataclasses.MISSING else "" if default is None else toml.literal(default)
        if default is dataclasses.MISSING and schema._optional(hint):
            shown = ""
        meaning = meanings.get(name) or (_first_line(table) if name == "kind" else "")
        yield Key(label, name, takes, shown, meaning.replace("None:", "Left out:"))
    for child, members, default in inner:
        of_kind = schema._kinds(members) if len(members) > 1 else {"": members[0]}
        for kind, member in of_kind.items():
            where = f"[{child}]" + (f" with kind = {toml.literal(kind)}" if kind else "")
            yield from _of_table(member, child, where, default if type(default) is member else dataclasses.MISSING)


def _default(field: dataclasses.Field, name: str, preset: Any) -> Any:
    """What a key has if it is left out; `preset` is the default of the table that it stands in."""
    if preset is not dataclasses.MISSING:
        return getattr(preset, name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _first_line(table: type) -> str:
    return inspect.cleandoc(table.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def described(table: type) -> dict[str, str]:
    """Field → what it means, from the section "Attributes:" of the docstrings of a dataclass and those it inherits."""
    found: dict[str, str] = {}
    for base in reversed(table.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _attributes(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return found


def _attributes(text: str) -> dict[str, str]:
    _, _, section = text.partition("Attributes:\n")
    found, names = {}, []
    margin = len(section) - len(section.lstrip())
    for line in section.splitlines():
        if not line.strip() or len(line) - len(line.lstrip()) < margin:
            break
        start = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): ", line[margin:])
        if start:
            names, line = start[1].split(", "), line[margin + len(start[0]) :]
            found |= dict.fromkeys(names, "")
        found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def command(arguments: list[str]) -> int:
    """`python -m experiments keys [KIND]`."""
    import argparse

    from rich.console import Console

    parser = argparse.ArgumentParser(
        prog="python -m experiments keys",
        description="Every key of a config: what may stand there, its default, and what it means.",
    )
    parser.add_argument("kind", nargs="*", metavar="KIND", help=f"of experiment: {', '.join(configs())} (default: all)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    for kind in options.kind or configs():
        show(console, kind, keys(kind))
    return 0


def show(console: Any, kind: str, found: list[Key]) -> None:
    """Print the keys, table by table."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text(f"kind = {toml.literal(kind)}", style="bold"))
    table = ""
    for key in found:
        if key.table != table:
            table = key.table
            console.print()
            console.print(Text(table, style="bold"))
        default = f" = {key.default}" if key.default else ""
        needed = "; must be given" if key.default is None else "; may be left out" if key.default == "" else ""
        head = Text.assemble((key.name, "cyan"), default, (f"   {key.takes}{needed}", "dim"))
        console.print(Padding(head, (0, 0, 0, 2)))
        console.print(Padding(Text(key.meaning), (0, 0, 0, 6)))
    console.print()
