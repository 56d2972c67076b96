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
from mhajax.kernels.contract import FEW, Inputs, Request
from mhajax.kernels.external import guard
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


def refusal(request: Request) -> str:
    """What it has no option for, and where it does not run."""
    if request.platform != "gpu":
        return "cuDNN needs an NVIDIA GPU"
    if jax.default_backend() == "gpu" and absence():
        return absence()
    dtypes = {jnp.dtype(a.dtype) for a in (request.q, request.k, request.v)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)}:
        return f"cuDNN attention is for float16 or bfloat16, not {', '.join(sorted(map(str, dtypes)))}"
    width, value_width = request.q.shape[-1], request.v.shape[-1]
    if width > 128 or width % 8 or value_width != width:
        return f"cuDNN attention needs H = Hv, a multiple of 8 up to 128, not H={width} and Hv={value_width}"
    found = masks.conditions(request.mask)
    if found.segments is not None:
        return "cuDNN attention has no segments"
    if found.window is not None and (not found.causal or found.lengths is not None):
        return "cuDNN attention has windows that look back only, without lengths"
    length, num_keys = request.q.shape[-2], request.k.shape[-2]
    if found.causal and length != num_keys:
        return f"cuDNN attention is causal for T = S only, not T={length} and S={num_keys}"
    return guard.refusal("cuDNN attention", request)


def reluctance(request: Request) -> str:
    """It is for what the dense path would hold."""
    return FEW if request.few else ""


def attend(inputs: Inputs) -> tuple[Array, None]:
    """The heads' outputs [..., N, T, H] in the dtype of v, for conditions that `refusal` lets through."""
    return guard.around(lambda q, k, v: call(q, k, v, inputs.mask, inputs.scale, "cudnn"), inputs), None


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
    transposed = (jnp.moveaxis(a.reshape(batch, *a.shape[-3:]), 1, 2) for a in (q, k, v))  # [B, T, N, H]
    heads = jax.nn.dot_product_attention(*transposed, implementation=implementation, **options)
    return jnp.moveaxis(heads, 1, 2).reshape(q.shape).astype(v.dtype)
