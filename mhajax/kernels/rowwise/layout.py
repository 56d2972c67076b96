"""Inputs laid out for attention by whole rows, [B, n, …] with 1 for an axis that is shared, and cut into blocks.

A block is some rows of one head, or some heads, or some examples; where sentences are short it is all that there is,
and nothing is cut: then nothing is looked up by its number, which under `vmap` would be a gather.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.kernels import finite, patches, shapes
from mhajax.kernels.contract import Inputs
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.masks import Mask, Tokens
from mhajax.masks.static import longer

ROOM = 2**21  # logits in memory at a time: 8 MiB
First = tuple[Any, Any, Any]  # the first example, head and row of a block


class Selection(NamedTuple):
    """Which heads and queries are computed, and how they are cut."""

    leading: tuple[int, ...]  # the axes before the heads
    shape: tuple[int, int, int]  # N, T, S
    heads: Sequence[int] | None  # None: all
    rows: Sequence[int] | None  # None: all

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Examples B, heads n, rows r."""
        heads, rows = (size if ids is None else len(ids) for ids, size in zip(self[2:], self.shape[:2], strict=True))
        return math.prod(self.leading), heads, rows

    @property
    def block(self) -> tuple[int, int, int]:
        """Examples, heads and rows at a time: more than one example only with all heads, more than one head only with
        all rows. Of examples and heads it is a divisor."""
        batch, heads, size = self.sizes
        room = max(1, ROOM // max(1, self.shape[2]))
        if size > room:
            return 1, 1, -(-size // -(-size // room))
        if heads * size > room:
            return 1, _divisor(heads, room // size), size
        return _divisor(batch, room // max(1, heads * size)), heads, size

    @property
    def blocks(self) -> tuple[int, int, int]:
        """How many there are."""
        batch, heads, rows = (-(-size // max(1, at_once)) for size, at_once in zip(self.sizes, self.block, strict=True))
        return batch, heads, rows

    @property
    def padding(self) -> int:
        """Rows that the last block has too many."""
        return self.blocks[2] * self.block[2] - self.sizes[2]

    def of_heads(self, array: Array) -> Array:
        """[..., N or 1, x, y] with the heads that are selected, [B or 1, n or 1, x, y]."""
        if self.heads is not None and array.shape[-3] > 1:
            array = array[..., np.asarray(self.heads), :, :]
        return shapes.flatten_leading(array, self.leading)

    def of_rows(self, array: Array) -> Array:
        """[..., N or 1, T or 1, s] with the heads and rows that are selected, padded, [B or 1, n or 1, r or 1, s]."""
        if array.shape[-2] > 1 or self.shape[1] == 1:
            array = array if self.rows is None else array[..., np.asarray(self.rows), :]
            array = longer(array, -2, self.padding)
        return self.of_heads(array)

    def heads_of(self, first: First) -> Array:
        """The numbers of the heads of a block, [n]."""
        chosen = jnp.arange(self.shape[0]) if self.heads is None else jnp.asarray(self.heads)
        return cut(chosen, first[1:2], self.block[1:2])


class QuerySide(NamedTuple):
    """What belongs to the queries, [B or 1, n or 1, r or 1, …]; None: there is none."""

    q: Array  # [..., H]
    position: Array  # [..., 1]
    allowed: Array | None  # [..., S], where it is written out
    bias: Array | None  # [..., S or 1]
    logits: tuple[Array, Array] | None  # value and amount of the patch, [..., S or 1]
    weights: tuple[Array, Array] | None
    log_sums: LogSumExp | None  # [..., 1]
    nonfinite: Array | None  # [..., 1]
    real: Array | None  # [..., 1]


class KeySide(NamedTuple):
    """What belongs to the keys, [B or 1, n or 1, …]."""

    k: Array  # [..., S, H]
    v: Array  # [..., S, Hv]
    position: Array  # [..., 1, S]
    nonfinite: Array | None  # [..., 1, S]


def lay_out(
    inputs: Inputs, selection: Selection, log_sums: LogSumExp | None, real: Array | None
) -> tuple[QuerySide, KeySide, Inputs]:
    """The inputs of the heads and rows that are selected, and what is left of them for block after block."""
    group, rank = inputs.q.shape[-3] // inputs.k.shape[-3], inputs.q.ndim
    k, v = (jnp.repeat(a, group, axis=-3) if group > 1 else a for a in (inputs.k, inputs.v))
    q, (k, v) = selection.of_rows(inputs.q), map(selection.of_heads, (k, v))
    nonfinite = None
    if inputs.guarded:
        q, k, v, nonfinite = finite.replace_nonfinite(q, k, v)
    of_patch: Any = lambda patch: patch and tuple(map(selection.of_rows, patches.materialise(patch, rank)))  # noqa: E731
    query_side = QuerySide(
        q=q,
        position=selection.of_rows(jnp.expand_dims(_positions(inputs.queries, selection), (-3, -1))),
        allowed=_materialise(inputs.mask, inputs, selection),
        bias=jax.tree.map(selection.of_rows, inputs.bias),
        logits=of_patch(inputs.logits), weights=of_patch(inputs.weights),
        log_sums=jax.tree.map(lambda a: selection.of_rows(a[..., None]), log_sums),
        nonfinite=None if nonfinite is None else nonfinite.queries[..., None],
        real=None if real is None else selection.of_rows(jnp.expand_dims(real, (-3, -1))),
    )  # fmt: skip
    k_position = selection.of_heads(jnp.expand_dims(_positions(inputs.keys, selection), (-3, -2)))
    key_side = KeySide(k, v, k_position, None if nonfinite is None else nonfinite.keys[..., None, :])
    if inputs.mask is None or query_side.allowed is not None:
        return query_side, key_side, inputs._replace(mask=None)
    mask = inputs.mask.prepare(inputs.queries, inputs.keys, selection.leading, (selection.padding, 0))
    queries = inputs.queries._replace(position=longer(inputs.queries.position, -1, selection.padding))
    return query_side, key_side, inputs._replace(mask=mask, queries=queries)


def cut(array: Array, first: tuple[Any, ...], sizes: tuple[int, ...]) -> Array:
    """So many entries of each of the first axes, all where it is shared; nothing is cut where that is all."""
    for axis, (start, size) in enumerate(zip(first, sizes, strict=True)):
        if array.shape[axis] > max(1, size):
            array = jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    return array


def allowed(mask: Mask, first: First, inputs: Inputs, selection: Selection) -> Array:
    """What a mask that is laid out says of a block, [b, n, t, S]."""
    examples, _, size = selection.block

    def one(example: Array, head: Array) -> Array:
        queries, keys = inputs.queries.at(example).part(first[2] // size, size), inputs.keys.at(example)
        block = mask.at(example, head).block(queries, keys)
        return jnp.broadcast_to(block.reshape(block.shape[-2:]), (size, keys.size))

    of_heads = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(of_heads, in_axes=(0, None))(first[0] + jnp.arange(examples), selection.heads_of(first))


def _materialise(mask: Mask | None, inputs: Inputs, selection: Selection) -> Array | None:
    """What a mask says of all that is selected, [B or 1, n or 1, r or 1, S or 1]; None: ask block by block."""
    queries, keys, rank = inputs.queries, inputs.keys, len(selection.leading) + 3
    if mask is None:
        return None
    if selection.rows is None:
        whole = math.prod(selection.blocks) == 1
        return selection.of_rows(shapes.full_rank(mask.block(queries, keys), rank)) if whole else None

    def one(row: Array, position: Array) -> Array:
        block = mask.block(Tokens(queries.start + row, position[..., None]), keys)
        return shapes.full_rank(block, rank)[..., 0, :]

    rows = np.asarray(selection.rows)
    positions = jnp.asarray(queries.position)[..., rows]
    of_rows = jax.vmap(one, in_axes=(0, -1), out_axes=-2)(jnp.asarray(rows), positions)
    return selection.of_heads(longer(of_rows, -2, selection.padding))


def _positions(tokens: Tokens, selection: Selection) -> Array:
    """[1 or …, T]."""
    return shapes.full_rank(jnp.asarray(tokens.position), len(selection.leading) + 1)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is at most so large; the number itself if it is 0."""
    return next((n for n in range(min(number, most), 0, -1) if number % n == 0), number)
