"""Our attention with the signature of tokamax's, as far as there is something to hand over."""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp

from mhajax import kernels, masks, scores
from mhajax.drop_in import heads_first
from mhajax.masks import tokens


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    logits_scale: Any = None,
    bias: Any = None,
    logits_soft_cap: float | None = None,
    mask: Any = None,
    is_causal: bool = False,
    q_indices: Any = None,
    k_indices: Any = None,
    normalize_output: bool = True,
    return_residuals: bool = False,
) -> Any:
    """tokamax's `DotProductAttention.__call__`, computed by our kernels.

    Left out, so that handing it over is an error: `dropout_mask` (ours is drawn from a key), `precision` and
    `logits_dtype` (logits are float32), `paging_info`, and shardings. Quantised arrays are widened first.

    Args:
      q: [..., T, N, H].
      k: [..., S, K, H].
      v: [..., S, K, Hv].
      logits_scale: factor of the products; 1/√H if None or not a number.
      bias: broadcasts to [..., N, T, S].
      logits_soft_cap: scores and bias together stay below it.
      mask: boolean, broadcasts to [..., N, T, S], or tokamax's own Mask.
      is_causal: key position ≤ query position.
      q_indices, k_indices: positions, [1, T] and [1, S].
      normalize_output: False leaves out the division by the sum of the exponentials below their maximum.
      return_residuals: also return a maximum and a sum that belong to the output, each [..., N, T].
    """
    q, k, v = heads_first("attention", *(_widened(x) for x in (q, k, v)))
    positions = [None if places is None else places.reshape(places.shape[-1]) for places in (q_indices, k_indices)]
    queries, keys = tokens(q.shape[-2], positions[0]), tokens(k.shape[-2], positions[1])
    conditions = []
    if hasattr(mask, "as_array"):
        mask, causal = mask.take("is_causal")
        is_causal = is_causal or causal
        mask = mask.as_array(
            q.shape[-2] if q_indices is None else q_indices, k.shape[-2] if k_indices is None else k_indices
        )
    if mask is not None:
        full = mask.reshape((1,) * (max(q.ndim, 3) - mask.ndim) + mask.shape)
        conditions.append(masks.per_head(full) if full.ndim == 3 else masks.dense(full))
    if is_causal:
        conditions.append(masks.causal())
    options: dict[str, Any] = {
        "queries": queries, "keys": keys, "scale": logits_scale if isinstance(logits_scale, float | int) else None,
        "capture": ("log_sum_exp",) if normalize_output or return_residuals else ("log_sum_exp", "logits"),
        "mask": reduce(and_, conditions) if conditions else None,
    }  # fmt: skip
    if logits_soft_cap is not None and bias is not None:
        heads, seen = _capped_with_bias(q, k, v, bias, logits_soft_cap, options)
    else:
        score = None if logits_soft_cap is None else scores.soft_cap(logits_soft_cap)
        heads, seen = kernels.attend(q, k, v, bias=bias, score=score, **options)
    if return_residuals:  # the output that was divided goes with a maximum of log Σ exp and a sum of 1
        lse = seen["log_sum_exp"]
        return jnp.swapaxes(heads, -2, -3), (lse, jnp.ones_like(lse))
    if not normalize_output:
        total = jnp.exp(seen["log_sum_exp"] - jnp.max(seen["logits"], axis=-1))
        heads = heads * total[..., None]
    return jnp.swapaxes(heads, -2, -3)


def _capped_with_bias(q: Any, k: Any, v: Any, bias: Any, cap: float, options: dict[str, Any]) -> Any:
    """The cap after the bias: the bias of an example [N, T, S] becomes something that its score function reads."""

    def one_example(q, k, v, bias):
        add = lambda score, head, t, s: score + bias[head, t, s]  # noqa: E731
        return kernels.attend(q, k, v, score=scores.chain(add, scores.soft_cap(cap)), **options)

    return jax.vmap(one_example)(q, k, v, jnp.broadcast_to(bias, (*q.shape[:-1], k.shape[-2])))


def _widened(x: Any) -> Any:
    if not hasattr(x, "qtype"):
        return x
    import qwix  # pyright: ignore[reportMissingImports]

    return qwix.dequantize(x)
