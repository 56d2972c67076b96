"""What a family of models sees of a file: a config, names, shapes, one tensor at a time, a tokenizer."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHOWN = 5  # names in an error


class UnreadableFile(ValueError):
    """A file is damaged, or holds what is not read here; the message names the file, and the tensor if there is one."""


class Source(Protocol):
    """A model on disk, as Hugging Face names its parts, whatever the container.

    Attributes:
      path: the folder or file, for errors.
      config: the keys of a config.json of `transformers`; nothing of it has been interpreted.
      names: every tensor, as in the state_dict of `transformers`: "model.layers.0.self_attn.q_proj.weight".
    """

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it; a matrix is [out, in].

        Raises:
          UnreadableFile: there is no tensor of that name.
        """
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, an array of its own: in its stored dtype, float32 where it is quantised.

        Raises:
          UnreadableFile: there is no tensor of that name, or the file is damaged there.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model.

        Raises:
          FileNotFoundError: there is none.
          UnreadableFile: it is damaged, or of a kind that is not read here.
        """
        ...


@dataclass(frozen=True)
class Arrays:
    """A `Source` of arrays that are in memory already.

    Attributes:
      arrays: by name.
      config: the keys of a config.json.
      path: what errors shall call it.

    >>> source = Arrays({"wte.weight": np.zeros((7, 3))}, {"model_type": "gpt2"})
    >>> take(source, "wte.weight", (7, 3)).shape
    (7, 3)
    >>> take(source, "wte.weight", (5, 3))
    Traceback (most recent call last):
    mhajax.pretrained.source.UnreadableFile: arrays: wte.weight must be (5, 3), got (7, 3), which is another model's.
    """

    arrays: Mapping[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    path: Path = Path("arrays")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Source.shape`."""
        return tuple(self._array(name).shape)

    def read(self, name: str) -> np.ndarray:
        """As `Source.read`."""
        return np.array(self._array(name))

    def tokenizer(self) -> Tokenizer:
        """Raises: FileNotFoundError, arrays have none."""
        raise FileNotFoundError(f"{self.path}: arrays have no tokenizer; hand over the model's own.")

    def _array(self, name: str) -> Any:
        if name not in self.arrays:
            raise no_tensor(self.path, name, self.names)
        return self.arrays[name]


def take(source: Source, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a shape that the config tells.

    Args:
      source: where it is.
      name: as Hugging Face names it.
      shape: what it must be.

    Returns:
      The array, in the dtype of `source.read`.

    Raises:
      UnreadableFile: it is missing or has another shape; nothing of it was read.
    """
    _check_shape(source, name, shape)
    return source.read(name)


def check(source: Source, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
    """All tensors are those that a model needs, before any is read.

    Args:
      source: where they are.
      shapes: by name, of every tensor that the model needs.
      ignored: names, or patterns such as "*.position_ids", that may be there and are not needed.

    Raises:
      UnreadableFile: tensors are missing, have another shape, or nobody asks for them.
    """
    missing = [name for name in shapes if name not in set(source.names)]
    if missing:
        raise UnreadableFile(
            f"{source.path}: {len(missing)} of {len(shapes)} tensors are missing: {_some(missing)}; the file is not "
            "whole, or its config is of another model."
        )
    for name, shape in shapes.items():
        _check_shape(source, name, shape)
    check_all_read(source, shapes, ignored)


def check_all_read(source: Source, read: Iterable[str], ignored: Iterable[str] = ()) -> None:
    """No tensor is left: one that nobody reads belongs to a part that the model here does not have.

    Args:
      source: where they are.
      read: names that were read.
      ignored: names, or patterns such as "*.position_ids", that may be left.

    Raises:
      UnreadableFile: names are left; it shows them.
    """
    known, patterns = set(read), list(ignored)
    left = [
        name
        for name in source.names
        if name not in known and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if left:
        raise UnreadableFile(
            f"{source.path}: {len(left)} tensors belong to no part of this model: {_some(left)}; without them its "
            "answers would be others. The config is of another model, or this kind of model is not supported."
        )


def no_tensor(path: Path, name: str, names: Iterable[str]) -> UnreadableFile:
    """The error for a name that is not there."""
    import difflib

    near = difflib.get_close_matches(name, list(names), n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return UnreadableFile(f"{path}: there is no tensor {name}{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
      FileNotFoundError: it is not there.
      UnreadableFile: it cannot be read, is no JSON, no object, or has a key twice.
    """
    try:
        value = json.loads(read_bytes(path).decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if isinstance(error, UnreadableFile):
            raise
        raise UnreadableFile(f"{path}: must be JSON in UTF-8, got {error or type(error).__name__}.") from None
    if not isinstance(value, dict):
        raise UnreadableFile(f"{path}: must hold a JSON object {{…}}, got {type(value).__name__}.")
    return value


def read_bytes(path: Path) -> bytes:
    """The content of a small file.

    Raises:
      FileNotFoundError: it is not there.
      UnreadableFile: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror or error}).") from None


def need(package: str) -> None:
    """Refuse to go on without a package of the extra "pretrained".

    Raises:
      ImportError: with the command that installs it.
    """
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ImportError(f'pretrained: this file needs {package}; pip install "mhajax[pretrained]"')


def _check_shape(source: Source, name: str, shape: tuple[int, ...]) -> None:
    got = source.shape(name)
    if got != tuple(shape):
        raise UnreadableFile(f"{source.path}: {name} must be {tuple(shape)}, got {got}, which is another model's.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return value


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
