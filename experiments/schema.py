"""TOML files as frozen dataclasses, and back.

The dataclass is the schema: its field names are the keys, its annotations the types, its defaults the defaults, and a
nested dataclass is a table. Nothing is declared twice, and nothing in a file is ignored: a key that no field has is
an error. This module knows nothing about the experiments.

A field may be `bool`, `int`, `float`, `str`, `Literal[...]`, `tuple[X, ...]`, a dataclass, any of these `| None`, or
a union of dataclasses, each with a field `kind: Literal["..."]` by which the file says which one it means.

Three rules that are not obvious:

* TOML has no null. An `X | None` field that is left out takes its default, or None if it has none.
* If a field's default is a dataclass instance, the keys that a file leaves out of that table keep the values of that
  instance, not those of its class. So `model.num_heads=8` changes one number whether or not the file has a `[model]`.
  What follows from other fields is therefore better a property than set in `__post_init__`.
* Checks across fields live in `__post_init__`: its ValueError becomes a ConfigError that names the table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from experiments import toml
from experiments.errors import ConfigError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
_EXAMPLES = {bool: "true", int: "8", float: "0.1", str: '"name"'}


def read(path: str | Path, schema: Any, overrides: Sequence[str] = ()) -> Any:
    """Reads a config file, applies the overrides and returns the checked config.

    Args:
      path: a TOML file in UTF-8.
      schema: the dataclass of the whole file, or a union of dataclasses of which the file's `kind` names one.
      overrides: TOML lines, `model.num_heads=8`; see `merge`.

    Raises:
      ConfigError: the file cannot be read, is not TOML, or does not fit the schema.
    """
    table = toml.load(Path(path))
    try:
        table = toml.merge(table, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from None
    typed: dict[str, str] = {}
    for text in overrides:
        typed[".".join(toml.parse_override(text)[0])] = text  # of two for one key the last counts, as in merge
    return _build(table, schema, str(path), typed)


def build(table: dict, schema: Any, *, where: str = "config") -> Any:
    """Turns a parsed TOML table into the dataclass `schema`; `where` is what error messages call the source."""
    return _build(table, schema, where, {})


def to_toml(config: Any) -> str:
    """Writes a config as TOML text, every default spelled out; fields that are None are left out.

    `build(tomllib.loads(to_toml(config)), type(config)) == config` is checked before the text is returned, because a
    resolved config that reads back as something else is worse than none.

    Raises:
      ValueError: a value has no TOML form, such as None in a field whose default is not None.
      ConfigError: a value that `build` would refuse, such as NaN.
    """
    lines: list[str] = []

    def write(part: Any, path: str) -> None:
        tables = []
        for name in _fields(type(part)):
            value = getattr(part, name)
            if dataclasses.is_dataclass(value):
                tables.append((name, value))
            elif value is not None:
                lines.append(f"{toml.key(name)} = {toml.literal(value)}")
        for name, value in tables:  # after the plain keys, which would else fall into the table above them
            child = _join(path, toml.key(name))
            lines.extend(([""] if lines else []) + [f"[{child}]"])
            write(value, child)

    write(config, "")
    text = "\n".join(lines) + "\n"
    again = build(tomllib.loads(text), type(config), where="to_toml")
    if again != config:
        raise ValueError(
            f"schema.to_toml: {type(config).__name__} must read back from TOML as itself, got {again} from {config}; "
            "a field that may be None needs None as its default, for TOML has no null."
        )
    return text


@functools.cache
def _fields(schema: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The keys of a table: name -> (field, resolved type)."""
    hints = get_type_hints(schema)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(schema) if field.init}


def _alternatives(hint: Any) -> list[Any]:
    """The types a field may have, None aside: one type, or several dataclasses."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    members = [member for member in members if member is not types.NoneType]
    plain = len(members) == 1 and (
        members[0] in _WORDS
        or get_origin(members[0]) is Literal
        or (get_origin(members[0]) is tuple and get_args(members[0])[1:] == (...,))
    )
    if not plain and not all(isinstance(m, type) and dataclasses.is_dataclass(m) for m in members):
        raise TypeError(
            f"schema: a field must be bool, int, float, str, Literal, tuple[X, ...], a dataclass, one of these | None, "
            f"or a union of dataclasses, got {hint}."
        )
    return members


def _optional(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def _kinds(members: list[type]) -> dict[str, type]:
    """The dataclasses of a union by their `kind`."""
    kinds: dict[str, type] = {}
    for member in members:
        hint = _fields(member)["kind"][1] if "kind" in _fields(member) else None
        if get_origin(hint) is not Literal or kinds.keys() & set(get_args(hint)):
            raise TypeError(f'schema: {member.__name__} is in a union, so it must have its own kind: Literal["..."].')
        kinds |= dict.fromkeys(get_args(hint), member)
    return kinds


def _homes(schema: type, path: str = "", home: str = "", inside: tuple = ()) -> Iterator[tuple[str, str]]:
    """Yields every key of a schema with the table it belongs to; refuses a schema that this module cannot read."""
    for name, (_, hint) in _fields(schema).items():
        yield name, home or "the top of the file, before the first [table]"
        members, brackets = _alternatives(hint), "[{}]"
        while get_origin(members[0]) is tuple:
            members, brackets = _alternatives(get_args(members[0])[0]), "[[{}]]"
        kinds = _kinds(members) if len(members) > 1 else dict.fromkeys([""], members[0])
        for kind, member in kinds.items():
            if isinstance(member, type) and dataclasses.is_dataclass(member) and member not in inside:
                child = _join(path, name)
                label = brackets.format(child) + (f" with kind = {toml.literal(kind)}" if kind else "")
                yield from _homes(member, child, label, (*inside, member))


def _describe(hint: Any) -> tuple[str, str]:
    """A type in words that a user of a config file knows, and an example of it in TOML."""
    first = _alternatives(hint)[0]
    if get_origin(first) is Literal:
        return f"{'one of ' if len(get_args(first)) > 1 else ''}{_listed(get_args(first))}", toml.literal(
            get_args(first)[0]
        )
    if get_origin(first) is tuple:
        words, example = _describe(get_args(first)[0])
        return f"an array whose every element is {words}", f"[{example}, {example}]"
    return (_WORDS[first], _EXAMPLES[first]) if first in _WORDS else ("a table", "{...}")


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where values come from, for the messages: the file, the whole schema, and dotted key -> override as typed."""

    where: str
    schema: type
    overrides: Mapping[str, str]
    trial: bool = False  # a value is only tried, so that its message needs no advice

    def error(self, path: str, message: str) -> ConfigError:
        touching = [text for key, text in self.overrides.items() if _within(path, key) or _within(key, path)]
        return ConfigError(", ".join([self.where, *(f"override {text!r}" for text in touching)]) + f": {message}")

    def line(self, path: str, literal: str) -> str:
        """What to write at `path`: a line of the file, or an override in the quotes that the shell needs."""
        if path.endswith("]"):
            return literal
        overridden = "[" not in path and any(_within(path, key) for key in self.overrides)
        return f"'{path}={literal}'" if overridden else f"{path.rpartition('.')[2]} = {literal}"


def _build(table: dict, schema: Any, where: str, typed: dict[str, str]) -> Any:
    members = _alternatives(schema)
    for member in members:
        if not (isinstance(member, type) and dataclasses.is_dataclass(member)):
            raise TypeError(f"schema.build: schema must be a dataclass or a union of them, got {schema}.")
        for _ in _homes(member):  # a schema that cannot be read is refused now, not when a file first uses that field
            pass
    chosen = _of_kind(table, members, "", _Source(where, members[0], typed))
    return _table(table, [chosen], "", _Source(where, chosen, typed), dataclasses.MISSING)


def _of_kind(table: dict, members: list[type], path: str, source: _Source) -> type:
    """The one of the dataclasses `members` that the table's `kind` names."""
    if len(members) == 1:
        return members[0]
    kinds, key = _kinds(members), _join(path, "kind")
    if "kind" not in table:
        lines = " or ".join(f"kind = {toml.literal(kind)}" for kind in kinds)
        what = f"which [{path}] this is" if path else "what this config is for"
        raise source.error(key, f"{key} is missing: it says {what}; write {lines}.")
    return kinds[_choice(table["kind"], Literal[tuple(kinds)], key, source)]  # type: ignore


def _table(value: Any, members: list[type], path: str, source: _Source, default: Any) -> Any:
    """Builds one of the dataclasses `members`; keys that are left out come from the instance `default`, if any."""
    if not isinstance(value, dict):
        example = source.line(path, '{key = 1, word = "text"}')
        message = f"{path or 'the config'} must be a table, got {toml.show(value)}"
        raise source.error(path, f"{message}; write [{path}] and its keys below it, or {example}")
    schema = _of_kind(value, members, path, source)
    if any(key not in _fields(schema) for key in value):
        raise _unknown_keys(value, schema, path, source)
    arguments = {}
    for name, (field, hint) in _fields(schema).items():
        child = _join(path, name)
        if type(default) is schema:
            preset = getattr(default, name)
        else:
            factory = field.default_factory
            preset = field.default if factory is dataclasses.MISSING else factory()
        alternatives = _alternatives(hint)
        if name in value:
            arguments[name] = _convert(value[name], hint, child, source, preset)
        elif preset is not dataclasses.MISSING:
            arguments[name] = preset
        elif _optional(hint):
            arguments[name] = None
        elif len(alternatives) == 1 and dataclasses.is_dataclass(alternatives[0]):
            arguments[name] = _table({}, alternatives, child, source, dataclasses.MISSING)
        elif len(alternatives) > 1:
            kinds = _listed(_kinds(alternatives))
            raise source.error(child, f"the table [{child}] is missing; write [{child}] and, below it, kind = {kinds}.")
        else:
            words, example = _describe(hint)
            place = f" in [{path}]" if path else " at the top of the file"
            line = f"{name} = {example}"
            raise source.error(child, f"{child} is missing: it must be {words}, for example {line}{place}.")
    try:
        return schema(**arguments)
    except ValueError as error:
        raise source.error(path, f"[{path}] {error}" if path else str(error)) from error


def _convert(value: Any, hint: Any, path: str, source: _Source, default: Any = dataclasses.MISSING) -> Any:
    """Checks one value against its type and returns it as that type."""
    alternatives = _alternatives(hint)
    kind = alternatives[0]
    if dataclasses.is_dataclass(kind):
        return _table(value, alternatives, path, source, default)
    if get_origin(kind) is Literal:
        return _choice(value, kind, path, source)
    if get_origin(kind) is tuple and isinstance(value, list):
        element = get_args(kind)[0]
        return tuple(_convert(item, element, f"{path}[{i}]", source) for i, item in enumerate(value))
    if isinstance(value, toml.Unquoted):
        if kind is str and value[0] not in "\"'[{":  # those begin TOML that went wrong, not text without quotes
            return str(value)
        raise _wrong_type(value, hint, path, source)
    if kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise source.error(path, f"{path} must be a finite number, got {toml.show(value)}.")
        return number
    if type(value) is not kind:  # and not isinstance: true is an int to Python, but not to a user
        raise _wrong_type(value, hint, path, source)
    return value


def _choice(value: Any, literal: Any, path: str, source: _Source) -> Any:
    allowed = get_args(literal)
    if isinstance(value, toml.Unquoted) and value in allowed:  # what is meant is clear without quotes
        return str(value)
    for item in allowed:
        if type(item) is type(value) and item == value:
            return item
    words, _ = _describe(literal)
    message = f"{path} must be {words}, got {toml.show(value)}"
    near = toml.nearest(str(value), [str(item) for item in allowed])
    if near is None:
        raise source.error(path, message + ".")
    meant = toml.literal(next(item for item in allowed if str(item) == near))
    advice = f"write {source.line(path, meant)}" if near == str(value) else f"did you mean {meant}?"
    raise source.error(path, f"{message}; {advice}")


def _wrong_type(value: Any, hint: Any, path: str, source: _Source) -> ConfigError:
    words, example = _describe(hint)
    message = f"{path} must be {words}, got {toml.show(value)}"
    if isinstance(value, str) and value.lower() in ("none", "null") and _optional(hint):
        return source.error(path, f"{message}; TOML has no null: leave the key out instead.")
    if source.trial:
        return source.error(path, message)
    for text in _repairs(value):
        try:
            _convert(tomllib.loads(f"x = {text}")["x"], hint, path, dataclasses.replace(source, trial=True))
        except (ValueError, ConfigError):
            continue
        return source.error(path, f"{message}; write {source.line(path, text)}")
    return source.error(path, f"{message}; an example: {source.line(path, example)}")


def _repairs(value: Any) -> list[str]:
    """TOML texts that a user may have meant by `value`, for `_wrong_type` to try."""
    if isinstance(value, (list, dict)):
        return []
    bare = (str(value) if isinstance(value, str) else toml.literal(value)).strip(" \"'")
    number = (f"0{bare}" if bare.startswith(".") else bare).removesuffix(".0").removesuffix(".")
    boolean = {"0": "false", "1": "true"}.get(bare, bare.lower())
    words = [part.strip(" \"'") for part in bare.strip("[]").split(",")]
    return [bare, number, boolean, f"[{bare}]", toml.literal(bare), toml.literal(words)]


def _unknown_keys(table: dict, schema: type, path: str, source: _Source) -> ConfigError:
    """All unknown keys of one table, each with where it belongs or what it may have been meant to be."""
    known, homes = list(_fields(schema)), dict[str, str]()
    for key, home in _homes(source.schema):
        homes[key] = f"{homes[key]} or {home}" if key in homes and home not in homes[key] else home
    lines, ending = [], ""
    unknown = [key for key in table if key not in known]
    for key in unknown:
        child = _join(path, toml.key(key))
        if isinstance(table[key], dict):
            line = f"[{child}] is not a known table"
        else:
            line = f"{child} = {toml.show(table[key], named=False)} is not a known key"
        near, afar = toml.nearest(key, known), toml.nearest(key, homes)
        if key in homes:
            line += f"; {key} belongs to {homes[key]}"
        if near:
            line += f"; {'here, ' if key in homes else ''}did you mean {near}?"
        elif afar and key not in homes:
            line += f"; did you mean {afar}, which belongs to {homes[afar]}?"
        elif key not in homes:
            ending = f"\nThe keys of {f'[{path}]' if path else 'the top level'} are {', '.join(known) or 'none'}."
        lines.append(line)
    if _join(path, "kind") in source.overrides and path:
        whole = f"{path}={{kind = {toml.literal(table['kind'])}}}"
        ending += f"\nThe file's [{path}] is of another kind; to replace all of it write '{whole}'."
    if len(lines) == 1:
        return source.error(_join(path, unknown[0]), lines[0] + ending)
    return source.error(path, f"{len(lines)} unknown keys:\n  " + "\n  ".join(lines) + ending)


def _listed(values: Iterable[Any]) -> str:
    texts = [toml.literal(value) for value in values]
    return ", ".join(texts[:-1]) + (" or " if len(texts) > 1 else "") + texts[-1]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _within(path: str, table: str) -> bool:
    return not table or path == table or path.startswith((f"{table}.", f"{table}["))
