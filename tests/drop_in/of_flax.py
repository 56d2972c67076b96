"""Our attention with the signatures of `flax.linen.dot_product_attention` and `flax.nnx.dot_product_attention`.

    nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=of_flax.linen_attention)
    nnx.MultiHeadAttention(num_heads=8, in_features=64, attention_fn=of_flax.nnx_attention, rngs=nnx.Rngs(0))

The layer keeps its parameters, its cache and its options. What differs: a query with nothing to attend to gives zeros,
not the mean of all values; NaN in a masked key or value stays there; the softmax is float32 whatever the dtype; and
dropout draws every weight for itself, also with `broadcast_dropout=True`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import Array

from drop_in.layout import full_rank, heads_first
from mhajax import kernels, masks
from mhajax.masks import tokens


def linen_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
) -> Array:
    """`flax.linen.dot_product_attention`, computed by our kernels: an `attention_fn` of Linen's layers.

    Linen only hands over what the signature names, so every argument is here, and what cannot be done is refused.

    Args:
      query: [..., T, N, H].
      key: [..., S, K, H]; K may be less than N.
      value: [..., S, K, Hv].
      bias: broadcasts to [..., N, T, S].
      mask: broadcasts to [..., N, T, S]; boolean, or numbers of which 0 masks, as Flax makes them.
      broadcast_dropout: not looked at; every weight is drawn for itself.
      dropout_rng: PRNG key of the dropout.
      dropout_rate: share of the weights that is dropped unless `deterministic`.
      deterministic: no dropout.
      dtype: of the computation; what query, key and value promote to if None. Logits are at least float32.
      precision: of the products; other than None and DEFAULT it takes the dense path, except on a CPU, where
        there is only one.
      module: where the weights are sown, as "attention_weights" in "intermediates".
      force_fp32_for_softmax: the weights that are sown are float32; the softmax is so anyway.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: refused.

    Returns:
      [..., T, N, Hv].

    Raises:
      ValueError: for sizes that do not belong together, a mask or bias that could be read in two ways, dropout without
        a key, and products of one's own.
    """
    del broadcast_dropout
    own = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, function in own.items():
        if function is not None:
            raise ValueError(f"linen_attention: {name} must be None: the kernels have products of their own; "
                             "leave it out, or use flax's attention_fn.")  # fmt: skip
    query, key, value = linen_dtypes.promote_dtype(query, key, value, dtype=dtype)
    out, weights = _attend(
        "linen_attention", query, key, value, bias, mask,
        dropout_rng, dropout_rate, deterministic, precision, weights=module is not None,
    )  # fmt: skip
    if module is not None:
        shown = weights if force_fp32_for_softmax else weights.astype(query.dtype)
        module.sow("intermediates", "attention_weights", shown)
    return out


def nnx_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable = nnx_dtypes.promote_dtype,
    is_causal: bool = False,
) -> Array:
    """`flax.nnx.dot_product_attention`, computed by our kernels: an `attention_fn` of NNX's layer.

    Args:
      module: where the weights are sown, as an `nnx.Intermediate`, "attention_weights".
      promote_dtype: function (arrays, dtype=) → arrays of one dtype.
      is_causal: a query sees keys of its own index and before.
      query, key, value, bias, mask, and the others: as in `linen_attention`.

    Returns:
      [..., T, N, Hv].

    Raises:
      ValueError: as `linen_attention`.
    """
    del broadcast_dropout
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    out, weights = _attend(
        "nnx_attention", query, key, value, bias, mask,
        dropout_rng, dropout_rate, deterministic, precision, is_causal, weights=module is not None,
    )  # fmt: skip
    if module is not None:
        module.sow(nnx.Intermediate, "attention_weights", weights.astype(query.dtype))
    return out


def _attend(
    who: str,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    mask: Array | None,
    dropout_key: Array | None,
    dropout_rate: float,
    deterministic: bool,
    precision: Any,
    is_causal: bool = False,
    *,
    weights: bool,
) -> tuple[Array, Any]:
    """[..., T, N, Hv], and the weights [..., N, T, S] if they are asked for."""
    q, k, v = heads_first(who, query, key, value)
    dropout_rate = 0.0 if deterministic else dropout_rate
    if dropout_rate and dropout_key is None:
        raise ValueError(f"{who}: dropout_rate={dropout_rate} needs dropout_rng, a PRNG key, or deterministic=True.")
    allowed = None
    if mask is not None:
        mask = full_rank(who, "mask", mask, q.ndim) != 0
        allowed = masks.per_head(mask) if q.ndim == 3 else masks.dense(mask)
    if is_causal:
        allowed = masks.causal() if allowed is None else allowed & masks.causal()
    # The derivative of the dense path keeps the precision of its products; those of others are traced without it.
    asked = precision not in (None, jax.lax.Precision.DEFAULT, "default") and jax.default_backend() != "cpu"
    with jax.default_matmul_precision(_name(precision)) if asked else nullcontext():
        heads, seen = kernels.attend(
            q, k, v,
            queries=tokens(q.shape[-2]), keys=tokens(k.shape[-2]),
            mask=allowed, bias=None if bias is None else full_rank(who, "bias", bias, q.ndim),
            dropout_rate=dropout_rate, dropout_key=dropout_key if dropout_rate else None,
            kernel="dense" if asked else "auto", capture=("weights",) if weights else (),
        )  # fmt: skip
    return jnp.swapaxes(heads, -2, -3), seen.get("weights")


def _name(precision: Any) -> str:
    """As JAX's configuration spells it."""
    name = getattr(precision, "name", precision)
    return name.lower() if isinstance(precision, jax.lax.Precision) else name
