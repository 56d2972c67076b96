"""TOML text: read from a file, changed by overrides, written back. It knows no schema."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.errors import ConfigError

_TYPES = {bool: "boolean", int: "integer", float: "float", str: "string", list: "array", dict: "table"}


def load(path: Path) -> dict:
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r}: the name of a file cannot have a NUL character.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        if not folder.is_dir():
            raise ConfigError(f"{path}: there is no such file, and no folder {folder} either.") from None
        near = nearest(path.name, [file.name for file in folder.iterdir() if file.is_file()], cutoff=0.5)
        hint = f"; did you mean {folder / near}?" if near else f" in {folder.resolve()}."
        raise ConfigError(f"{path}: there is no such file{hint}") from None
    except IsADirectoryError:
        files = sorted(file.name for file in path.glob("*.toml"))
        listing = f"; it holds {', '.join(files)}" if files else ""
        raise ConfigError(f"{path}: this is a folder, not a TOML file{listing}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read: {error.strerror}.") from error
    if b"\0" in raw:
        raise ConfigError(f"{path}: this is a binary file (or UTF-16), not TOML text in UTF-8.")
    try:
        text = raw.decode("utf-8-sig")  # editors on Windows put a byte order mark, which tomllib refuses
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        byte = f"byte 0x{raw[error.start]:02x} in line {line}"
        raise ConfigError(f"{path}: the file is not UTF-8 ({byte}); save it again as UTF-8.") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(_syntax_message(path, text.replace("\r\n", "\n"), str(error))) from error


def merge(table: Mapping[str, Any], overrides: Iterable[str]) -> dict:
    """Returns a copy of `table` with the overrides applied in order, so that the last one for a key wins.

    Each override is one TOML line, `dotted.key=value`. An inline table replaces the whole table, which is the way to
    switch to another kind: `data={kind="text", root="corpus"}`. A value that is not TOML (`data.root=/tmp/x`, whose
    quotes the shell ate) is kept as unquoted text, which `build` accepts where the field is text.

    >>> merge({"seed": 0, "model": {"num_heads": 4}}, ["model.num_heads=8", "model.bias=true"])
    {'seed': 0, 'model': {'num_heads': 8, 'bias': True}}
    """
    merged = copy.deepcopy(dict(table))
    for text in overrides:
        keys, value = parse_override(text)
        inner = merged
        for depth, key in enumerate(keys[:-1], start=1):
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"override {text!r}: {'.'.join(keys[:depth])} is {show(inner)}, not a table, so it has no key "
                    f"{keys[depth]}; override {'.'.join(keys[:depth])} as a whole."
                )
        inner[keys[-1]] = value
    return merged


def parse_override(text: str) -> tuple[list[str], Any]:
    """Splits `a.b=value` into (["a", "b"], value)."""
    key, equals, raw = (part.strip() for part in text.partition("="))
    try:
        node = tomllib.loads(f"{key}=0") if equals and "\n" not in text else None
    except ValueError:
        node = None
    if not node:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise ConfigError(f"override {shown!r}: this is not key=value; write one such as model.num_heads=8.")
    if not raw:
        raise ConfigError(f"""override {text!r}: the value is missing; for empty text write '{key}=""'.""")
    keys = []
    while isinstance(node, dict):
        keys += node
        node = node[keys[-1]]
    try:
        value: Any = tomllib.loads(text)
    except ValueError:
        return keys, Unquoted(raw)
    for name in keys:
        value = value[name]
    return keys, value


def _syntax_message(path: Path, text: str, problem: str) -> str:
    lines = text.rstrip("\n").split("\n")
    found = re.search(r" \(at line (\d+), column (\d+)\)$", problem)
    if found:
        line, column = int(found[1]), int(found[2])
    else:  # "(at end of document)"
        line, column = len(lines), len(lines[-1]) + 1
    shown = lines[line - 1] if line <= len(lines) else ""
    hint = '; text needs quotes: key = "text"' if problem.startswith("Invalid value") else ""
    reason = re.sub(r" \(at .*\)$", "", problem)
    shown, column_shown = _window(shown, column)
    margin = " " * len(str(line))
    caret = re.sub(r"[^\t]", " ", shown[: column_shown - 1])  # tabs kept, so that the caret stands under its column
    return (
        f"{path}, line {line}, column {column}: this is not valid TOML ({reason}){hint}\n"
        f"  {line} | {shown}\n  {margin} | {caret}^"
    )


def _window(line: str, column: int, width: int = 100) -> tuple[str, int]:
    """The part of a long line around a column, and where the column is in it."""
    if len(line) <= width:
        return line, column
    start = min(max(column - 1 - width // 2, 0), len(line) - width)
    before, after = "…" if start else "", "…" if start + width < len(line) else ""
    return before + line[start : start + width] + after, column - start + len(before)


class Unquoted(str):
    """The value of an override that is not TOML; text if the field is text, else a mistake."""


def literal(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, str):  # JSON's escapes are TOML's, except for DEL, which TOML wants escaped
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        value = {name: item for name, item in fields.items() if item is not None}
    if isinstance(value, dict):
        inner = ", ".join(f"{key(name)} = {literal(item)}" for name, item in value.items())
        return f"{{{inner}}}"
    if type(value).__module__ == "datetime":
        return str(value)
    raise ValueError(f"toml.literal: a value must be bool, int, float, str, tuple or dataclass, got {value!r}.")


def show(value: Any, named: bool = True) -> str:
    """A value for a message, cut if long: `the string "8"`."""
    unquoted = isinstance(value, Unquoted)
    text = str(value) if unquoted else literal(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    name = "unquoted text" if unquoted else _TYPES.get(type(value), "date or time")
    return f"the {name} {text}" if named else text


def key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else literal(name)


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None
