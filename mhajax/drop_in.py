"""Our attention in the place of another library's, with that library's signature and layout.

    dot_product_attention = mhajax.drop_in.dot_product_attention           in the place of jax.nn's
    nn.MultiHeadDotProductAttention(…, attention_fn=mhajax.linen.attention_fn)
    nnx.MultiHeadAttention(…, attention_fn=mhajax.nnx.attention_fn)

What differs from the originals, everywhere: memory grows with T, not with T × S, where the path is blockwise
(`kernels.explain`); a query with nothing to attend to gives zeros, not the mean of all values; NaN in a masked key or
value stays there; a bias of -inf masks; the softmax is float32 whatever the dtype.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import checks, kernels, masks
from mhajax.kernels.shapes import check_full_rank
from mhajax.masks import Mask, tokens


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

    What differs is at the top of this file; besides, values may have a width of their own, and a mask may be a Mask,
    which holds no T × S booleans.

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
      implementation: None or "xla" for what fits, or one of `kernels.NAMES`.
      return_residual: also return the logarithm of the sums, without gradient; -inf where nothing may be attended to.

    Returns:
      [B, T, N, Hv] in the dtype of value, or that and the residual [B, T, N] in the dtype of key; without B where query
      has none.

    Raises:
      ValueError: for sizes that do not belong together; for a mask or bias with fewer axes than that, which could be
        read in two ways; for an implementation that cannot do what is asked.
      TypeError: for a mask that is not boolean.

    >>> query, key = jnp.ones((2, 5, 6, 4)), jnp.ones((2, 7, 3, 4))
    >>> dot_product_attention(query, key, key, key_value_seq_lengths=jnp.array([7, 4])).shape
    (2, 5, 6, 4)
    """
    who = "dot_product_attention"
    q, k, v = heads_first(who, *(jnp.asarray(array) for array in (query, key, value)))
    if q.ndim > 4:
        raise ValueError(f"{who}: query must be [B, T, N, H] or [T, N, H], got {jnp.shape(query)}; use jax.vmap.")
    rank, batched = 4, q.ndim == 4
    if not batched:
        q, k, v, rank = q[None], k[None], v[None], 3
    full = (*q.shape[-rank:-1], k.shape[-2])
    if bias is not None:
        bias = _full_rank(who, "bias", bias, full)
    if mask is not None and not isinstance(mask, Mask):
        mask = _full_rank(who, "mask", mask, full)
        mask = masks.dense(mask if batched else mask[None])
    checks.mask_sizes(mask, q.shape[:1], q.shape[-2], k.shape[-2], who=who)
    conditions = [] if mask is None else [mask]
    if is_causal:
        conditions.append(masks.causal())
    if local_window_size is not None:
        both = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
        conditions.append(masks.window(both[0], after=both[1]))
    if key_value_seq_lengths is not None:
        conditions.append(masks.lengths(_lengths(who, "key_value_seq_lengths", key_value_seq_lengths, len(q))))
    if query_seq_lengths is not None:
        ends = _lengths(who, "query_seq_lengths", query_seq_lengths, len(q))
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


def of_flax(
    who: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Any,
    mask: Any,
    *,
    is_causal: bool,
    dropout_key: Array | None,
    dropout_rate: float,
    precision: Any,
    weights: bool,
) -> tuple[Array, Any]:
    """What `linen.attention_fn` and `nnx.attention_fn` share: attention as Flax's layers ask for it.

    Args:
      who: name for errors.
      query: [..., T, N, H].
      key: [..., S, K, H].
      value: [..., S, K, Hv].
      bias: broadcasts to [..., N, T, S].
      mask: broadcasts to [..., N, T, S]; booleans, or numbers of which 0 masks.
      is_causal: a query sees keys of its own index and before; refused for one query of several keys, where that is
        key 0 alone.
      dropout_key: PRNG key of the dropout.
      dropout_rate: share of the weights that is dropped.
      precision: of the products.
      weights: whether the weights are asked for.

    Returns:
      [..., T, N, Hv], and the weights [..., N, T, S] or None.

    Raises:
      ValueError: for sizes that do not belong together, a mask or bias that could be read in two ways, and dropout
        without a key.
    """
    q, k, v = heads_first(who, query, key, value)
    if dropout_rate and dropout_key is None:
        raise ValueError(f"{who}: dropout_rate={dropout_rate} needs dropout_rng, a PRNG key, or deterministic=True.")
    full = (*q.shape[:-1], k.shape[-2])
    if is_causal and q.shape[-2] == 1 < k.shape[-2]:
        raise ValueError(
            f"{who}: is_causal with one query and {k.shape[-2]} keys would let it see key 0 only, as key and query are "
            "compared by index; leave is_causal out. In decode mode Flax's layer masks what is not yet there itself."
        )
    allowed = None
    if mask is not None:
        mask = _full_rank(who, "mask", mask, full) != 0
        allowed = masks.per_head(mask) if q.ndim == 3 else masks.dense(mask)
    if is_causal:
        allowed = masks.causal() if allowed is None else allowed & masks.causal()
    # The derivative of the dense path keeps the precision of its products; those of others are traced without it.
    asked = precision not in (None, jax.lax.Precision.DEFAULT, "default") and jax.default_backend() != "cpu"
    with jax.default_matmul_precision(_precision_name(precision)) if asked else nullcontext():
        heads, seen = kernels.attend(
            q, k, v,
            queries=tokens(q.shape[-2]), keys=tokens(k.shape[-2]),
            mask=allowed, bias=None if bias is None else _full_rank(who, "bias", bias, full),
            dropout_rate=dropout_rate, dropout_key=dropout_key if dropout_rate else None,
            kernel="dense" if asked else "auto", capture=("weights",) if weights else (),
        )  # fmt: skip
    return jnp.swapaxes(heads, -2, -3), seen.get("weights")


def heads_first(who: str, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Queries [..., T, N, H], keys [..., S, K, H] and values [..., S, K, Hv] with the heads before the tokens.

    Raises:
      ValueError: for sizes that do not belong together.
    """
    shapes = f"got query {query.shape}, key {key.shape} and value {value.shape}."
    if not 3 <= query.ndim == key.ndim == value.ndim:
        raise ValueError(f"{who}: query, key and value must have the same rank, [..., T, N, H]; {shapes}")
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"{who}: the batch dims must match; {shapes}")
    if key.shape[-3] != value.shape[-3]:
        raise ValueError(f"{who}: key and value lengths must match; {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{who}: query and key depths must match; {shapes}")
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{who}: key and value must have as many heads, and the heads of query must be a multiple of that; {shapes}"
        )
    return jnp.swapaxes(query, -2, -3), jnp.swapaxes(key, -2, -3), jnp.swapaxes(value, -2, -3)


def _full_rank(who: str, name: str, array: Any, full: tuple[int, ...]) -> Array:
    """A mask or bias with the axes [..., N, T, S] that it lacks, where there is only one way to read it.

    Raises:
      TypeError: for a function that would have to be called.
      ValueError: if leading axes are missing and another one could be taken for them, or sizes are not those of `full`.
    """
    masks.uncalled(who, array)
    array, rank = jnp.asarray(array), len(full)
    if array.ndim < rank and any(size > 1 for size in array.shape[:-2]) or array.ndim > rank:
        raise ValueError(
            f"{who}: {name} must have {rank} axes, [..., N, T, S] with 1 where it is shared, got {array.shape}; "
            f"write {name}[None] for one per head, {name}[:, None] for one per example."
        )
    padding = name == "mask" and rank > 3 and array.shape == (full[0], full[-1])
    advice = {"advice": checks.padding_advice(name)} if padding else {}
    return check_full_rank(name, array, full, who=who, **advice)


def _lengths(who: str, name: str, given: Any, batch: int) -> Array:
    lengths = jnp.asarray(given)
    if lengths.shape != (batch,):
        raise ValueError(f"{who}: {name} must be [B] = ({batch},), got {lengths.shape}.")
    return lengths


def _precision_name(precision: Any) -> str:
    """As JAX's configuration spells it."""
    return precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
