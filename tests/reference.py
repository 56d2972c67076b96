"""The yardstick: multi-head attention as loops over examples, heads and queries, in float64 NumPy."""

from functools import partial
from typing import Any

import jax
import numpy as np


def numbers(seed: int, *shape: int, dtype: Any = np.float32) -> Any:
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def random_params(init_params: Any, config: Any, seed: int = 0, dtype: Any = np.float32) -> Any:
    """Parameters of these shapes in which nothing is 0 or 1, biases and norms included; no initialiser is compiled."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(partial(init_params, config=config), jax.random.key(0)))
    random = np.random.default_rng(seed)
    arrays = [random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[-2:-1])) for leaf in leaves]
    return jax.tree.unflatten(structure, [array.astype(dtype) for array in arrays])


def enable_x64() -> Any:
    """64 bits within a `with` block; JAX has moved its name."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()  # pyright: ignore


def multi_head_attention(
    params, x, memory=None, *, mask=True, bias=0.0, gates=1.0, causal=False, positions=None, memory_positions=None
):
    """x [B, T, D] to [B, T, D]; mask and bias broadcast to [B, N, T, S], gates to [B, N], positions to [B, T]."""
    w = {name: np.asarray(array, np.float64) for name, array in params._asdict().items() if array is not None}
    x = np.asarray(x, np.float64)
    memory = x if memory is None else np.asarray(memory, np.float64)
    batch, length, size, num_heads = *x.shape[:2], memory.shape[1], len(w["w_q"])
    asks = np.broadcast_to(np.arange(length) if positions is None else positions, (batch, length))
    answers = np.broadcast_to(np.arange(size) if memory_positions is None else memory_positions, (batch, size))
    mask, bias = (np.broadcast_to(a, (batch, num_heads, length, size)) for a in (mask, bias))
    gates = np.broadcast_to(gates, (batch, num_heads))
    out = np.zeros_like(x) + w.get("b_o", 0)
    for b, n, t in np.ndindex(batch, num_heads, length):
        group = n // (num_heads // len(w["w_k"]))
        seen = mask[b, n, t] & (bias[b, n, t] > -np.inf) & (not causal or answers[b] <= asks[b, t])
        if seen.any():  # a query with nothing to attend to gives zeros
            q = x[b, t] @ w["w_q"][n] + (w["b_q"][n] if "b_q" in w else 0)
            k = memory[b, seen] @ w["w_k"][group] + (w["b_k"][group] if "b_k" in w else 0)
            v = memory[b, seen] @ w["w_v"][group] + (w["b_v"][group] if "b_v" in w else 0)
            logits = k @ q / np.sqrt(len(q)) + bias[b, n, t, seen]
            weights = np.exp(logits - logits.max())
            out[b, t] += gates[b, n] * (weights / weights.sum() @ v) @ w["w_o"][n]
    return out
