"""The definition of attention for given queries, keys and values: one head of one sequence, lifted over the others.

Every logit is held in memory, so this is the path for short sequences and the yardstick for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import dropout, precision
from mhajax.kernels import finite, pairs
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.masks import Mask, Tokens


def attend(q: Array, k: Array, v: Array, **options) -> tuple[Array, LogSumExp]:
    """The heads' outputs [..., N, T, Hv] in the dtype of v, and the log-sum-exp of every query [..., N, T].

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      **options: mask, bias, score, constants, queries, keys, scale, dropout_rate and dropout_key, as in
        `kernels.attend`, and cached.
    """
    heads, seen = _guarded(q, k, v, capture=("log_sum_exp",), **options)
    return heads, seen["log_sum_exp"]


def look(q: Array, k: Array, v: Array, **options) -> dict[str, Array]:
    """The "logits" and "weights", each [..., N, T, S]. Arguments as in `attend`."""
    return _guarded(q, k, v, capture=("logits", "weights"), **options)[1]


def _guarded(
    q: Array, k: Array, v: Array, *, queries: Tokens, keys: Tokens, mask: Mask | None = None, bias: Array | None = None,
    cached: bool = False, **options: Any,
) -> tuple[Array, dict[str, Any]]:  # fmt: skip
    """`_lifted`, with what is not finite kept where it may be seen; a cache has seen to that itself."""
    given: dict[str, Any] = {"queries": queries, "keys": keys, "mask": mask, "bias": bias, **options}
    if cached or (mask is None and bias is None):
        return _lifted(q, k, v, moderate=not cached, **given)
    q, k, v, spoilt = finite.heal(q, k, v)
    heads, captured = _lifted(q, k, v, moderate=True, **given)
    rows = finite.reached(spoilt, mask, bias, queries, keys, q.shape)
    return finite.mark(heads, captured, rows, spoilt, mask, bias, queries, keys)


def _lifted(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask | None = None,
    bias: Array | None = None,
    score: Callable | None = None,
    constants: tuple[Array, ...] = (),
    queries: Tokens,
    keys: Tokens,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    capture: Sequence[str] = (),
    moderate: bool,
) -> tuple[Array, dict[str, Any]]:
    *leading, num_heads, length, width = q.shape
    num_kv_heads, num_keys = k.shape[-3:-1]
    full = (*leading, num_heads, length, num_keys)
    allowed = None if mask is None else full_rank("mask", mask.block(queries, keys), full)
    if bias is not None:
        bias = full_rank("bias", bias, full)
        visible = bias != -jnp.inf  # NaN is not hidden
        allowed = visible if allowed is None else allowed & visible
        bias = jnp.where(allowed, bias, 0)  # what a mask hides may be anything
    kept = None if dropout_key is None or not dropout_rate else dropout.keep(dropout_key, dropout_rate, full)
    of_pairs = None if score is None else pairs.lift(score)

    def one_head(q, k, v, allowed, bias, kept, head, q_position, k_position):
        scored = None
        if of_pairs is not None:
            scored = partial(_scored, of_pairs, head, q_position, k_position, constants)
        return attend_head(
            q, k, v, allowed, bias, kept, scored,
            scale=scale, dropout_rate=dropout_rate, capture=capture, moderate=moderate,
        )  # fmt: skip

    # Heads as [B, K, G]: what is shared is mapped over none of the axes that share it.
    sizes = (math.prod(leading), num_kv_heads, num_heads // num_kv_heads)
    places = [jnp.asarray(tokens.position) for tokens in (queries, keys)]
    heads, captured = _lift(one_head, sizes)(
        q.reshape(*sizes, length, width),
        k.reshape(sizes[0], num_kv_heads, 1, *k.shape[-2:]),
        v.reshape(sizes[0], num_kv_heads, 1, *v.shape[-2:]),
        *(None if a is None else _split_heads(a, leading, sizes) for a in (allowed, bias, kept)),
        None if score is None else jnp.arange(num_heads).reshape(1, *sizes[1:]),
        *(None if score is None else a.reshape(-1, 1, 1, a.shape[-1]) for a in places),
    )
    shape = (*leading, num_heads)
    return heads.reshape(*shape, length, v.shape[-1]), jax.tree.map(lambda a: a.reshape(*shape, *a.shape[3:]), captured)


def attend_head(
    q: Array,
    k: Array,
    v: Array,
    allowed: Array | None = None,
    bias: Array | None = None,
    kept: Array | None = None,
    score: Callable[[Array], Array] | None = None,
    *,
    scale: float,
    dropout_rate: float = 0.0,
    capture: Sequence[str] = (),
    moderate: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """One head of one sequence.

    Args:
      q: [T, H].
      k: [S, H].
      v: [S, Hv].
      allowed: bool, broadcasts to [T, S]; None is all.
      bias: broadcasts to [T, S].
      kept: bool [T, S], the weights that dropout leaves.
      score: function of the scaled products [T, S].
      scale: factor of the products.
      dropout_rate: share of the weights that is dropped.
      capture: "logits", "weights", "log_sum_exp".
      moderate: the products of q and k are known to be finite, so that -inf may be added to what is hidden.

    Returns:
      [T, Hv] in the dtype of v, and what is captured: arrays [T, S], or a `LogSumExp`.
    """
    logits = precision.einsum("th,sh->ts", q, k) * scale
    if score is not None:
        logits = score(logits)
        if allowed is None:
            allowed = logits != -jnp.inf  # what the function hides
    if bias is not None:
        logits = logits + bias
    if allowed is not None:  # a sum stays in one loop with the products, a choice does not
        logits = _hidden(logits, allowed) if moderate and score is None else jnp.where(allowed, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if allowed is not None:  # bounds, not choices: the compiler can take them and both products as one loop
        top = jnp.maximum(top, jnp.finfo(top.dtype).min)
    weights = jnp.exp(logits - top)  # not yet divided by their sum, which is cheaper after the product
    total = sums = jnp.sum(weights, axis=-1, keepdims=True)
    if allowed is not None:
        total = jnp.maximum(sums, 0.5)  # 0 of a query that sees nothing, at least 1 of any other
    kept_weights = weights if kept is None else jnp.where(kept, weights * (1 / (1 - dropout_rate)), 0)
    out = precision.einsum("ts,sh->th", precision.narrow(kept_weights, v), v) / total

    def log_sum_exp() -> LogSumExp:
        log_total = jnp.log(total)
        log_total = log_total if allowed is None else jnp.where(sums == 0, -jnp.inf, log_total)
        return LogSumExp(top[:, 0], log_total[:, 0])

    captured = {"logits": lambda: logits, "weights": lambda: weights / total, "log_sum_exp": log_sum_exp}
    return out.astype(v.dtype), {name: captured[name]() for name in capture}


@jax.custom_jvp
def _hidden(logits: Array, allowed: Array) -> Array:
    """Finite logits, -inf where hidden."""
    return logits + jnp.where(allowed, 0, -jnp.inf).astype(logits.dtype)


@_hidden.defjvp
def _change_of_hidden(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    logits, allowed = primals
    # A hidden value may be so large that what its weight of 0 owes is NaN.
    return _hidden(logits, allowed), jnp.where(allowed, tangents[0], 0)


def _scored(score: Callable, head: Array, q_position: Array, k_position: Array, constants: tuple, logits: Array):
    return score(logits, head, q_position, k_position, *constants)


def scaled(q: Array, scale: float | Array | None) -> tuple[Array, float]:
    """The queries, and the number by which their products are multiplied; an array is multiplied into the queries."""
    if scale is None:
        return q, q.shape[-1] ** -0.5
    if not isinstance(scale, jax.Array | np.ndarray):
        return q, scale
    scale = full_rank("scale", jnp.asarray(scale), (*q.shape[:-1], 1), "[..., N, T, 1]")
    return (q * scale.astype(jnp.promote_types(q.dtype, jnp.float32))).astype(q.dtype), 1.0


def full_rank(name: str, array: Array, full: tuple[int, ...], axes: str = "[..., N, T, S]") -> Array:
    """The array with 1 for the axes that it lacks: [..., 1 or N, t, s]. What the axes are called is for the error.

    Raises:
      ValueError: if it does not broadcast to the full shape.
    """
    given = array.shape
    array = array.reshape((1,) * (len(full) - array.ndim) + given)
    if array.ndim > len(full) or any(have not in (1, want) for have, want in zip(array.shape, full, strict=True)):
        raise ValueError(
            f"attention: {name} must broadcast to {axes} = {full}, got {given}; use 1 for an axis that is shared."
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
