"""Floating-point operations, counted by hand: a compiler's own counts miss loops and do not discount causality."""

from __future__ import annotations

# A backward pass of attention has five products of the size of the two of the forward pass (Dao 2023,
# "FlashAttention-2", section 4.1), one of a linear map has two for one.
_ATTENTION = {False: 1.0, True: 3.5}
_LINEAR = {False: 1.0, True: 3.0}


def pairs(queries: int, keys: int, causal: bool) -> int:
    """Number of (query, key) that see each other, positions counted from 0 in both.

    >>> pairs(3, 5, causal=True), pairs(5, 3, causal=True), pairs(3, 5, causal=False)
    (6, 12, 15)
    """
    if not causal:
        return queries * keys
    short = min(queries, keys)
    return short * (short + 1) // 2 + (queries - short) * keys


def attention(
    batch: int, heads: int, queries: int, keys: int, width: int, *, causal: bool = False, backward: bool = False
) -> float:
    """Both products of every head, 4·B·N·H for each pair that sees each other; times 3.5 with the backward pass.

    >>> attention(1, 1, 2048, 2048, 1)
    16777216.0
    """
    return 4.0 * batch * heads * width * pairs(queries, keys, causal) * _ATTENTION[backward]


def linear(rows: int, inputs: int, outputs: int, *, backward: bool = False) -> float:
    """A linear map of `rows` vectors, 2·rows·inputs·outputs; times 3 with the backward pass."""
    return 2.0 * rows * inputs * outputs * _LINEAR[backward]
