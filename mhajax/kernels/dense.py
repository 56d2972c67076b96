"""The definition of attention for given queries, keys and values: one head of one sequence, lifted over the others.

Every logit is held in memory, so this is the path for short sequences and the yardstick for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import dropout, precision
from mhajax.kernels import finite, rowwise, score, shapes
from mhajax.kernels.contract import CACHED, FEW, PATCHED, Inputs, Plan, Request
from mhajax.kernels.log_sum_exp import LogSumExp


def refusal(request: Request) -> str:
    """The definition does everything."""
    return ""


def reluctance(request: Request) -> str:
    """It is for few logits, and for what only whole rows can do."""
    return "" if request.few or request.cached or request.patched else "it holds all T × S logits"


def plan(request: Request) -> Plan:
    """Everything at once."""
    return Plan(CACHED if request.cached else PATCHED if request.patched else FEW)


def attend(inputs: Inputs) -> tuple[Array, LogSumExp]:
    """The heads' outputs [..., N, T, Hv] in the dtype of v, and the log-sum-exp of every query [..., N, T]."""
    if inputs.patched:
        return rowwise.attend(inputs)
    heads, captured = _guarded(inputs, ("log_sum_exp",))
    return heads, captured["log_sum_exp"]


def capture(inputs: Inputs) -> dict[str, Array]:
    """The "logits" and "weights", each [..., N, T, S], of inputs without patches."""
    return _guarded(inputs, ("logits", "weights"))[1]


def _guarded(inputs: Inputs, names: Sequence[str]) -> tuple[Array, dict[str, Any]]:
    """`_lifted`, with what is non-finite kept where it may be seen."""
    if not inputs.guarded:
        return _lifted(inputs, names, bounded=not inputs.cached)
    q, k, v, nonfinite = finite.replace_nonfinite(inputs.q, inputs.k, inputs.v)
    heads, captured = _lifted(inputs._replace(q=q, k=k, v=v), names, bounded=True)
    return finite.mark(heads, captured, finite.reached(nonfinite, inputs), nonfinite, inputs)


def _lifted(inputs: Inputs, names: Sequence[str], bounded: bool) -> tuple[Array, dict[str, Any]]:
    """`attend_head` over heads and examples, and what it captures."""
    q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.bias
    *leading, num_heads, length, width = q.shape
    num_kv_heads, num_keys = k.shape[-3:-1]
    full = (*leading, num_heads, length, num_keys)
    allowed = None
    if inputs.mask is not None:
        allowed = shapes.check_full_rank("mask", inputs.mask.block(inputs.queries, inputs.keys), full)
    if bias is not None:
        visible = bias != -jnp.inf  # NaN is not hidden
        allowed = visible if allowed is None else allowed & visible
        bias = jnp.where(allowed, bias, 0)  # what a mask hides may be anything
    kept = None
    if inputs.dropout_key is not None and inputs.dropout_rate:
        kept = dropout.keep(inputs.dropout_key, inputs.dropout_rate, full)
    of_pairs: Any = None if inputs.score is None else score.lift(inputs.score)

    def one_head(q, k, v, allowed, bias, kept, head, q_position, k_position):
        scored = None if of_pairs is None else lambda x: of_pairs(x, head, q_position, k_position, *inputs.constants)
        return attend_head(
            q, k, v, allowed, bias, kept, scored,
            scale=inputs.scale, dropout_rate=inputs.dropout_rate, capture=names, bounded=bounded,
        )  # fmt: skip

    # Heads as [B, K, G]: what is shared is mapped over none of the axes that share it.
    sizes = (math.prod(leading), num_kv_heads, num_heads // num_kv_heads)
    positions = [jnp.asarray(tokens.position) for tokens in (inputs.queries, inputs.keys)]
    heads, captured = _lift(one_head, sizes)(
        q.reshape(*sizes, length, width),
        k.reshape(sizes[0], num_kv_heads, 1, *k.shape[-2:]),
        v.reshape(sizes[0], num_kv_heads, 1, *v.shape[-2:]),
        *(None if a is None else shapes.flatten_leading(a, leading, sizes[1:]) for a in (allowed, bias, kept)),
        None if of_pairs is None else jnp.arange(num_heads).reshape(1, *sizes[1:]),
        *(None if of_pairs is None else a.reshape(-1, 1, 1, a.shape[-1]) for a in positions),
    )
    shape = (*leading, num_heads)
    return heads.reshape(*shape, length, v.shape[-1]), jax.tree.map(lambda a: a.reshape(*shape, *a.shape[3:]), captured)


def attend_head(
    q: Array, k: Array, v: Array, allowed: Array | None = None, bias: Array | None = None, kept: Array | None = None,
    score: Callable[[Array], Array] | None = None, *, scale: float, dropout_rate: float = 0.0,
    capture: Sequence[str] = (), bounded: bool = False,
) -> tuple[Array, dict[str, Any]]:  # fmt: skip
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
      dropout_rate: fraction of the weights that is dropped.
      capture: "logits", "weights", "log_sum_exp".
      bounded: the products of q and k are known to be finite, so that -inf may be added to what is hidden.

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
        logits = _hidden(logits, allowed) if bounded and score is None else jnp.where(allowed, logits, -jnp.inf)
    # The softmax of this path divides after the product; `rowwise` wants weights, and `blockwise` has a running sum.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    if allowed is not None:  # bounds, not choices: the compiler can take them and both products as one loop
        top = jnp.maximum(top, jnp.finfo(top.dtype).min)
    weights = jnp.exp(logits - top)  # not yet divided by their sum, which is cheaper after the product
    total = sums = jnp.sum(weights, axis=-1, keepdims=True)
    if allowed is not None:
        total = jnp.maximum(sums, 0.5)  # 0 of a fully masked query, at least 1 of any other
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
