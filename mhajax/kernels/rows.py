"""Attention a few hundred rows at a time, whole rows of logits: for what looks at weights, or changes them.

Chosen heads and queries only, and in memory that grows with T unless T × S numbers are what is asked for: entropies and
the attention that every key receives are summed up block by block. A fast path that has computed the attention hands
over its log-sum-exp; then a weight is exp(logit - log-sum-exp), and nothing else is computed.

`row_layout` says what a block is; within one, everything is a broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import dropout, precision
from mhajax.kernels import finite, pairs, patches, row_layout
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.kernels.loops import accumulate, times
from mhajax.kernels.row_layout import Answering, Asked, Asking, First, Given


def attend(q: Array, k: Array, v: Array, given: Given) -> tuple[Array, LogSumExp]:
    """The heads' outputs [..., N, T, Hv] in the dtype of v, and the log-sum-exp [..., N, T], with the patches."""
    found: dict[str, Any] = look(q, k, v, given, names=("heads", "log_sum_exp"))
    return found["heads"].astype(v.dtype), found["log_sum_exp"]


def look(
    q: Array,
    k: Array,
    v: Array,
    given: Given,
    *,
    names: Sequence[str],
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    log_sums: LogSumExp | None = None,
    real: Array | None = None,
) -> dict[str, Any]:
    """What some heads and some queries compute.

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      given: the rest.
      names: "logits", "weights" [..., n, r, S], "entropy" [..., n, r], "column_sums" [..., n, S], "heads"
        [..., n, r, Hv] (with the dropout; of all rows), "log_sum_exp", a `LogSumExp` [..., n, r].
      heads, rows: as in `interventions.Capture`.
      log_sums: [..., N, T], if the attention was computed already.
      real: bool [..., T], queries that count in "column_sums".
    """
    *leading, num_heads, length, _ = q.shape
    asked = Asked(tuple(leading), (num_heads, length, k.shape[-2]), heads, rows)
    asking, answering, given = row_layout.lay_out(q, k, v, given, asked, log_sums, real)
    words = dropout.words(given.dropout_key) if given.dropout_rate and given.dropout_key is not None else None
    of_block = partial(
        _of_block, asking=asking, answering=answering, names=names, given=given, asked=asked, words=words
    )
    (examples, of_heads, of_rows), (in_examples, in_heads, in_rows) = asked.block, asked.blocks
    if in_examples * in_heads * in_rows > 1:
        of_block = jax.checkpoint(of_block, prevent_cse=False)

    def some_heads(index: Array) -> tuple[Array | None, dict[str, Any]]:
        """Of a block of examples and heads: what is summed over the rows, and what is not."""
        example, head = index // in_heads * examples, index % in_heads * of_heads

        def some_rows(total: Array | None, row: Array) -> tuple[Array | None, dict[str, Any]]:
            found = of_block((example, head, row * of_rows))
            return None if total is None else total + found.pop("column_sums"), found

        nothing = jnp.zeros_like(k, _wide(q), (examples, of_heads, k.shape[-2])) if "column_sums" in names else None
        return accumulate(some_rows, nothing, in_rows)

    totals, found = times(some_heads, in_examples * in_heads)
    *items, size = asked.sizes
    joined = lambda a: a.reshape(*items, in_rows * of_rows, *a.shape[5:])[:, :, :size]  # noqa: E731
    found = jax.tree.map(joined, found)
    if totals is not None:
        found["column_sums"] = totals.reshape(*items, k.shape[-2])
    return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[1:]), found)


def _of_block(
    first: First, *, asking: Asking, answering: Answering, names: Sequence[str], given: Given, asked: Asked,
    words: Array | None,
) -> dict[str, Any]:  # fmt: skip
    """What the heads and rows of one block compute."""
    asking = jax.tree.map(lambda a: row_layout.cut(a, first, asked.block), asking)
    answering = jax.tree.map(lambda a: row_layout.cut(a, first[:2], asked.block[:2]), answering)
    logits, allowed = _logits(asking, answering, first, given, asked)
    bad = bad_rows = None  # pairs that may attend and are not finite, and who sees one
    if asking.spoilt is not None and answering.spoilt is not None and (asking.log_sums is None or "logits" in names):
        bad = asking.spoilt | answering.spoilt
        bad = bad if allowed is None else bad & allowed
        bad_rows = jnp.any(bad, axis=-1, keepdims=True)
    if asking.log_sums is None:
        weights, log_sums = _softmax(logits)
    else:
        log_sums = asking.log_sums
        bad_rows = jnp.isnan(log_sums.log_total)
        log_sums = log_sums._replace(log_total=jnp.where(bad_rows, 0, log_sums.log_total))
        weights = jnp.exp(_log_weights(logits, log_sums))
    if asking.weights is not None:
        value, amount = asking.weights
        weights = patches.mixed(weights, value if allowed is None else jnp.where(allowed, value, 0), amount)
    mark = lambda array, where: array if where is None else finite.nan_where(where, array)  # noqa: E731

    def entropy() -> Array:
        if asking.weights is not None:
            logs = jnp.log(jnp.where(weights > 0, weights, 1))
        else:  # the logarithm of a weight is there already
            logs = jnp.where(logits == -jnp.inf, 0, _log_weights(logits, log_sums))
        return -jnp.sum(weights * logs, axis=-1, keepdims=True)

    def output() -> Array:
        left = weights
        if words is not None:
            keep = dropout.keep_at(words, given.dropout_rate, _counter(first, asked))
            left = jnp.where(keep, weights * (1 / (1 - given.dropout_rate)), 0)
        return precision.einsum("bnts,bnsh->bnth", precision.narrow(left, answering.v), answering.v)

    def received() -> Array:
        counts = (first[2] + jnp.arange(asked.block[2]) < asked.sizes[2])[None, None, :, None]
        counts = counts if asking.real is None else counts & asking.real
        return jnp.sum(jnp.where(counts, mark(weights, bad_rows), 0), axis=-2)

    ways = {
        "logits": lambda: mark(logits, bad),
        "weights": lambda: mark(weights, bad_rows),
        "log_sum_exp": lambda: LogSumExp(log_sums.top[..., 0], mark(log_sums.log_total, bad_rows)[..., 0]),
        "entropy": lambda: mark(entropy(), bad_rows)[..., 0],
        "heads": lambda: mark(output(), bad_rows),
        "column_sums": received,
    }
    return {name: jax.tree.map(lambda a: a.astype(_wide(asking.q)), ways[name]()) for name in names}


def _logits(
    asking: Asking, answering: Answering, first: First, given: Given, asked: Asked
) -> tuple[Array, Array | None]:
    """Logits of a block [b, n, t, S], -inf where masked; and which pairs may attend, None: all."""
    logits = precision.einsum("bnth,bnsh->bnts", asking.q, answering.k) * given.scale
    if given.score is not None:
        logits = _scored(given.score, logits, asking, answering, asked.heads_of(first), given.constants)
    allowed = asking.allowed if given.mask is None else row_layout.allowed(given.mask, first, given, asked)
    also = lambda visible: visible if allowed is None else allowed & visible  # noqa: E731
    if asking.bias is not None:
        visible = asking.bias != -jnp.inf  # NaN is not hidden
        allowed = also(visible)
        logits = logits + jnp.where(visible, asking.bias, 0)
    if asking.logits is not None:
        value, amount = asking.logits
        hidden = value == -jnp.inf
        allowed = also(~(hidden & (amount != 0)))
        logits = patches.mixed(logits, jnp.where(hidden, 0, value), amount)
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf), allowed


def _scored(
    score: Callable, logits: Array, asking: Asking, answering: Answering, heads: Any, constants: tuple[Array, ...]
) -> Array:
    """The score of every pair of a block."""
    of_pairs = pairs.lift(score)
    one_head = lambda x, head, mine, theirs: of_pairs(x, head, mine, theirs, *constants)  # noqa: E731
    one_example = jax.vmap(one_head, in_axes=(0, 0, None, None))
    mine, theirs = asking.position[:, 0, :, 0], answering.position[:, 0, 0]
    mine, theirs = (jnp.broadcast_to(a, (logits.shape[0], a.shape[-1])) for a in (mine, theirs))
    return jax.vmap(one_example, in_axes=(0, None, 0, 0))(logits, heads, mine, theirs)


def _softmax(logits: Array) -> tuple[Array, LogSumExp]:
    """Weights [b, n, t, S], and the log-sum-exp of the logits, [b, n, t, 1]."""
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


def _counter(first: First, asked: Asked) -> Array:
    """Indices for `dropout.keep_at`: those of the whole [..., N, T, S]."""
    word = lambda a: jnp.asarray(a, jnp.uint32)  # noqa: E731
    (examples, _, rows), (num_heads, length, num_keys) = asked.block, asked.shape
    example = word(first[0]) + jnp.arange(examples, dtype=jnp.uint32)
    row = word(first[2]) + jnp.arange(rows, dtype=jnp.uint32)
    item = example[:, None] * word(num_heads) + word(asked.heads_of(first))[None]
    query = item[..., None] * word(length) + row[None, None]
    return query[..., None] * word(num_keys) + jnp.arange(num_keys, dtype=jnp.uint32)[None, None, None]


def _wide(array: Array) -> Any:
    """The dtype of logits and sums."""
    return jnp.promote_types(array.dtype, jnp.float32)
