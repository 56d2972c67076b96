"""Rows of a few hundred keys without a mask: `fused` for values, `blockwise` where a gradient is taken.

The fused path is ahead as long as no logits are written down, and its backward pass writes them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import Array

from mhajax.kernels import blockwise, fused
from mhajax.kernels.grid import Tiling
from mhajax.masks import tokens


def attend(q: Array, k: Array, v: Array, *, scale: float, tiling: Tiling) -> Array:
    """The heads' outputs [..., N, T, Hv] in the dtype of v; the contract is that of `kernels.attend`.

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      scale: as in `kernels.attend`.
      tiling: of the blockwise path.
    """
    heads: Any = _attend(scale, tiling, q, k, v)
    return heads


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, tiling: Tiling, q: Array, k: Array, v: Array) -> Array:
    return fused.attend(q, k, v, queries=tokens(q.shape[-2]), keys=tokens(k.shape[-2]), scale=scale)


def _forward(scale: float, tiling: Tiling, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    def in_tiles(q: Array, k: Array, v: Array) -> Array:
        places: dict[str, Any] = {"queries": tokens(q.shape[-2]), "keys": tokens(k.shape[-2])}
        return blockwise.attend(q, k, v, scale=scale, tiling=tiling, **places)[0]

    return jax.vjp(in_tiles, q, k, v)


def _backward(scale: float, tiling: Tiling, pull: Any, d_heads: Array) -> tuple:
    return pull(d_heads)


_attend.defvjp(_forward, _backward)
