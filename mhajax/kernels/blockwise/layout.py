"""What the loops over tiles take: inputs laid out as batch-heads and whole tiles, and which tiles are visited.

A batch-head is one head of one example, of which there are B·N; a chunk is some of them that are worked on together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import dropout
from mhajax.kernels import finite, shapes
from mhajax.kernels.contract import Inputs, Tiling
from mhajax.masks import Mask, Tokens


class Static(NamedTuple):
    """What the compiled program depends on, besides shapes."""

    tiling: Tiling
    leading: tuple[int, ...]  # the axes before the heads
    num_heads: int  # N
    num_queries: int  # T, without padding
    num_keys: int  # S, without padding
    scale: float
    dropout_rate: float
    score: Callable | None  # (score, head, q_position, k_position, *constants), of one pair
    guarded: bool  # something non-finite may be hidden, by a mask or a bias, and must stay where it is seen


class Operands(NamedTuple):
    """What has a gradient; B·N or B·K batch-heads in front, tokens padded to whole tiles."""

    q: Array  # [B·N, T, H]
    k: Array  # [B·K, S, H]
    v: Array  # [B·K, S, Hv]
    bias: Array | None  # [B or 1, N or 1, T or 1, S or 1]
    constants: tuple[Array, ...]  # of the score function


class Context(NamedTuple):
    """What has none."""

    mask: Mask | None  # laid out
    queries: Tokens
    keys: Tokens
    order: Array | np.ndarray  # [chunks or 1, t_tiles, s_tiles]: tiles to visit, full ones first
    full: Array | np.ndarray  # [chunks or 1, t_tiles]: how many of them need no mask
    nonempty: Array | np.ndarray  # [chunks or 1, t_tiles]: how many are visited at all
    words: Any  # the dropout's, [2]; None without


def lay_out(inputs: Inputs) -> tuple[Static, Operands, Context]:
    """Inputs in the form that the loops take."""
    assert inputs.tiling is not None  # this path has planned one
    *leading, num_heads, length, _ = inputs.q.shape
    static = Static(
        inputs.tiling, tuple(leading), num_heads, length, inputs.k.shape[-2], inputs.scale,
        0.0 if inputs.dropout_key is None else inputs.dropout_rate, inputs.score, inputs.guarded,
    )  # fmt: skip
    pad_q, pad_k = -static.num_queries % static.tiling.block_q, -static.num_keys % static.tiling.block_k
    flat = lambda a, pad: _pad(a.reshape(-1, *a.shape[-2:]), -2, pad)  # noqa: E731
    mask, queries, keys = inputs.mask, inputs.queries, inputs.keys
    operands = Operands(
        flat(inputs.q, pad_q), flat(inputs.k, pad_k), flat(inputs.v, pad_k), _lay_out_bias(inputs.bias, static),
        inputs.constants,
    )  # fmt: skip
    order, full, nonempty = _visits(inputs, static)
    context = Context(
        None if mask is None else mask.prepare(queries, keys, static.leading, (pad_q, pad_k)),
        queries._replace(position=_pad(queries.position, -1, pad_q)),
        keys._replace(position=_pad(keys.position, -1, pad_k)),
        order, full, nonempty,
        dropout.words(inputs.dropout_key) if static.dropout_rate and inputs.dropout_key is not None else None,
    )  # fmt: skip
    return static, operands, context


def in_one_tile(static: Static, operands: Operands, context: Context, batch_heads: int) -> tuple[Static, Context]:
    """The same work with all queries and keys of some batch-heads in one tile: there is nothing to loop over."""
    tiling = Tiling(batch_heads, operands.q.shape[1], operands.k.shape[1])
    order, full, nonempty = np.zeros((1, 1, 1), np.int32), np.zeros((1, 1), np.int32), np.ones((1, 1), np.int32)
    return static._replace(tiling=tiling), context._replace(order=order, full=full, nonempty=nonempty)


Arrays = tuple[Array, ...]


class Known:
    """What a tree holds besides JAX's arrays: it is not traced, so tiles that are known stay known.

    Two of them are equal only if they are the same, which is enough for what is traced once.
    """

    def __init__(self, tree: Any):
        leaves, self._structure = jax.tree.flatten(tree)
        self._leaves = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]

    def merge(self, arrays: Arrays) -> Any:
        """The tree, with these arrays."""
        remaining = iter(arrays)
        return self._structure.unflatten([next(remaining) if leaf is None else leaf for leaf in self._leaves])


def split(tree: Any) -> tuple[Known, Arrays]:
    """The rest of a tree, and its arrays."""
    return Known(tree), tuple(finite.own(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def _pad(array: Any, axis: int, size: int) -> Any:
    """The array with `size` more entries, copies of the last; positions stay in NumPy where they are known."""
    if not size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size)
    return (np if isinstance(array, np.ndarray) else jnp).pad(array, widths, mode="edge")


def _lay_out_bias(bias: Array | None, static: Static) -> Array | None:
    """[..., 1 or N, t, s] to [B or 1, 1 or N, t, s], padded to whole tiles where an axis is not shared."""
    if bias is None:
        return None
    flat = shapes.flatten_leading(bias, static.leading)
    for axis, block in ((-2, static.tiling.block_q), (-1, static.tiling.block_k)):
        if flat.shape[axis] > 1:
            flat = _pad(flat, axis, -flat.shape[axis] % block)
    return flat


def _visits(inputs: Inputs, static: Static) -> tuple:
    """Which tiles every chunk visits, in which order: `Context.order`, `full` and `nonempty`."""
    batch_heads, block_q, block_k = static.tiling
    if inputs.mask is None:
        shape = -(-static.num_queries // block_q), -(-static.num_keys // block_k)
        nonempty = full = np.ones(shape, bool)
    else:
        nonempty, full = inputs.mask.tiles(inputs.queries, inputs.keys, block_q, block_k)
    xp = np if isinstance(nonempty, np.ndarray) and isinstance(full, np.ndarray) else jnp
    if inputs.bias is not None:
        full = xp.zeros_like(full)  # it may hold -inf
    if static.num_keys % block_k:  # the last keys are padding
        full = full & xp.broadcast_to(xp.arange(full.shape[-1]) < full.shape[-1] - 1, full.shape)
    if nonempty.ndim > 2:
        shape = (*static.leading, static.num_heads, *nonempty.shape[-2:])
        nonempty, full = (xp.broadcast_to(a, shape).reshape(-1, batch_heads, *shape[-2:]) for a in (nonempty, full))
        nonempty, full = nonempty.any(1), full.all(1)
    else:
        nonempty, full = nonempty[None], full[None]
    kind = xp.where(full, 0, xp.where(nonempty, 1, 2))
    order = xp.argsort(kind, axis=-1, stable=True).astype(np.int32)
    return order, (kind == 0).sum(-1).astype(np.int32), (kind < 2).sum(-1).astype(np.int32)
