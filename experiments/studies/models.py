"""Pretrained models for studies: opened by name, and texts in batches for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.pretrained_files import locate
from experiments.errors import DataError
from mhajax import pretrained
from mhajax.pretrained import Pretrained


class Batch(NamedTuple):
    """Texts of about one length, padded on the right.

    Attributes:
      tokens: integers [B, T]; 0 where there is none.
      lengths: of each text, [B]; 0 in rows that fill the batch up.
      index: number of the text, [B]; -1 in rows that fill the batch up.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    index: np.ndarray


def load(name: str) -> Pretrained:
    """A model by name ("minilm", "smollm2"), or from a file or folder.

    Raises:
      DataError: it is not there, or cannot be read.
    """
    try:
        return pretrained.load(locate(name))
    except (pretrained.UnreadableFile, FileNotFoundError) as error:
        raise DataError(str(error)) from None


def shuffled(params: Any, seed: int = 0) -> Any:
    """Parameters with the numbers of each array in random order, of a stack within each layer: every scale stays.

    Args:
      params: of a model of one stack, with `stack.layers`, every leaf [L, ...].
      seed: of the order.
    """
    random = np.random.default_rng(seed)
    whole = lambda a: random.permutation(np.asarray(a).ravel()).reshape(a.shape)  # noqa: E731
    layers = jax.tree.map(lambda a: jnp.asarray(np.stack([whole(part) for part in np.asarray(a)])), params.stack.layers)
    others = jax.tree.map(lambda a: jnp.asarray(whole(a)), params._replace(stack=params.stack._replace(layers=None)))
    return others._replace(stack=others.stack._replace(layers=layers))


def digest(name: str) -> str:
    """SHA-256 of the weights of a model, for `hashes` of a study.

    Raises:
      DataError: it is not there.
    """
    path = locate(name)
    files = [path] if path.is_file() else sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.gguf")])
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def batches(texts: Sequence[Sequence[int]], *, tokens: int = 2048, step: int = 16) -> Iterator[Batch]:
    """Every text once, short ones first, each batch with about as many tokens: few shapes, so few compilations.

    Args:
      texts: tokens of each.
      tokens: of a batch, padding included.
      step: lengths are rounded up to a multiple of it.

    >>> [batch.tokens.shape for batch in batches([[1] * 3, [2] * 4, [3] * 9], tokens=16, step=4)]
    [(4, 4), (1, 12)]
    """
    rounded = [-(-max(len(text), 1) // step) * step for text in texts]
    for length in sorted(set(rounded)):
        members = [number for number, size in enumerate(rounded) if size == length]
        rows = max(tokens // length, 1)
        for start in range(0, len(members), rows):
            some = members[start : start + rows]
            batch = Batch(np.zeros((rows, length), np.int32), np.zeros(rows, np.int32), np.full(rows, -1))
            for row, number in enumerate(some):
                text = texts[number]
                batch.tokens[row, : len(text)] = text
                batch.lengths[row], batch.index[row] = len(text), number
            yield batch
