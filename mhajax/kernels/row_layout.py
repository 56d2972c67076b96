"""What attention by rows is given, laid out as [B, n, …] with 1 for an axis that is shared, and cut into blocks.

A block is some rows of one head, or some heads, or some examples; where sentences are short it is all that there is,
and nothing is cut: then nothing is looked up by its number, which under `vmap` would be a gather.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.interventions import Patch
from mhajax.kernels import finite, patches
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.masks import Mask, Tokens
from mhajax.masks.static import longer

ROOM = 2**21  # logits in memory at a time: 8 MiB
First = tuple[Any, Any, Any]  # the first example, head and row of a block


class Given(NamedTuple):
    """What an attention is given, as in `kernels.attend`; the patches as in `interventions.Intervention`."""

    mask: Mask | None
    bias: Array | None  # with all axes
    score: Callable | None
    constants: tuple[Array, ...]
    queries: Tokens
    keys: Tokens
    scale: float
    dropout_rate: float
    dropout_key: Array | None
    cached: bool = False
    logits: Patch | None = None
    weights: Patch | None = None

    @property
    def guarded(self) -> bool:
        """Whether what is not finite must stay where it is seen; a cache has seen to that itself."""
        return not self.cached and any(a is not None for a in (self.mask, self.bias, self.logits, self.weights))


class Asked(NamedTuple):
    """Which heads and queries are looked at, and how they are cut."""

    leading: tuple[int, ...]  # the axes before the heads
    shape: tuple[int, int, int]  # N, T, S
    heads: Sequence[int] | None  # None: all
    rows: Sequence[int] | None  # None: all

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Examples B, heads n, rows r."""
        have = [len(some) if some is not None else size for some, size in zip(self[2:], self.shape[:2], strict=True)]
        return math.prod(self.leading), have[0], have[1]

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
        """[..., N or 1, x, y] with the heads that are asked for, [B or 1, n or 1, x, y]."""
        if self.heads is not None and array.shape[-3] > 1:
            array = array[..., np.asarray(self.heads), :, :]
        *have, heads, x, y = array.shape
        if math.prod(have) not in (1, math.prod(self.leading)):  # only some of the leading axes are shared
            array, have = jnp.broadcast_to(array, (*self.leading, heads, x, y)), self.leading
        return array.reshape(math.prod(have), heads, x, y)

    def of_rows(self, array: Array) -> Array:
        """[..., N or 1, T or 1, s] with the heads and rows that are asked for, padded, [B or 1, n or 1, r or 1, s]."""
        if array.shape[-2] > 1 or self.shape[1] == 1:
            array = array if self.rows is None else array[..., np.asarray(self.rows), :]
            array = longer(array, -2, self.padding)
        return self.of_heads(array)

    def heads_of(self, first: First) -> Array:
        """The numbers of the heads of a block, [n]."""
        chosen = jnp.arange(self.shape[0]) if self.heads is None else jnp.asarray(self.heads)
        return cut(chosen, first[1:2], self.block[1:2])


class Asking(NamedTuple):
    """What belongs to the queries, [B or 1, n or 1, r or 1, …]; None: there is none."""

    q: Array  # [..., H]
    position: Array  # [..., 1]
    allowed: Array | None  # [..., S], where it is written out
    bias: Array | None  # [..., S or 1]
    logits: tuple[Array, Array] | None  # value and amount of the patch, [..., S or 1]
    weights: tuple[Array, Array] | None
    log_sums: LogSumExp | None  # [..., 1]
    spoilt: Array | None  # [..., 1]
    real: Array | None  # [..., 1]


class Answering(NamedTuple):
    """What belongs to the keys, [B or 1, n or 1, …]."""

    k: Array  # [..., S, H]
    v: Array  # [..., S, Hv]
    position: Array  # [..., 1, S]
    spoilt: Array | None  # [..., 1, S]


def lay_out(
    q: Array, k: Array, v: Array, given: Given, asked: Asked, log_sums: LogSumExp | None, real: Array | None
) -> tuple[Asking, Answering, Given]:
    """What is given, of the heads and rows that are asked for; what is left of it is looked at block by block."""
    group = q.shape[-3] // k.shape[-3]
    if group > 1:
        k, v = (jnp.repeat(a, group, axis=-3) for a in (k, v))
    q, (k, v) = asked.of_rows(q), map(asked.of_heads, (k, v))
    spoilt = None
    if given.guarded:
        q, k, v, spoilt = finite.heal(q, k, v)
    asking = Asking(
        q=q,
        position=asked.of_rows(jnp.expand_dims(_positions(given.queries, asked), (-3, -1))),
        allowed=_written_out(given.mask, given, asked),
        bias=None if given.bias is None else asked.of_rows(given.bias),
        logits=_patch(given.logits, asked),
        weights=_patch(given.weights, asked),
        log_sums=jax.tree.map(lambda a: asked.of_rows(a[..., None]), log_sums),
        spoilt=None if spoilt is None else spoilt.queries[..., None],
        real=None if real is None else asked.of_rows(jnp.expand_dims(real, (-3, -1))),
    )
    answering = Answering(
        k=k,
        v=v,
        position=asked.of_heads(jnp.expand_dims(_positions(given.keys, asked), (-3, -2))),
        spoilt=None if spoilt is None else spoilt.keys[..., None, :],
    )
    if given.mask is None or asking.allowed is not None:
        return asking, answering, given._replace(mask=None)
    mask = given.mask.prepare(given.queries, given.keys, asked.leading, (asked.padding, 0))
    queries = given.queries._replace(position=longer(given.queries.position, -1, asked.padding))
    return asking, answering, given._replace(mask=mask, queries=queries)


def cut(array: Array, first: tuple[Any, ...], sizes: tuple[int, ...]) -> Array:
    """So many entries of each of the first axes, all where it is shared; nothing is cut where that is all."""
    for axis, (start, size) in enumerate(zip(first, sizes, strict=True)):
        if array.shape[axis] > max(1, size):
            array = jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    return array


def allowed(mask: Mask, first: First, given: Given, asked: Asked) -> Array:
    """What a mask that is laid out says of a block, [b, n, t, S]."""
    examples, _, size = asked.block

    def one(example: Array, head: Array) -> Array:
        queries, keys = given.queries.at(example).part(first[2] // size, size), given.keys.at(example)
        block = mask.at(example, head).block(queries, keys)
        return jnp.broadcast_to(block.reshape(block.shape[-2:]), (size, keys.size))

    of_heads = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(of_heads, in_axes=(0, None))(first[0] + jnp.arange(examples), asked.heads_of(first))


def _written_out(mask: Mask | None, given: Given, asked: Asked) -> Array | None:
    """What a mask says of all that is asked for, [B or 1, n or 1, r or 1, S or 1]; None: ask block by block."""
    queries, keys, rank = given.queries, given.keys, len(asked.leading) + 3
    if mask is None:
        return None
    if asked.rows is None:
        whole = math.prod(asked.blocks) == 1
        return asked.of_rows(patches.full_rank(mask.block(queries, keys), rank)) if whole else None

    def one(row: Array, position: Array) -> Array:
        block = mask.block(Tokens(queries.start + row, position[..., None]), keys)
        return patches.full_rank(block, rank)[..., 0, :]

    rows = np.asarray(asked.rows)
    positions = jnp.asarray(queries.position)[..., rows]
    of_rows = jax.vmap(one, in_axes=(0, -1), out_axes=-2)(jnp.asarray(rows), positions)
    return asked.of_heads(longer(of_rows, -2, asked.padding))


def _positions(tokens: Tokens, asked: Asked) -> Array:
    """[1 or …, T]."""
    return patches.full_rank(jnp.asarray(tokens.position), len(asked.leading) + 1)


def _patch(patch: Patch | None, asked: Asked) -> tuple[Array, Array] | None:
    if patch is None:
        return None
    value, amount = patches.laid_out(patch, len(asked.leading) + 3)
    return asked.of_rows(value), asked.of_rows(amount)


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is at most so large; the number itself if it is 0."""
    return next((n for n in range(min(number, most), 0, -1) if number % n == 0), number)
