"""Attention a few hundred rows at a time, whole rows of logits: for who captures weights, or changes them.

Chosen heads and queries only, and in memory that grows with T unless T × S numbers are what is asked for: entropies and
the attention that every key receives are summed up block by block. A fast path that has computed the attention hands
over its log-sum-exp; then a weight is exp(logit - log-sum-exp), and nothing else is computed.

`layout` says what a block is; within one, everything is a broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import dropout, precision
from mhajax.kernels import finite, patches
from mhajax.kernels import score as scores
from mhajax.kernels.contract import Inputs
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.kernels.loops import accumulate, times
from mhajax.kernels.rowwise import layout
from mhajax.kernels.rowwise.layout import First, KeySide, QuerySide, Selection


def attend(inputs: Inputs) -> tuple[Array, LogSumExp]:
    """The heads' outputs [..., N, T, Hv] in the dtype of v, and the log-sum-exp [..., N, T], with the patches."""
    captured: dict[str, Any] = capture(inputs, ("heads", "log_sum_exp"))
    return captured["heads"].astype(inputs.v.dtype), captured["log_sum_exp"]


def capture(
    inputs: Inputs, names: Sequence[str], *, heads: Sequence[int] | None = None, rows: Sequence[int] | None = None,
    log_sums: LogSumExp | None = None, real: Array | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What some heads and some queries compute.

    Args:
      inputs: of all heads and queries; the patches as in `interventions.Intervention`.
      names: "logits", "weights" [..., n, r, S], "entropy" [..., n, r], "column_sums" [..., n, S], "heads"
        [..., n, r, Hv] (with the dropout; of all rows), "log_sum_exp", a `LogSumExp` [..., n, r].
      heads, rows: as in `interventions.Capture`.
      log_sums: [..., N, T], if the attention was computed already.
      real: bool [..., T], queries that count in "column_sums".
    """
    q, k = inputs.q, inputs.k
    *leading, num_heads, length, _ = q.shape
    selection = Selection(tuple(leading), (num_heads, length, k.shape[-2]), heads, rows)
    query_side, key_side, inputs = layout.lay_out(inputs, selection, log_sums, real)
    words = dropout.words(inputs.dropout_key) if inputs.dropout_rate and inputs.dropout_key is not None else None
    of_block = partial(
        _of_block, query_side=query_side, key_side=key_side, names=names, inputs=inputs, selection=selection,
        words=words,
    )  # fmt: skip
    (examples, of_heads, of_rows), (in_examples, in_heads, in_rows) = selection.block, selection.blocks
    if in_examples * in_heads * in_rows > 1:
        of_block = jax.checkpoint(of_block, prevent_cse=False)

    def some_heads(index: Array) -> tuple[Array | None, dict[str, Any]]:
        """Of a block of examples and heads: what is summed over the rows, and what is not."""
        example, head = index // in_heads * examples, index % in_heads * of_heads

        def some_rows(total: Array | None, row: Array) -> tuple[Array | None, dict[str, Any]]:
            captured = of_block((example, head, row * of_rows))
            return None if total is None else total + captured.pop("column_sums"), captured

        nothing = jnp.zeros_like(k, _wide(q), (examples, of_heads, k.shape[-2])) if "column_sums" in names else None
        return accumulate(some_rows, nothing, in_rows)

    totals, captured = times(some_heads, in_examples * in_heads)
    *batch_heads, size = selection.sizes
    merge = lambda a: a.reshape(*batch_heads, in_rows * of_rows, *a.shape[5:])[:, :, :size]  # noqa: E731
    captured = jax.tree.map(merge, captured)
    if totals is not None:
        captured["column_sums"] = totals.reshape(*batch_heads, k.shape[-2])
    return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[1:]), captured)


def _of_block(
    first: First, *, query_side: QuerySide, key_side: KeySide, names: Sequence[str], inputs: Inputs,
    selection: Selection, words: Array | None,
) -> dict[str, Any]:  # fmt: skip
    """What the heads and rows of one block compute."""
    query_side = jax.tree.map(lambda a: layout.cut(a, first, selection.block), query_side)
    key_side = jax.tree.map(lambda a: layout.cut(a, first[:2], selection.block[:2]), key_side)
    logits, allowed = _logits(query_side, key_side, first, inputs, selection)
    bad = bad_rows = None  # pairs that may attend and are not finite, and who sees one
    computed = query_side.log_sums is not None
    if query_side.nonfinite is not None and key_side.nonfinite is not None and (not computed or "logits" in names):
        bad = query_side.nonfinite | key_side.nonfinite
        bad = bad if allowed is None else bad & allowed
        bad_rows = jnp.any(bad, axis=-1, keepdims=True)
    if query_side.log_sums is None:
        weights, log_sums = _softmax(logits)
    else:
        log_sums = query_side.log_sums
        bad_rows = jnp.isnan(log_sums.log_total)
        log_sums = log_sums._replace(log_total=jnp.where(bad_rows, 0, log_sums.log_total))
        weights = jnp.exp(_log_weights(logits, log_sums))
    if query_side.weights is not None:
        value, amount = query_side.weights
        weights = patches.mix(weights, value if allowed is None else jnp.where(allowed, value, 0), amount)
    mark = lambda array, where: array if where is None else finite.nan_where(where, array)  # noqa: E731

    def entropy() -> Array:
        if query_side.weights is not None:
            logs = jnp.log(jnp.where(weights > 0, weights, 1))
        else:  # the logarithm of a weight is there already
            logs = jnp.where(logits == -jnp.inf, 0, _log_weights(logits, log_sums))
        return -jnp.sum(weights * logs, axis=-1, keepdims=True)

    def output() -> Array:
        left = weights
        if words is not None:
            keep = dropout.keep_at(words, inputs.dropout_rate, _counter(first, selection))
            left = jnp.where(keep, weights * (1 / (1 - inputs.dropout_rate)), 0)
        return precision.einsum("bnts,bnsh->bnth", precision.narrow(left, key_side.v), key_side.v)

    def received() -> Array:
        counts = (first[2] + jnp.arange(selection.block[2]) < selection.sizes[2])[None, None, :, None]
        counts = counts if query_side.real is None else counts & query_side.real
        return jnp.sum(jnp.where(counts, mark(weights, bad_rows), 0), axis=-2)

    ways = {
        "logits": lambda: mark(logits, bad),
        "weights": lambda: mark(weights, bad_rows),
        "log_sum_exp": lambda: LogSumExp(log_sums.top[..., 0], mark(log_sums.log_total, bad_rows)[..., 0]),
        "entropy": lambda: mark(entropy(), bad_rows)[..., 0],
        "heads": lambda: mark(output(), bad_rows),
        "column_sums": received,
    }
    return {name: jax.tree.map(lambda a: a.astype(_wide(query_side.q)), ways[name]()) for name in names}


def _logits(
    query_side: QuerySide, key_side: KeySide, first: First, inputs: Inputs, selection: Selection
) -> tuple[Array, Array | None]:
    """Logits of a block [b, n, t, S], -inf where masked; and which pairs may attend, None: all."""
    logits = precision.einsum("bnth,bnsh->bnts", query_side.q, key_side.k) * inputs.scale
    if inputs.score is not None:
        logits = _scored(inputs.score, inputs.constants, logits, query_side, key_side, selection.heads_of(first))
    allowed = query_side.allowed if inputs.mask is None else layout.allowed(inputs.mask, first, inputs, selection)
    also = lambda visible: visible if allowed is None else allowed & visible  # noqa: E731
    if query_side.bias is not None:
        visible = query_side.bias != -jnp.inf  # NaN is not hidden
        allowed = also(visible)
        logits = logits + jnp.where(visible, query_side.bias, 0)
    if query_side.logits is not None:
        value, amount = query_side.logits
        hidden = value == -jnp.inf
        allowed, logits = also(~(hidden & (amount != 0))), patches.mix(logits, jnp.where(hidden, 0, value), amount)
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf), allowed


def _scored(score: Any, constants: tuple, logits: Array, query_side: QuerySide, key_side: KeySide, heads: Any) -> Array:
    """The score of every pair of a block."""
    of_pairs = scores.lift(score)
    one_head = lambda x, head, q, k: of_pairs(x, head, q, k, *constants)  # noqa: E731
    one_example = jax.vmap(one_head, in_axes=(0, 0, None, None))
    positions = query_side.position[:, 0, :, 0], key_side.position[:, 0, 0]
    positions = (jnp.broadcast_to(a, (logits.shape[0], a.shape[-1])) for a in positions)
    return jax.vmap(one_example, in_axes=(0, None, 0, 0))(logits, heads, *positions)


def _softmax(logits: Array) -> tuple[Array, LogSumExp]:
    """Weights [b, n, t, S], and the log-sum-exp of the logits, [b, n, t, 1].

    Not that of the dense path, which divides after the product: here the weights themselves are wanted.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    return weights / total, LogSumExp(top, jnp.where(nothing, -jnp.inf, jnp.log(total)))


def _log_weights(logits: Array, log_sums: LogSumExp) -> Array:
    """Logarithms of the weights; -inf where a pair may not attend."""
    return (logits - log_sums.top) - jnp.where(log_sums.log_total == -jnp.inf, 0, log_sums.log_total)


def _counter(first: First, selection: Selection) -> Array:
    """Indices for `dropout.keep_at`: those of the whole [..., N, T, S]."""
    word = lambda a: jnp.asarray(a, jnp.uint32)  # noqa: E731
    (examples, _, rows), (num_heads, length, num_keys) = selection.block, selection.shape
    example = word(first[0]) + jnp.arange(examples, dtype=jnp.uint32)
    row = word(first[2]) + jnp.arange(rows, dtype=jnp.uint32)
    head = example[:, None] * word(num_heads) + word(selection.heads_of(first))[None]
    query = head[..., None] * word(length) + row[None, None]
    return query[..., None] * word(num_keys) + jnp.arange(num_keys, dtype=jnp.uint32)[None, None, None]


def _wide(array: Array) -> Any:
    """The dtype of logits and sums."""
    return jnp.promote_types(array.dtype, jnp.float32)
