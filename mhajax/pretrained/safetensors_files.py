"""A folder as `transformers` saves it: config.json, tokenizer.json, and model.safetensors, in one file or in shards.

config.json  tokenizer.json  model.safetensors
config.json  tokenizer.json  model.safetensors.index.json  model-00001-of-00002.safetensors  …
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from mhajax.pretrained.source import UnreadableFile, need, no_tensor, read_bytes, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SINGLE, INDEX, CONFIG, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_MOST_HEADER = 100_000_000  # bytes, as the format has it
_SHARD = 2 << 30
_PROBE = (
    "a \u0378"  # a character that no vocabulary has: a missing unknown token is told at once, not in somebody's text
)


@dataclass(frozen=True)
class SafetensorsFiles:
    """A `Source` of a folder, or of one file beside its config.json.

    Attributes:
      path: of the folder or file.
      config: what config.json holds.
      files: which file has a tensor, by its name.
      shapes: by name.
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """As the files call them."""
        return tuple(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Source.shape`."""
        if name not in self.shapes:
            raise no_tensor(self.path, name, self.names)
        return self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        """As `Source.read`; bfloat16 is `jax.numpy.bfloat16`."""
        shape, path = self.shape(name), self.files[name]
        with _opened(path) as file:
            try:
                array = file.get_tensor(name)
            except Exception as error:
                raise UnreadableFile(f"{path}: {name} cannot be read ({error}).") from None
        if array.shape != shape:
            raise UnreadableFile(f"{path}: {name} was {shape} when it was opened, got {array.shape}; it was replaced.")
        return array

    def tokenizer(self) -> Tokenizer:
        """What tokenizer.json holds, without padding and truncation: a file may have them of somebody's batches."""
        need("tokenizers")
        from tokenizers import Tokenizer

        path = (self.path if self.path.is_dir() else self.path.parent) / TOKENIZER
        data = read_bytes(path)
        try:
            tokenizer = Tokenizer.from_buffer(data)
            tokenizer.encode(_PROBE)
        except BaseException as error:  # the package raises plain Exceptions, and PanicException, which is none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UnreadableFile(f"{path}: is no tokenizer that the package tokenizers reads ({error}).") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def open_safetensors(path: Path | str) -> SafetensorsFiles:
    """Config and table of tensors of a folder; no numbers are read yet.

    Args:
      path: the folder, or one file of weights in it.

    Returns:
      A `Source`.

    Raises:
      FileNotFoundError: config.json, the weights, or a shard that the index names is missing.
      UnreadableFile: a file is damaged, a tensor is of a dtype that is not read here, or shards and index do not agree.
      ImportError: the package safetensors is not installed.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG)
    if path != folder:
        weights = {path: None}
    elif (path / SINGLE).exists() or not (path / INDEX).exists():
        weights = {path / SINGLE: None}
    else:
        weights = _index(path / INDEX)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, expected in weights.items():
        found = _shapes(file)
        if expected is not None and set(found) != expected:
            missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
            raise UnreadableFile(
                f"{file}: must have the tensors that {INDEX} gives it (missing: {', '.join(missing[:5]) or 'none'}; "
                f"not in the index: {', '.join(unknown[:5]) or 'none'}); they are not of one model, or one is damaged."
            )
        files |= dict.fromkeys(found, file)
        shapes |= found
    return SafetensorsFiles(path, config, files, shapes)


def write_safetensors(
    folder: Path | str,
    tensors: Iterable[tuple[str, Any]],
    config: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    shard_size: int = _SHARD,
) -> Path:
    """Write a folder that `transformers` loads bit for bit, and `open_safetensors`.

    Tensors are written shard by shard, so that no more than one shard of them is in memory here. Files are written
    beside their place and renamed, config.json last: a folder with a config.json is whole.

    Args:
      folder: made where it is not there.
      tensors: (name, array) pairs of NumPy or JAX, as Hugging Face names them; a generator will do.
      config: of config.json.
      tokenizer: of tokenizer.json; None: none is written.
      shard_size: bytes of one file; a tensor is never cut.

    Returns:
      The folder.

    Raises:
      ValueError: the folder holds a model already, a name comes twice, there are no tensors, or a dtype has no name in
        the format.
      OSError: it cannot be written.
    """
    need("safetensors")
    from safetensors.numpy import save_file

    folder = Path(folder)
    there = sorted(path.name for path in folder.glob("*.safetensors*")) if folder.is_dir() else []
    if there:
        raise ValueError(f"pretrained.write_safetensors: {folder} holds {there[0]} already; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    weight_map: dict[str, int] = {}
    total = 0
    try:
        for shard in _shards(tensors, shard_size):
            twice = [name for name in shard if name in weight_map]
            if twice:
                raise ValueError(f"pretrained.write_safetensors: the tensor {twice[0]} comes twice.")
            parts.append(folder / f"model-{len(parts)}.part")
            save_file(shard, parts[-1], metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, len(parts) - 1)
            total += sum(array.nbytes for array in shard.values())
        if not parts:
            raise ValueError("pretrained.write_safetensors: got no tensors.")
        names = (
            [SINGLE]
            if len(parts) == 1
            else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
        )
        for part, name in zip(parts, names, strict=True):
            os.replace(part, folder / name)
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        raise
    if len(names) > 1:
        placed = {name: names[i] for name, i in sorted(weight_map.items())}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    if tokenizer is not None:
        tokenizer.save(str(folder / TOKENIZER))
    _write_json(folder / CONFIG, config)
    return folder


def _opened(path: Path) -> Any:
    need("safetensors")
    from safetensors import safe_open

    try:
        return safe_open(path, "numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file.") from None
    except Exception as error:  # SafetensorError, OSError
        raise UnreadableFile(f"{path}: is truncated, damaged, or no safetensors file ({error}).") from None


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name; the package checks that the tensors cover the file, and nothing twice."""
    with _opened(path) as file:
        _check_names(path)
        shapes = {}
        for name in file.keys():  # noqa: SIM118, it is no dict
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise UnreadableFile(
                    f"{path}: {name} is stored as {part.get_dtype()}, which is not read here; those are "
                    f"{', '.join(_DTYPES)}."
                )
            shapes[name] = tuple(part.get_shape())
    return shapes


def _check_names(path: Path) -> None:
    """Of a name that the header has twice, the package takes the last in silence."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, _MOST_HEADER))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len({*names}) < len(names) else []
        if twice:
            raise UnreadableFile(f"{path}: the header has {twice[0]} twice; the file is damaged.")
        return dict(pairs)

    json.loads(header, object_pairs_hook=once)


def _index(path: Path) -> dict[Path, set[str]]:
    """Which tensors a shard must have; the shards in their order, all beside the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableFile(
            f'{path}: must have "weight_map", an object of file names by tensor, got {weight_map!r:.60}.'
        )
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w. -]{1,200}", file, re.ASCII):
            raise UnreadableFile(f"{path}: {name} must be in a file of this folder, got {file!r:.60}.")
        shards.setdefault(path.parent / file, set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: there is no such file, and {path.name} says that tensors are in it.")
    return shards


def _shards(tensors: Iterable[tuple[str, Any]], size: int) -> Iterable[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    total = 0
    for name, value in tensors:
        array = np.ascontiguousarray(value).reshape(np.shape(value))  # the package writes memory as it lies
        if array.dtype.newbyteorder("=") not in {np.dtype(dtype) for dtype in _DTYPES.values()}:
            raise ValueError(f"pretrained.write_safetensors: {name} has the dtype {array.dtype}, which is not written.")
        if name in shard:
            raise ValueError(f"pretrained.write_safetensors: the tensor {name} comes twice.")
        if shard and total + array.nbytes > size:
            yield shard
            shard, total = {}, 0
        shard[name] = array
        total += array.nbytes
    if shard:
        yield shard


def _write_json(path: Path, value: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
