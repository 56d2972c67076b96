"""Our attention with the signature of `jax.nn.dot_product_attention`."""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from drop_in.layout import full_rank, heads_first
from mhajax import kernels, masks
from mhajax.masks import Mask, tokens

WHO = "dot_product_attention"


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, computed by our kernels.

    What differs: a query with nothing to attend to gives zeros (and a residual of -inf), not the mean of all values;
    NaN in a masked key or value stays there; a bias of -inf masks; values may have a width of their own.

    Args:
      query: [B, T, N, H] or [T, N, H].
      key: [B, S, K, H] or [S, K, H]; query head n uses key head n // (N/K).
      value: [B, S, K, Hv] or [S, K, Hv].
      bias: added to the logits, broadcasts to [B, N, T, S], or to [N, T, S] where there is no batch.
      mask: boolean, as `bias`, True = may attend; or a Mask.
      scale: factor of the products; 1/√H if None.
      is_causal: a query sees keys of its own index and before.
      query_seq_lengths: integers [B]; queries from there on give zeros.
      key_value_seq_lengths: integers [B]; keys from there on are not seen.
      local_window_size: how far back and how far ahead a query sees; one number is both.
      implementation: None or "xla" for what fits, or a kernel's name.
      return_residual: also return the logarithm of the sums, without gradient.

    Returns:
      [B, T, N, Hv] in the dtype of value, or that and the residual [B, T, N] in the dtype of key; without B where query
      has none.

    Raises:
      ValueError: for sizes that do not belong together; for a mask or bias that could be read in two ways.
      TypeError: for a mask that is not boolean.
    """
    q, k, v = heads_first(WHO, *(jnp.asarray(array) for array in (query, key, value)))
    if q.ndim > 4:
        raise ValueError(f"{WHO}: query must be [B, T, N, H] or [T, N, H], got {jnp.shape(query)}; use jax.vmap.")
    rank, batched = 4, q.ndim == 4
    if not batched:
        q, k, v, rank = q[None], k[None], v[None], 3
    if bias is not None:
        bias = full_rank(WHO, "bias", bias, rank)
    if mask is not None and not isinstance(mask, Mask):
        mask = full_rank(WHO, "mask", mask, rank)
        mask = masks.dense(mask if batched else mask[None])
    conditions = [] if mask is None else [mask]
    if is_causal:
        conditions.append(masks.causal())
    if local_window_size is not None:
        both = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
        conditions.append(masks.window(*both))
    if key_value_seq_lengths is not None:
        conditions.append(masks.lengths(_lengths("key_value_seq_lengths", key_value_seq_lengths, len(q))))
    if query_seq_lengths is not None:
        ends = _lengths("query_seq_lengths", query_seq_lengths, len(q))
        conditions.append(masks.dense(jnp.arange(q.shape[-2])[None, None, :, None] < ends[:, None, None, None]))

    heads, seen = kernels.attend(
        q, k, v,
        queries=tokens(q.shape[-2]), keys=tokens(k.shape[-2]),
        mask=reduce(and_, conditions) if conditions else None, bias=bias, scale=scale,
        kernel="auto" if implementation in (None, "xla") else implementation,
        capture=("log_sum_exp",) if return_residual else (),
    )  # fmt: skip
    out = jnp.swapaxes(heads, -2, -3)  # [B, T, N, Hv]
    out = out if batched else out[0]
    if not return_residual:
        return out
    residual = jax.lax.stop_gradient(jnp.swapaxes(seen["log_sum_exp"], -1, -2)).astype(k.dtype)  # [B, T, N]
    return out, residual if batched else residual[0]


def _lengths(name: str, given: Any, batch: int) -> Array:
    lengths = jnp.asarray(given)
    if lengths.shape != (batch,):
        raise ValueError(f"{WHO}: {name} must be [B] = ({batch},), got {lengths.shape}.")
    return lengths
