"""cuDNN's fused attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import masks
from mhajax.kernels import guard
from mhajax.masks import Mask


@functools.cache
def absence() -> str:
    """Why this machine has no cuDNN attention; empty if it has."""
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        return "cuDNN needs an NVIDIA GPU"
    capability = getattr(device, "compute_capability", "0.0")
    if int(capability.split(".")[0]) < 8:
        return f"cuDNN's fused attention needs a GPU of compute capability 8.0 (Ampere) or more, this has {capability}"
    heads = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:  # JAX looks for the library when the function is traced
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), heads, heads, heads)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"JAX cannot use cuDNN here: {error}"
    return ""


def attend(q: Array, k: Array, v: Array, *, mask: Mask | None = None, scale: float) -> Array:
    """The heads' outputs [..., N, T, H] in the dtype of v; the contract is that of `kernels.attend`.

    Args:
      q: [..., N, T, H], float16 or bfloat16.
      k: [..., K, S, H].
      v: [..., K, S, H].
      mask: of conditions that `kernels.choice` lets through.
      scale: factor of the products.
    """
    return guard.around(lambda q, k, v: call(q, k, v, mask, scale, "cudnn"), q, k, v, mask)


def call(q: Array, k: Array, v: Array, mask: Mask | None, scale: float, implementation: Any) -> Array:
    """`jax.nn.dot_product_attention` with our axes and our mask, for numbers that are finite."""
    *leading, _, _, _ = q.shape
    batch = math.prod(leading)
    found = masks.conditions(mask)
    options: dict[str, Any] = {"is_causal": found.causal, "scale": scale}
    if found.window is not None:
        options["local_window_size"] = tuple(int(np.minimum(side, k.shape[-2])) for side in found.window)
    if found.lengths is not None:
        # A length of 0 would divide by 0; what its queries get is thrown away.
        lengths = jnp.clip(jnp.broadcast_to(jnp.asarray(found.lengths), tuple(leading)), 1, k.shape[-2])
        options["key_value_seq_lengths"] = lengths.reshape(batch).astype(jnp.int32)
    turned = (jnp.moveaxis(a.reshape(batch, *a.shape[-3:]), 1, 2) for a in (q, k, v))  # [B, T, N, H]
    heads = jax.nn.dot_product_attention(*turned, implementation=implementation, **options)
    return jnp.moveaxis(heads, 1, 2).reshape(q.shape).astype(v.dtype)
