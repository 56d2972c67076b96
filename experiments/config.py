"""A config file of any kind of experiment, read and checked; the dataclasses are those of the kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import kinds, schema, toml
from experiments.data import paths
from experiments.errors import ConfigError
from experiments.tables import Training

LARGEST = 2**31 - 1  # what an int32 holds, and every number here becomes one somewhere


def read(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The config in a file, of the kind that the file names, with overrides such as `model.num_heads=8`.

    Relative paths of data are those of the config's folder or, if they are not there, of the current one; in an
    override it is the other way round. In the config that is returned they are absolute.

    Raises:
      ConfigError: the file cannot be read, is not TOML, or does not fit the experiment that its `kind` names.
      DataError: a file of data is in neither folder.
    """
    config = schema.read(path, kinds.configs(), overrides)
    if isinstance(config, Training) and config.model.vocab_size is not None:
        raise ConfigError(
            f"{path}: model.vocab_size must be left out, got {config.model.vocab_size}: it is that of the vocabulary; "
            "set vocabulary.size."
        )
    _check_numbers(config, str(path), "")
    found = {}
    for table in ("data", "base"):
        if hasattr(config, table):
            _check_paths(table, getattr(config, table), str(path))
            found[table] = paths.absolute(table, getattr(config, table), Path(path).parent, overrides)
    return dataclasses.replace(config, **found)


def _check_numbers(part: Any, where: str, table: str) -> None:
    """Refuse a whole number that a compiled program cannot count with."""
    for field_ in dataclasses.fields(part):
        value, key = getattr(part, field_.name), f"{table}{field_.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _check_numbers(value, where, f"{key}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -LARGEST - 1 <= number <= LARGEST:
                raise ConfigError(
                    f"{where}: {key} must be between {-LARGEST - 1:,} and {LARGEST:,}, got {toml.show(number)}."
                )


def _check_paths(table: str, data: Any, where: str) -> None:
    """Refuse text in [data] or [base] that can be no path."""
    for field_ in dataclasses.fields(data):
        value = getattr(data, field_.name)
        if isinstance(value, str):
            names = value.encode("utf-8", "surrogatepass")
            if b"\0" in names:
                raise ConfigError(f"{where}: {table}.{field_.name} must be a path without a NUL character, "
                                  f"got {toml.show(value)}.")  # fmt: skip
            if len(names) > 4000 or any(len(name) > 255 for name in names.split(b"/")):
                raise ConfigError(f"{where}: {table}.{field_.name} must be a path of at most 4,000 bytes whose every "
                                  f"name has at most 255, got {toml.show(value)} of {len(names):,}.")  # fmt: skip
