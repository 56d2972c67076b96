"""How GGUF stores numbers, and back to floating point, a megabyte at a time.

    kind    block                                                     weight
    F32, F16, BF16                                                    itself
    Q8_0    f16 d, 32 × int8 q                                        d·q
    Q4_0    f16 d, 16 bytes of two q                                  d·(q − 8)
    Q4_1    f16 d, f16 m, 16 bytes of two q                           d·q + m

The low halves of the 16 bytes are weights 0 to 15 of the block, the high halves 16 to 31. Products and sums are in
float32, so the weights are those of the package `gguf` bit for bit.

References:
  https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

_CHUNK = 1 << 14  # blocks: half a million weights, so that temporaries stay in the cache

# Every type of ggml.h that has a number, so that an error can say what a file has.
NAMES = dict(enumerate(
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 "
    "IQ4_NL_8_8 MXFP4 NVFP4 Q1_0".split()
))  # fmt: skip


class Kind(NamedTuple):
    """One way to store numbers.

    Attributes:
      weights: in a block.
      bytes: of a block.
      dtype: of the numbers that come out.
      dequantise: writes blocks, uint8 [n, bytes], as float32 [n, weights]; None: the bytes are the numbers.
    """

    weights: int
    bytes: int
    dtype: np.dtype
    dequantise: Callable[[np.ndarray, np.ndarray], None] | None = None


def _q8_0(blocks: np.ndarray, weights: np.ndarray) -> None:
    weights[...] = blocks[:, 2:].view(np.int8)
    weights *= _f16(blocks[:, :2])


def _q4_0(blocks: np.ndarray, weights: np.ndarray) -> None:
    _halves(blocks[:, 2:], weights)
    weights -= 8
    weights *= _f16(blocks[:, :2])


def _q4_1(blocks: np.ndarray, weights: np.ndarray) -> None:
    _halves(blocks[:, 4:], weights)
    weights *= _f16(blocks[:, :2])
    weights += _f16(blocks[:, 2:4])


def _halves(blocks: np.ndarray, weights: np.ndarray) -> None:
    """uint8 [n, 16] → [n, 32]."""
    weights[:, :16] = blocks & 15
    weights[:, 16:] = blocks >> 4


def _f16(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 2] → float32 [n, 1]."""
    scales = np.ascontiguousarray(blocks).view("<f2").astype(np.float32)
    if not np.isfinite(scales).all():
        raise ValueError("the scale of a block is NaN or infinite; the file is damaged.")
    return scales


_F32 = np.dtype("<f4")
KINDS = {
    "F32": Kind(1, 4, _F32),
    "F16": Kind(1, 2, np.dtype("<f2")),
    "BF16": Kind(1, 2, np.dtype(jnp.bfloat16)),
    "Q8_0": Kind(32, 34, _F32, _q8_0),
    "Q4_0": Kind(32, 18, _F32, _q4_0),
    "Q4_1": Kind(32, 20, _F32, _q4_1),
}


def size(kind: str, weights: int) -> int:
    """Bytes of so many weights, a multiple of the block's.

    >>> size("Q4_1", 64)
    40
    """
    return weights // KINDS[kind].weights * KINDS[kind].bytes


def numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """The weights that bytes mean.

    Args:
      raw: uint8 [blocks · bytes].
      kind: one of `KINDS`.

    Returns:
      [blocks · weights], float32, float16 or bfloat16.

    Raises:
      ValueError: the scale of a block is not finite.

    >>> numbers(np.array([0, 60, 3] + [0] * 30 + [255], np.uint8), "Q8_0")[[0, 1, 31]]  # d is 1 in float16
    array([ 3.,  0., -1.], dtype=float32)
    """
    of = KINDS[kind]
    if of.dequantise is None:
        return raw.view(of.dtype)
    blocks = raw.reshape(-1, of.bytes)
    weights = np.empty((len(blocks), of.weights), of.dtype)
    for start in range(0, len(blocks), _CHUNK):
        of.dequantise(blocks[start : start + _CHUNK], weights[start : start + _CHUNK])
    return weights.reshape(-1)
