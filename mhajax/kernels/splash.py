"""Splash attention: the Pallas kernel for TPUs that comes with JAX.

What it wants is made here: whole blocks of tokens (padded, and the padding hidden by segments), scaled queries, a mask
that is known while the program is traced. Lengths and segments become its segments, which may be traced.

A Pallas kernel cannot be partitioned by the compiler. With several devices, call attention inside `shard_map`, each
device with its own examples or heads ("auto" picks this path only there, or on a single device):

    cut = PartitionSpec("batch", "heads")
    jax.shard_map(attend, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False)(q, k, v)

Anywhere but on a TPU the kernel is interpreted: right, slow, and what the tests run.

References:
  `jax.experimental.pallas.ops.tpu.splash_attention`; Dao 2023, "FlashAttention-2", whose loops it has.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import masks
from mhajax.kernels import guard
from mhajax.masks import Conditions, Mask

LANES = 128  # a block is a multiple of it
LARGEST_BLOCK = 512
HIDDEN = -1  # segment that no query has


def attend(q: Array, k: Array, v: Array, *, mask: Mask | None = None, scale: float) -> Array:
    """The heads' outputs [..., N, T, Hv] in the dtype of v; the contract is that of `kernels.attend`.

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      mask: of conditions that `kernels.choice` lets through.
      scale: factor of the products.
    """
    return guard.around(lambda q, k, v: _call(q, k, v, mask, scale), q, k, v, mask)


def _call(q: Array, k: Array, v: Array, mask: Mask | None, scale: float) -> Array:
    """`attend` for numbers that are finite."""
    *leading, num_heads, length, _ = q.shape
    batch, num_keys = math.prod(leading), k.shape[-2]
    found = masks.conditions(mask)
    rows, columns = _block(length), _block(num_keys)
    # With a window, blocks of queries beyond the last key would have no key to look at: let padding be there.
    padded = _whole(length, rows), _whole(num_keys if found.window is None else max(length, num_keys), columns)
    narrow = jnp.result_type(q, k, v) == jnp.bfloat16 and not _old_chip()
    dtype = jnp.bfloat16 if narrow else jnp.float32

    def laid_out(a: Array, size: int) -> Array:
        a = a.reshape(batch, *a.shape[-3:]).astype(dtype)
        return jnp.pad(a, ((0, 0), (0, 0), (0, size - a.shape[-2]), (0, 0)))

    scaled = q * jnp.asarray(scale, jnp.promote_types(q.dtype, jnp.float32))
    segments = _segments(found, tuple(leading), (length, num_keys), padded)
    kernel = partial(_kernel, found, num_heads, padded, (rows, columns))
    heads = jax.lax.platform_dependent(
        laid_out(scaled, padded[0]), laid_out(k, padded[1]), laid_out(v, padded[1]), segments,
        tpu=partial(_over_examples, kernel(interpret=False)),
        default=partial(_over_examples, kernel(interpret=True)),
    )  # fmt: skip
    return heads[:, :, :length].reshape(*leading, num_heads, length, -1).astype(v.dtype)


def _block(size: int) -> int:
    """Tokens of a block: the fewest equal blocks, as far as whole lanes allow."""
    parts = max(1, -(-size // LARGEST_BLOCK))
    return max(1, -(-size // (parts * LANES))) * LANES


def _whole(size: int, block: int) -> int:
    """Tokens with padding."""
    return max(1, -(-size // block)) * block


def _old_chip() -> bool:
    """Whether the chips are those whose Pallas multiplies float32 only."""
    return jax.devices()[0].device_kind in ("TPU v2", "TPU v3")


def _kernel(found: Conditions, num_heads: int, shape: tuple[int, int], blocks: tuple[int, int], interpret: bool) -> Any:
    """Splash attention for [N, T, H], [K, S, H], [K, S, Hv] and segments."""
    # It loads all of Pallas, which takes longer than the rest of the library.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if found.window is not None:
        before, after = (int(np.minimum(side, max(shape))) for side in found.window)
        one_head = splash.LocalMask(shape, (before, after), offset=0)
    else:
        one_head = splash.CausalMask(shape) if found.causal else splash.FullMask(shape)
    rows, columns = blocks
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([one_head] * num_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip


def _over_examples(kernel: Any, q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if segments is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(lambda q, k, v, asking, answering: kernel(q, k, v, splash.SegmentIds(asking, answering)))(
        q, k, v, *segments
    )


def _segments(
    found: Conditions, leading: tuple[int, ...], sizes: tuple[int, int], padded: tuple[int, int]
) -> tuple[Array, Array] | None:
    """Segments of the queries [B, T] and keys [B, S], in which padding and what is beyond the length is `HIDDEN`."""
    if found.lengths is None and found.segments is None and sizes[1] == padded[1]:
        return None
    batch = math.prod(leading)
    asking, answering = (jnp.zeros((batch, size), jnp.int32) for size in sizes)
    if found.segments is not None:
        asking, answering = (
            jnp.broadcast_to(jnp.asarray(ids), (*leading, size)).reshape(batch, size)
            for ids, size in zip(found.segments, sizes, strict=True)
        )
        asking, answering = jax.vmap(_numbered)(asking, answering)
    if found.lengths is not None:
        lengths = jnp.broadcast_to(jnp.asarray(found.lengths), leading).reshape(batch, 1)
        answering = jnp.where(jnp.arange(sizes[1]) < lengths, answering, HIDDEN)
    pad = lambda ids, size: jnp.pad(ids, ((0, 0), (0, size - ids.shape[1])), constant_values=HIDDEN)  # noqa: E731
    return jnp.maximum(pad(asking, padded[0]), 0), pad(answering, padded[1])


def _numbered(asking: Array, answering: Array) -> tuple[Array, Array]:
    """Segments renumbered from 0, `HIDDEN` for keys of a segment that no query has."""
    known = jnp.sort(asking)
    place = jnp.searchsorted(known, answering)
    there = known[jnp.minimum(place, known.shape[0] - 1)] == answering
    place = jnp.where(there, place, HIDDEN)
    return jnp.searchsorted(known, asking).astype(jnp.int32), place.astype(jnp.int32)
