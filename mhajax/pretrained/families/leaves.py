"""Where each tensor of a file stands in our parameters, and how it is laid out there: read by load and by save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Turn = Callable[[np.ndarray], np.ndarray]


class Leaf(NamedTuple):
    """A leaf of our parameters, and the tensors that it is made of.

    Attributes:
      path: its place, such as "stack.layers.attention.w_q".
      names: of the tensors, as Hugging Face names them: one for each layer, or a single one.
      shape: of each of them there.
      ours: from such a tensor to the leaf, or to its part of one layer.
      theirs: back.
      stacked: whether the leaf has an axis of layers in front.
      part: what of the tensors belongs to this leaf; the others' parts are other leaves'. None: all.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    ours: Turn
    theirs: Turn
    stacked: bool
    part: Any = None


def same(array: np.ndarray) -> np.ndarray:
    """As it is."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """A matrix turned."""
    return array.T


def single(path: str, name: str, shape: tuple[int, ...], ours: Turn = same, theirs: Turn = same) -> Leaf:
    """A leaf that is one tensor."""
    return Leaf(path, (name,), shape, ours, theirs, stacked=False)


class Layers:
    """Leaves of a stack of layers.

    Args:
      path: of the stack's layers in our parameters, such as "stack.layers".
      name: of a layer in the file, with "{}" for its number.
      numbers: of the layers, in their order; a layer that is shared has the same number again and again.
    """

    def __init__(self, path: str, name: str, numbers: Sequence[int]):
        self.path, self.name, self.numbers = path, name, tuple(numbers)
        self.leaves: list[Leaf] = []

    def add(
        self, leaf: str, tensor: str, shape: tuple[int, ...], ours: Turn = same, theirs: Turn = same, part: Any = None
    ):
        """A leaf of every layer, from one tensor of it."""
        names = tuple(f"{self.name.format(number)}.{tensor}" for number in self.numbers)
        self.leaves.append(Leaf(f"{self.path}.{leaf}", names, shape, ours, theirs, stacked=True, part=part))

    def norm(self, leaf: str, tensor: str, width: int, shift: bool) -> None:
        """A normalisation."""
        self.add(f"{leaf}.scale", f"{tensor}.weight", (width,))
        if shift:
            self.add(f"{leaf}.shift", f"{tensor}.bias", (width,))

    def matrix(self, weight: str, bias: str | None, tensor: str, into: int, out: int) -> None:
        """A linear map of `torch.nn.Linear`, [out, in] there, and [in, out] here."""
        self.add(weight, f"{tensor}.weight", (out, into), transposed, transposed)
        if bias is not None:
            self.add(bias, f"{tensor}.bias", (out,))

    def heads(self, leaf: str, tensor: str, heads: int, width: int, d_model: int, *, bias: bool) -> None:
        """Queries, keys or values: [heads · H, D] there, and [heads, D, H] here; `leaf` is "attention.q"."""
        where, letter = leaf.rsplit(".", 1)
        self.add(f"{where}.w_{letter}", f"{tensor}.weight", (heads * width, d_model), *by_head(heads, width, d_model))
        if bias:
            self.add(f"{where}.b_{letter}", f"{tensor}.bias", (heads * width,), *as_shape((heads, width)))

    def output(self, leaf: str, tensor: str, heads: int, width: int, d_model: int, *, bias: bool) -> None:
        """The last projection of an attention: [D, N · Hv] there, and [N, Hv, D] here; `leaf` is "attention"."""
        self.add(
            f"{leaf}.w_o", f"{tensor}.weight", (d_model, heads * width),
            lambda w: w.T.reshape(heads, width, d_model), lambda w: w.reshape(heads * width, d_model).T,
        )  # fmt: skip
        if bias:
            self.add(f"{leaf}.b_o", f"{tensor}.bias", (d_model,))


def by_head(heads: int, width: int, d_model: int) -> tuple[Turn, Turn]:
    """[heads · H, D] to [heads, D, H], and back."""
    return (
        lambda w: w.reshape(heads, width, d_model).swapaxes(1, 2),
        lambda w: w.swapaxes(1, 2).reshape(heads * width, d_model),
    )


def as_shape(shape: tuple[int, ...]) -> tuple[Turn, Turn]:
    """A vector as an array, and back."""
    return lambda b: b.reshape(shape), lambda b: b.reshape(math.prod(shape))
