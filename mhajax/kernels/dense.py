"""The definition of attention for given queries, keys and values: one head of one sequence, lifted over the others.

Every logit is held in memory, so this is the path for short sequences and the yardstick for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import dropout, precision
from mhajax.masks import Mask, Tokens

CAPTURES = ("logits", "weights")


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | None = None,
    bias: Array | None = None,
    queries: Tokens,
    keys: Tokens,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    capture: Sequence[str] = (),
) -> tuple[Array, dict[str, Array]]:
    """Scaled dot-product attention of every head, softmax(scale · q kᵀ + bias, mask) v.

    Logits, softmax and sums are float32 (float64 for float64 input), whatever the dtype of q, k and v. A query with
    nothing to attend to gives zeros. With a mask, keys and values that are not finite harm only the queries that may
    see them: those get NaN.

    Args:
      q: queries [..., N, T, H].
      k: keys [..., K, S, H]; query head n uses key head n // (N/K).
      v: values [..., K, S, Hv].
      mask: who may attend to whom; None is everybody to everybody.
      bias: added to the logits, broadcasts to [..., N, T, S]; -inf masks.
      queries: indices and positions of the T queries.
      keys: indices and positions of the S keys.
      scale: factor of the logits; 1/√H if None.
      dropout_rate: share of the weights that is dropped.
      dropout_key: PRNG key; None is no dropout.
      capture: any of "logits" (scaled, with bias, -inf where masked) and "weights" (before dropout).

    Returns:
      The heads' outputs [..., N, T, Hv] in the dtype of v, and the captured arrays, each [..., N, T, S].
    """
    *leading, num_heads, length, width = q.shape
    num_kv_heads, num_keys = k.shape[-3:-1]
    full = (*leading, num_heads, length, num_keys)
    allowed = None if mask is None else _full_rank("mask", mask.block(queries, keys), full)
    if bias is not None:
        bias = _full_rank("bias", bias, full)
        visible = bias != -jnp.inf  # NaN is not hidden
        allowed = visible if allowed is None else allowed & visible
        bias = jnp.where(visible, bias, 0)
    kept = None if dropout_key is None or not dropout_rate else dropout.keep(dropout_key, dropout_rate, full)

    def one_head(q, k, v, allowed, bias, kept):
        return attend_head(
            q, k, v, allowed, bias, kept,
            scale=width**-0.5 if scale is None else scale, dropout_rate=dropout_rate, capture=capture,
        )  # fmt: skip

    sizes = (math.prod(leading), num_kv_heads, num_heads // num_kv_heads)
    lifted = _lift(one_head, sizes)
    heads, captured = lifted(
        q.reshape(*sizes, *q.shape[-2:]),
        k.reshape(*sizes[:2], 1, *k.shape[-2:]),
        v.reshape(*sizes[:2], 1, *v.shape[-2:]),
        *(None if a is None else _split_heads(a, leading, sizes) for a in (allowed, bias, kept)),
    )
    return jax.tree.map(lambda a: a.reshape(*leading, num_heads, *a.shape[-2:]), (heads, captured))


def attend_head(
    q: Array,
    k: Array,
    v: Array,
    allowed: Array | None = None,
    bias: Array | None = None,
    kept: Array | None = None,
    *,
    scale: float,
    dropout_rate: float = 0.0,
    capture: Sequence[str] = (),
) -> tuple[Array, dict[str, Array]]:
    """One head of one sequence.

    Args:
      q: [T, H].
      k: [S, H].
      v: [S, Hv].
      allowed: bool, broadcasts to [T, S]; None is all.
      bias: broadcasts to [T, S].
      kept: bool [T, S], the weights that dropout leaves.
      scale: factor of the logits.
      dropout_rate: share of the weights that is dropped.
      capture: "logits", "weights".

    Returns:
      [T, Hv] in the dtype of v, and the captured arrays [T, S].
    """
    float_dtype = jnp.promote_types(q.dtype, jnp.float32)
    spoilt = spoilt_rows = None
    if allowed is not None:  # without a mask every key is seen by every query, and nothing has to be kept apart
        q, spoilt_queries = _heal(q)
        k, spoilt_keys = _heal(k)
        v, spoilt_values = _heal(v)
        spoilt = allowed & (spoilt_queries[:, None] | spoilt_keys | spoilt_values)  # [T, S]
        spoilt_rows = jnp.any(spoilt, axis=-1, keepdims=True)
    logits = precision.einsum("th,sh->ts", q, k) * scale
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if allowed is not None:
        top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - top)  # not yet divided by their sum, which is cheaper after the product
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if allowed is not None:
        total = jnp.where(total == 0, 1, total)
    kept_weights = weights if kept is None else jnp.where(kept, weights * (1 / (1 - dropout_rate)), 0)
    out = precision.einsum("ts,sh->th", kept_weights.astype(v.dtype), v) / total
    if spoilt_rows is not None:
        out = out + jnp.where(spoilt_rows, jnp.nan, 0).astype(float_dtype)
    captured = {"logits": lambda: _mark(logits, spoilt), "weights": lambda: _mark(weights / total, spoilt_rows)}
    return out.astype(v.dtype), {name: captured[name]() for name in capture}


def _heal(rows: Array) -> tuple[Array, Array]:
    """Rows with 0 in place of NaN and Inf, and which rows had any.

    Zero times NaN is NaN, so a weight of 0 does not keep a bad key away from the sums, and least of all from the
    gradients. Bad entries are taken out before, and what they spoil is marked after.
    """
    finite = jnp.isfinite(rows)
    return jnp.where(finite, rows, 0), ~jnp.all(finite, axis=-1)


def _mark(array: Array, spoilt: Array | None) -> Array:
    """The array with NaN where it is spoilt."""
    return array if spoilt is None else jnp.where(spoilt, jnp.nan, array)


def _full_rank(name: str, array: Array, full: tuple[int, ...]) -> Array:
    """The array with 1 for the axes that it lacks: [..., 1 or N, t, s]."""
    array = array.reshape((1,) * (len(full) - array.ndim) + array.shape)
    if array.ndim > len(full) or any(have not in (1, want) for have, want in zip(array.shape, full, strict=True)):
        raise ValueError(
            f"attention: {name} must broadcast to [..., N, T, S] = {full}, got {array.shape}; "
            "use 1 for an axis that is shared."
        )
    return array


def _split_heads(array: Array, leading: Sequence[int], sizes: tuple[int, int, int]) -> Array:
    """[..., 1 or N, t, s] to [B or 1, K or 1, G or 1, t, s]."""
    *have, heads, t, s = array.shape
    batch = math.prod(leading)
    if math.prod(have) not in (1, batch):  # only some of the leading axes are shared
        array, have = jnp.broadcast_to(array, (*leading, heads, t, s)), leading
    groups = (1, 1) if heads == 1 else sizes[1:]
    return array.reshape(math.prod(have), *groups, t, s)


def _lift(function: Callable, sizes: Sequence[int]) -> Callable:
    """The function mapped over leading axes of these sizes; an axis of 1, or an absent argument, is shared."""
    if not sizes:
        return function
    inner = _lift(function, sizes[1:])

    def lifted(*arguments):
        mapped = [a is not None and a.shape[0] == sizes[0] for a in arguments]
        given = [a if m or a is None else a[0] for a, m in zip(arguments, mapped, strict=True)]
        axes = [0 if m else None for m in mapped]
        return jax.vmap(inner, in_axes=axes, axis_size=sizes[0])(*given)

    return lifted
