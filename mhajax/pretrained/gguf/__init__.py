"""GGUF, the format of llama.cpp: config, tokenizer and weights in one file, quantised or not.

container    what a file says of itself, every count and offset checked
quantised    F32, F16, BF16, Q8_0, Q4_0, Q4_1 to floating point
names        keys and tensors as Hugging Face calls them, and its order of the rows of q and k
tokenizer    byte-level BPE from the metadata
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhajax.pretrained.gguf import container, names
from mhajax.pretrained.gguf import tokenizer as _tokenizer
from mhajax.pretrained.gguf.container import MAGIC, Contents
from mhajax.pretrained.source import no_tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MAGIC", "Gguf", "open_gguf"]


@dataclass(frozen=True)
class Gguf:
    """A `Source` of a GGUF file.

    Attributes:
      contents: what the file says of itself, in its own words.
      config: the keys of a config.json.
      stored: the file's names of the tensors by Hugging Face's.
      orders: by the file's name, what brings the rows into Hugging Face's order.
    """

    contents: Contents
    config: dict[str, Any]
    stored: dict[str, str]
    orders: dict[str, Callable[[np.ndarray], np.ndarray]]

    @property
    def path(self) -> Path:
        """The file."""
        return self.contents.path

    @property
    def names(self) -> tuple[str, ...]:
        """As Hugging Face calls them."""
        return tuple(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Source.shape`."""
        return self.contents.tensors[self._stored(name)].shape

    def read(self, name: str) -> np.ndarray:
        """As `Source.read`: float32 of what is quantised."""
        stored = self._stored(name)
        array = self.contents.read(stored)
        return self.orders[stored](array) if stored in self.orders else array

    def tokenizer(self) -> Tokenizer:
        """As `Source.tokenizer`, from the metadata."""
        return _tokenizer.tokenizer_of(self.contents)

    def _stored(self, name: str) -> str:
        if name not in self.stored:
            raise no_tensor(self.path, name, self.names)
        return self.stored[name]


def open_gguf(path: Path | str) -> Gguf:
    """Metadata and table of tensors of a file; no numbers are read yet.

    Args:
      path: of the file, a Llama-like model of GGUF version 3.

    Returns:
      A `Source`.

    Raises:
      FileNotFoundError: there is no such file.
      UnreadableFile: it is damaged, or of a version, an architecture or a type of numbers that is not read here.
    """
    contents = container.read(Path(path))
    config = names.config_of(contents)
    stored = names.tensor_names(contents)
    orders = {name: names.rows_order(contents, config, name) for name in stored.values()}
    known = {name: order for name, order in orders.items() if order is not None}
    return Gguf(contents, config, stored, known)
