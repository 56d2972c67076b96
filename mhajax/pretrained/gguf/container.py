"""GGUF version 3: magic, counts, metadata, a table of tensors, their bytes. Nothing is believed before it is checked.

    "GGUF"  u32 version  u64 tensors  u64 keys
    keys    × (string, u32 type, value)                    a string is its u64 length and UTF-8
    tensors × (string, u32 axes, u64 sizes…, u32 type, u64 offset)      the last axis first
    padding to `general.alignment`, then the data; offsets count from there

A count is compared with the bytes that are left before anything of its size is allocated.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mhajax.pretrained.gguf import quantised
from mhajax.pretrained.source import UnreadableFile, no_tensor

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes that an entry has at least
_MOST_AXES = 4


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
      name: as the file calls it, "blk.0.attn_q.weight".
      shape: as NumPy has it: a matrix is [out, in].
      kind: how its numbers are stored, "Q4_1".
      start: of its bytes, from the beginning of the file.
      size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


@dataclass(frozen=True)
class Contents:
    """What a file says of itself; the numbers of the tensors stay on disk.

    Attributes:
      path: of the file.
      metadata: by key: int, float, bool, str, or a list of one of them.
      tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """The numbers of one tensor: float32, float16 or bfloat16; quantised ones as float32.

        Raises:
          UnreadableFile: there is no such tensor, its bytes are damaged, or the file ends before it does.
        """
        if name not in self.tensors:
            raise no_tensor(self.path, name, self.tensors)
        tensor = self.tensors[name]
        try:
            with self.path.open("rb") as file:
                raw = np.fromfile(file, np.uint8, count=tensor.size, offset=tensor.start)
        except OSError as error:
            raise UnreadableFile(f"{self.path}: {name} cannot be read ({error.strerror or error}).") from None
        if raw.size != tensor.size:
            raise UnreadableFile(
                f"{self.path}: {name} must have {tensor.size} bytes, got {raw.size}; the file was changed since it was "
                "opened."
            )
        try:
            return quantised.numbers(raw, tensor.kind).reshape(tensor.shape)
        except ValueError as error:
            raise UnreadableFile(f"{self.path}: {name}: {error}") from None


def read(path: Path) -> Contents:
    """Metadata and table of tensors of a file, all checked against its size.

    Args:
      path: of the file.

    Raises:
      FileNotFoundError: there is no such file.
      UnreadableFile: it is no GGUF of version 3, is truncated or damaged, or stores tensors in a way that is not read
        here; the message names file and tensor.
    """
    try:
        with path.open("rb") as file:
            return _contents(_Cursor(path, file, path.stat().st_size))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror or error}).") from None


class _Cursor:
    """Reads forward, and never past the end."""

    def __init__(self, path: Path, file: IO[bytes], size: int):
        self.path, self.file, self.left, self.size = path, file, size, size

    def bytes(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.error(f"{what} needs {count} bytes, and {self.left} are left; the file is truncated or damaged.")
        data = self.file.read(count)
        if len(data) != count:
            raise self.error(f"{what} ends too early; the file was changed while it was read.")
        self.left -= count
        return data

    def number(self, code: str, what: str) -> Any:
        data = self.bytes(struct.calcsize("<" + code), what)
        if code == "?" and data > b"\1":
            raise self.error(f"{what} must be true or false (1 or 0), got the byte {data[0]}; the file is damaged.")
        return struct.unpack("<" + code, data)[0]

    def string(self, what: str) -> str:
        data = self.bytes(int.from_bytes(self.bytes(8, what), "little"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} must be UTF-8, got {error.reason} at byte {error.start} of it.") from None

    def count(self, least: int, what: str) -> int:
        """A number of things that have at least so many bytes each."""
        count = self.number("Q", what)
        if count * least > self.left:
            raise self.error(f"{count} {what} need more than the {self.left} bytes that are left; the file is damaged.")
        return count

    def error(self, message: str) -> UnreadableFile:
        return UnreadableFile(f"{self.path}: {message}")


def _contents(cursor: _Cursor) -> Contents:
    magic = cursor.bytes(4, "the magic number")
    if magic != MAGIC:
        raise cursor.error(f"a GGUF file begins with {MAGIC!r}, got {magic!r}; this is another format.")
    version = cursor.number("I", "the version")
    if version != VERSION:
        big = " (it is big-endian)" if version == VERSION << 24 else ""
        raise cursor.error(f"GGUF version {VERSION} is read here, got {version}{big}; convert it with llama.cpp.")
    n_tensors = cursor.count(_LEAST_TENSOR, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(_LEAST_KEY, "keys")):
        key = cursor.string("a key of the metadata")
        if key in metadata:
            raise cursor.error(f"the metadata have the key {key} twice; the file is damaged.")
        metadata[key] = _value(cursor, key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.error(f"general.alignment must be a power of two, got {alignment!r}; the file is damaged.")
    table: dict[str, tuple[tuple[int, ...], str, int]] = {}
    for _ in range(n_tensors):
        name = cursor.string("the name of a tensor")
        if name in table:
            raise cursor.error(f"the tensor {name} is there twice; the file is damaged.")
        table[name] = _entry(cursor, name, alignment)
    data = -(-(cursor.size - cursor.left) // alignment) * alignment
    tensors = {
        name: Tensor(name, shape, kind, data + offset, quantised.size(kind, math.prod(shape)))
        for name, (shape, kind, offset) in table.items()
    }
    _check_places(cursor, list(tensors.values()))
    return Contents(cursor.path, metadata, tensors)


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.number("I", key)
    if kind == _ARRAY:
        return _array(cursor, key)
    return cursor.string(key) if kind == _STRING else cursor.number(_code(cursor, key, kind), key)


def _array(cursor: _Cursor, key: str) -> list[Any]:
    kind = cursor.number("I", key)
    if kind == _STRING:
        return [cursor.string(key) for _ in range(cursor.count(8, f"strings of {key}"))]
    if kind == _ARRAY:
        raise cursor.error(f"{key} is an array of arrays, which is not read here.")
    code = _code(cursor, key, kind)
    width = struct.calcsize("<" + code)
    data = cursor.bytes(width * cursor.count(width, f"numbers of {key}"), key)
    if code == "?" and data.strip(b"\0\1"):
        raise cursor.error(f"{key} must be of true and false (1 and 0), got other bytes; the file is damaged.")
    return np.frombuffer(data, np.dtype(f"<{code}" if width > 1 else code)).tolist()


def _code(cursor: _Cursor, key: str, kind: int) -> str:
    if kind not in _NUMBERS:
        raise cursor.error(f"{key} has a value of type {kind}, and GGUF has the types 0 to 12; the file is damaged.")
    return _NUMBERS[kind]


def _entry(cursor: _Cursor, name: str, alignment: int) -> tuple[tuple[int, ...], str, int]:
    axes = cursor.number("I", name)
    if not 1 <= axes <= _MOST_AXES:
        raise cursor.error(f"{name} must have 1 to {_MOST_AXES} axes, got {axes}; the file is damaged.")
    shape = tuple(reversed([cursor.number("Q", name) for _ in range(axes)]))
    if 0 in shape:
        raise cursor.error(f"{name} has no numbers, its shape is {shape}; the file is damaged.")
    number = cursor.number("I", name)
    kind = quantised.NAMES.get(number, f"number {number}")
    if kind not in quantised.KINDS:
        raise cursor.error(
            f"{name} is stored as {kind}, which is not read here; those are {', '.join(quantised.KINDS)}. Take a file "
            "in one of them (`llama-quantize --allow-requantize` makes one)."
        )
    weights = quantised.KINDS[kind].weights
    if shape[-1] % weights:
        raise cursor.error(f"{name} is stored as {kind} in blocks of {weights}, which do not divide {shape}.")
    offset = cursor.number("Q", name)
    if offset % alignment:
        raise cursor.error(f"{name} lies at {offset}, which is no multiple of the alignment {alignment}.")
    return shape, kind, offset


def _check_places(cursor: _Cursor, tensors: list[Tensor]) -> None:
    """All inside the file, and none upon another."""
    before: Tensor | None = None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start + tensor.size > cursor.size:
            raise cursor.error(
                f"{tensor.name} {tensor.shape} is at bytes {tensor.start} to {tensor.start + tensor.size}, and the "
                f"file has {cursor.size}; it is truncated or damaged."
            )
        if before is not None and tensor.start < before.start + before.size:
            raise cursor.error(f"{before.name} and {tensor.name} overlap; the file is damaged.")
        before = tensor
