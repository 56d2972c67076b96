"""Attention for shapes that a kernel made for round numbers may do badly; else as `attention`."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.bench import attention
from experiments.bench.case import Case

# (B, T, S, N, H): nothing divides; few tokens; narrow heads; one query; many small heads.
SHAPES = (
    (2, 1000, 777, 8, 64),
    (32, 37, 37, 8, 64),
    (8, 512, 512, 8, 8),
    (1, 1, 4096, 8, 64),
    (64, 64, 64, 16, 16),
)
LENGTHS = tuple(shape[1] for shape in SHAPES)
BUILDERS = attention.BUILDERS
rows = attention.rows


def cases(lengths: Sequence[int]) -> list[Case]:
    """The shapes whose T is among the lengths; none for another length."""
    return attention.of_shapes("odd", [shape for shape in SHAPES if shape[1] in lengths])
