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
from mhajax.kernels.contract import FEW, Inputs, Request
from mhajax.kernels.external import guard
from mhajax.masks import Conditions, Mask

LANES = 128  # a block is a multiple of it
LARGEST_BLOCK = 512
HIDDEN = -1  # segment that no query has


def refusal(request: Request) -> str:
    """What it has no option for."""
    if jnp.result_type(request.q.dtype, request.k.dtype, request.v.dtype) == jnp.float64:
        return "splash attention has no float64"
    if jax.config.jax_enable_x64:
        return "splash attention cannot be traced while jax_enable_x64 is on"
    return guard.refusal("splash attention", request)


def reluctance(request: Request) -> str:
    """Where it is interpreted, or not quick."""
    if request.platform != "tpu":
        return "splash attention needs a TPU"
    if request.spread:
        return "the compiler cannot partition splash attention between devices: call it inside shard_map"
    if request.few:
        return FEW
    short = min(request.q.shape[-2], request.k.shape[-2]) < LANES
    return f"a block of splash attention has at least {LANES} tokens" if short else ""


def attend(inputs: Inputs) -> tuple[Array, None]:
    """The heads' outputs [..., N, T, Hv] in the dtype of v, for conditions that `refusal` lets through."""
    return guard.around(lambda q, k, v: _call(q, k, v, inputs.mask, inputs.scale), inputs), None


def _call(q: Array, k: Array, v: Array, mask: Mask | None, scale: float) -> Array:
    """`attend` for numbers that are finite."""
    *leading, num_heads, length, _ = q.shape
    batch, num_keys = math.prod(leading), k.shape[-2]
    found = masks.conditions(mask)
    block_q, block_k = _block(length), _block(num_keys)
    # With a window, blocks of queries beyond the last key would have no key to attend to: let padding be there.
    padded = _whole(length, block_q), _whole(num_keys if found.window is None else max(length, num_keys), block_k)
    narrow = jnp.result_type(q, k, v) == jnp.bfloat16 and not _old_chip()
    dtype = jnp.bfloat16 if narrow else jnp.float32

    def pad(a: Array, size: int) -> Array:
        a = a.reshape(batch, *a.shape[-3:]).astype(dtype)
        return jnp.pad(a, ((0, 0), (0, 0), (0, size - a.shape[-2]), (0, 0)))

    scaled = q * jnp.asarray(scale, jnp.promote_types(q.dtype, jnp.float32))
    segments = _segments(found, tuple(leading), (length, num_keys), padded)
    kernel = partial(_kernel, found, num_heads, padded, (block_q, block_k))
    heads = jax.lax.platform_dependent(
        pad(scaled, padded[0]), pad(k, padded[1]), pad(v, padded[1]), segments,
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
    q, kv = blocks
    sizes = splash.BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)
    return splash.make_splash_mha(
        splash.MultiHeadMask([one_head] * num_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip


def _over_examples(kernel: Any, q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if segments is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(lambda q, k, v, of_q, of_k: kernel(q, k, v, splash.SegmentIds(of_q, of_k)))(q, k, v, *segments)


def _segments(
    found: Conditions, leading: tuple[int, ...], sizes: tuple[int, int], padded: tuple[int, int]
) -> tuple[Array, Array] | None:
    """Segments of the queries [B, T] and keys [B, S], in which padding and what is beyond the length is `HIDDEN`."""
    if found.lengths is None and found.segments is None and sizes[1] == padded[1]:
        return None
    batch = math.prod(leading)
    of_q, of_k = (jnp.zeros((batch, size), jnp.int32) for size in sizes)
    if found.segments is not None:
        of_q, of_k = (
            jnp.broadcast_to(jnp.asarray(ids), (*leading, size)).reshape(batch, size)
            for ids, size in zip(found.segments, sizes, strict=True)
        )
        of_q, of_k = jax.vmap(_numbered)(of_q, of_k)
    if found.lengths is not None:
        lengths = jnp.broadcast_to(jnp.asarray(found.lengths), leading).reshape(batch, 1)
        of_k = jnp.where(jnp.arange(sizes[1]) < lengths, of_k, HIDDEN)
    pad = lambda ids, size: jnp.pad(ids, ((0, 0), (0, size - ids.shape[1])), constant_values=HIDDEN)  # noqa: E731
    return jnp.maximum(pad(of_q, padded[0]), 0), pad(of_k, padded[1])


def _numbered(of_q: Array, of_k: Array) -> tuple[Array, Array]:
    """Segments renumbered from 0, `HIDDEN` for keys of a segment that no query has."""
    known = jnp.sort(of_q)
    number = jnp.searchsorted(known, of_k)
    found = known[jnp.minimum(number, known.shape[0] - 1)] == of_k
    number = jnp.where(found, number, HIDDEN)
    return jnp.searchsorted(known, of_q).astype(jnp.int32), number.astype(jnp.int32)
