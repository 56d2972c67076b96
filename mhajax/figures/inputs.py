"""What a figure is given, looked at before anything is drawn, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def array(who: str, name: str, value: ArrayLike, shape: str) -> np.ndarray:
    """Checks the number of axes, that none is empty and that all numbers are finite."""
    found = np.asarray(value)
    if found.dtype not in (np.float32, np.float64):
        found = found.astype(np.float64 if found.dtype.kind in "iub" else np.float32)  # bfloat16 is not NumPy's own
    axes = 0 if shape == "a number" else shape.count(",") + 1
    if found.ndim != axes or found.size == 0:
        raise ValueError(f"{who}: {name} must be {shape} with no empty axis, got {found.shape}.")
    if not np.isfinite(found).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(found))[0])
        place = f" at {where}" if where else ""
        raise ValueError(f"{who}: {name} must be finite, got {found[where]}{place}; find out where it comes from.")
    return found


def same_length(who: str, name: str, items: Any, letter: str, length: int, noun: str, hint: str) -> None:
    """Checks that there are as many `items` as the axis `letter` is long."""
    if len(items) != length:
        raise ValueError(f"{who}: {name} must have {letter}={length} {noun}, got {len(items)}; {hint}.")


def same_shape(who: str, name: str, value: np.ndarray, like: np.ndarray, of: str) -> None:
    """Checks that an array has the shape of another."""
    if value.shape != like.shape:
        raise ValueError(f"{who}: {name} must have the shape of {of}, {like.shape}, got {value.shape}.")


def interval(
    who: str, name: str, sides: Sequence[ArrayLike], like: np.ndarray, of: str, shape: str
) -> list[np.ndarray]:
    """Checks a pair (low, high) that belongs to an array: same shape, low not above high."""
    if len(sides) != 2:
        raise ValueError(f"{who}: {name} must be a pair (low, high), got {len(sides)} arrays.")
    low, high = (array(who, f"{name} {side}", value, shape) for side, value in zip(("low", "high"), sides, strict=True))
    for side, value in (("low", low), ("high", high)):
        same_shape(who, f"{name} {side}", value, like, of)
    if (low > high).any():
        where = tuple(int(i) for i in np.argwhere(low > high)[0])
        raise ValueError(f"{who}: {name} must have low <= high, got {low[where]:.4g} and {high[where]:.4g} at {where}.")
    return [low, high]


def attention(who: str, name: str, value: ArrayLike, shape: str) -> np.ndarray:
    """Checks attention weights: numbers between 0 and 1."""
    weights = array(who, name, value, shape)
    if weights.min() < 0 or weights.max() > 1.01:  # bfloat16 rounds a little above 1
        raise ValueError(
            f"{who}: {name} must be between 0 and 1, got {weights.min():.4g} to {weights.max():.4g}; "
            "pass the attention after the softmax, not the logits."
        )
    return weights


def between_heads(who: str, name: str, value: ArrayLike, num_layers: int) -> tuple[np.ndarray, int]:
    """Checks a matrix of all heads against all heads; returns it, and the heads of a layer."""
    matrix = array(who, name, value, "[L·N, L·N]")
    count = len(matrix)
    if matrix.shape != (count, count):
        raise ValueError(f"{who}: {name} must be square, [L·N, L·N], got {matrix.shape}.")
    if num_layers < 1 or count % num_layers:
        raise ValueError(
            f"{who}: num_layers must divide the L·N={count} heads of {name}, got {num_layers}; "
            "head n of layer l is at l·N + n."
        )
    return matrix, count // num_layers


def number(value: Any) -> float:
    """The number that prints shortest and still reads back as `value` in its own precision: 0.1, not 0.10000000149."""
    return float(str(value))


def same_decimals(values: np.ndarray, span: float) -> dict[tuple[int, ...], str]:
    """Writes numbers with as many decimals as it takes to tell them apart: index -> text."""
    decimals = max(0, 2 - math.ceil(math.log10(span)))
    form = f".{decimals}f" if decimals <= 4 and np.abs(values).max() < 1e5 else ".1e"
    texts = {index: format(float(value), form) for index, value in np.ndenumerate(values)}
    return {
        i: text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}") for i, text in texts.items()
    }
