"""Attention a few hundred rows at a time, whole rows of logits: for what looks at weights, or changes them.

Chosen heads and queries only, and in memory that grows with T unless T × S numbers are what is asked for: entropies and
the attention that every key receives are summed up block by block. A fast path that has computed the attention hands
over its log-sum-exp; then a weight is exp(logit - log-sum-exp), and nothing else is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import dropout, precision
from mhajax.interventions import Patch
from mhajax.kernels import finite, grid, pairs, patches
from mhajax.masks import Mask, Tokens
from mhajax.masks.by_index import Dense
from mhajax.masks.static import longer

ROOM = 2**21  # logits in memory at a time: 8 MiB


class Given(NamedTuple):
    """What an attention is given, as in `kernels.attend`; the patches as in `interventions.Intervention`."""

    mask: Mask | None
    bias: Array | None  # with all axes
    score: Callable | None
    constants: tuple[Array, ...]
    queries: Tokens
    keys: Tokens
    scale: float
    dropout_rate: float
    dropout_key: Array | None
    cached: bool = False
    logits: Patch | None = None
    weights: Patch | None = None

    @property
    def guarded(self) -> bool:
        """Whether what is not finite must stay where it is seen; a cache has seen to that itself."""
        return not self.cached and any(a is not None for a in (self.mask, self.bias, self.logits, self.weights))


def attend(q: Array, k: Array, v: Array, given: Given) -> tuple[Array, Array]:
    """The heads' outputs [..., N, T, Hv] in the dtype of v, and the log-sum-exp [..., N, T], with the patches."""
    found = look(q, k, v, given, names=("heads", "log_sum_exp"))
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
    log_sums: Array | None = None,
    real: Array | None = None,
) -> dict[str, Array]:
    """What some heads and some queries compute.

    Args:
      q: [..., N, T, H].
      k: [..., K, S, H].
      v: [..., K, S, Hv].
      given: the rest.
      names: "logits", "weights" [..., n, r, S], "entropy", "log_sum_exp" [..., n, r], "column_sums" [..., n, S],
        "heads" [..., n, r, Hv] (with the dropout).
      heads, rows: as in `interventions.Capture`.
      log_sums: [..., N, T], if the attention was computed already.
      real: bool [..., T], queries that count in "column_sums".
    """
    *leading, num_heads, length, _ = q.shape
    group, num_keys = num_heads // k.shape[-3], k.shape[-2]
    spoilt = None
    if given.guarded:
        q, k, v, spoilt = finite.heal(q, k, v)
    chosen = np.arange(num_heads) if heads is None else np.asarray(heads)
    queries, keys, mask = given.queries, given.keys, given.mask
    if rows is not None:
        mask = None if mask is None else _written_out(mask, queries, keys, np.asarray(rows))
        queries, keys = Tokens(0, queries.position[..., np.asarray(rows)]), keys._replace(start=0)
    size = length if rows is None else len(rows)
    items = math.prod(leading) * len(chosen)
    at_once, block = _cut(items, size, num_keys)
    blocks = -(-size // block)
    padding = blocks * block - size

    def arranged(array: Array) -> Array:
        """[..., 1 or N, 1 or T, s] with the heads and rows that are chosen, [B or 1, n or 1, T or 1, s]."""
        if heads is not None and array.shape[-3] > 1:
            array = array[..., chosen, :, :]
        if array.shape[-2] > 1 or length == 1:
            array = array if rows is None else array[..., np.asarray(rows), :]
            array = longer(array, -2, padding)
        *have, n, t, s = array.shape
        if math.prod(have) not in (1, math.prod(leading)):
            array, have = jnp.broadcast_to(array, (*leading, n, t, s)), leading
        return array.reshape(math.prod(have), n, t, s)

    of_patch = lambda patch: None if patch is None else tuple(map(arranged, patches.laid_out(patch, q.ndim)))  # noqa: E731
    flat_keys = lambda array: array.reshape(-1, *array.shape[-3:])  # noqa: E731
    asking, answering = arranged(q), (flat_keys(k), flat_keys(v))
    bias = None if given.bias is None else arranged(given.bias)
    changed_logits, changed_weights = of_patch(given.logits), of_patch(given.weights)
    sums = None if log_sums is None else arranged(log_sums[..., None])
    counted = None if real is None else arranged(real[..., None, :, None])
    bad_queries = None if spoilt is None else arranged(spoilt.queries[..., None])
    bad_keys = None if spoilt is None else flat_keys(spoilt.keys[..., None, :])
    if mask is not None:
        mask = mask.laid_out(queries, keys, tuple(leading), (padding, 0))
    queries = queries._replace(position=longer(queries.position, -1, padding))
    words = dropout.words(given.dropout_key) if given.dropout_rate and given.dropout_key is not None else None
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def one(item: Array, row: Array) -> dict[str, Array]:
        """Some rows of one head of one example."""
        example, place = item // len(chosen), item % len(chosen)
        head = jnp.asarray(chosen)[place]
        part = partial(_part, place=(example, place, row * block), rows=block)
        key, value = (a[example, head // group] for a in answering)
        mine, theirs = queries.of(example).part(row, block), keys.of(example)
        logits = precision.einsum("th,sh->ts", part(asking), key) * given.scale
        if given.score is not None:
            logits = pairs.lift(given.score)(
                logits, head, mine.position, jnp.asarray(theirs.position), *given.constants
            )
        allowed = None
        if mask is not None:
            seen = mask.of(example, head).block(mine, theirs)
            allowed = seen.reshape(seen.shape[-2:])
        if bias is not None:
            added = part(bias)
            visible = added != -jnp.inf  # NaN is not hidden
            allowed = visible if allowed is None else allowed & visible
            logits = logits + jnp.where(visible, added, 0)
        if changed_logits is not None:
            other, amount = map(part, changed_logits)
            hides = other == -jnp.inf
            visible = ~(hides & (amount != 0))
            allowed = visible if allowed is None else allowed & visible
            logits = patches.mixed(logits, jnp.where(hides, 0, other), amount)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)

        bad = bad_rows = None
        if bad_queries is not None and bad_keys is not None and (sums is None or "logits" in names):
            bad = part(bad_queries) | bad_keys[example, head]
            bad = jnp.broadcast_to(bad if allowed is None else bad & allowed, logits.shape)
            bad_rows = jnp.any(bad, axis=-1)
        if sums is None:
            top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
            top = jnp.where(top == -jnp.inf, 0, top)
            weights = jnp.exp(logits - top[:, None])
            total = jnp.sum(weights, axis=-1)
            nothing = total == 0
            total = jnp.where(nothing, 1, total)
            log_sum = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
            weights = weights / total[:, None]
        else:
            log_sum = part(sums)[:, 0]
            bad_rows = jnp.isnan(log_sum)
            finite_sum = jnp.where(jnp.isfinite(log_sum), log_sum, 0)
            weights = jnp.exp(logits - finite_sum[:, None])
        if changed_weights is not None:
            other, amount = map(part, changed_weights)
            weights = patches.mixed(weights, other if allowed is None else jnp.where(allowed, other, 0), amount)
        mark = lambda array, where: array if where is None else array + jnp.where(where, jnp.nan, 0)  # noqa: E731
        of_rows = None if bad_rows is None else bad_rows[:, None]

        def output() -> Array:
            left = weights
            if words is not None:
                counter = _counter(example, head, row * block, (num_heads, length), left.shape)
                keep = dropout.keep_at(words, given.dropout_rate, counter)
                left = jnp.where(keep, weights * (1 / (1 - given.dropout_rate)), 0)
            return mark(precision.einsum("ts,sh->th", precision.narrow(left, value), value), of_rows)

        def received() -> Array:
            counts = row * block + jnp.arange(block) < size
            counts = counts if counted is None else counts & part(counted)[:, 0]
            return jnp.sum(jnp.where(counts[:, None], mark(weights, of_rows), 0), axis=0)

        ways = {
            "logits": lambda: mark(logits, bad),
            "weights": lambda: mark(weights, of_rows),
            "log_sum_exp": lambda: mark(log_sum, bad_rows),
            "entropy": lambda: mark(-jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1)), -1), bad_rows),
            "heads": output,
            "column_sums": received,
        }
        return {name: ways[name]().astype(wide) for name in names}

    steps = max(items, 1) // at_once * blocks if items else 0
    work = one if steps <= 1 else jax.checkpoint(one, prevent_cse=False)

    def step(totals: Array | None, index: Array) -> tuple[Array | None, dict[str, Array]]:
        first, row = index // blocks * at_once, index % blocks
        if at_once == 1:
            found = {name: array[None] for name, array in work(first, row).items()}
        else:
            found = jax.vmap(work, in_axes=(0, None))(first + jnp.arange(at_once, dtype=jnp.int32), row)
        if totals is not None:
            there = jax.lax.dynamic_slice_in_dim(totals, first, at_once)
            totals = jax.lax.dynamic_update_slice_in_dim(totals, there + found.pop("column_sums"), first, 0)
        return totals, found

    totals = jnp.zeros((items, num_keys), wide) if "column_sums" in names else None
    totals, found = grid.accumulate(step, totals, steps)
    shape = (*leading, len(chosen))
    found = {
        name: array.reshape(items, blocks * block, *array.shape[3:])[:, :size].reshape(*shape, size, *array.shape[3:])
        for name, array in found.items()
    }
    return found if totals is None else found | {"column_sums": totals.reshape(*shape, num_keys)}


def _cut(items: int, size: int, num_keys: int) -> tuple[int, int]:
    """How many heads of examples at a time (a divisor of all), and how many rows: more than one head or part of it."""
    room = max(1, ROOM // num_keys)
    if size > room:
        return 1, -(-size // -(-size // room))
    return max((n for n in range(1, min(items, room // size) + 1) if items % n == 0), default=1), size


def _part(array: Array, place: tuple[Any, Any, Any], rows: int) -> Array:
    """One example's and one head's rows of [B or 1, n or 1, T or 1, s], [rows or 1, s]."""
    start = [jnp.int32(0) if have == 1 else at for have, at in zip(array.shape, place, strict=False)]
    sizes = (1, 1, min(rows, array.shape[2]), array.shape[3])
    return jax.lax.dynamic_slice(array, [*start, jnp.int32(0)], sizes)[0, 0]


def _counter(example: Array, head: Array, row: Array, sizes: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """Indices for `dropout.keep_at`: those of the whole [..., N, T, S]."""
    word = lambda a: jnp.asarray(a, jnp.uint32)  # noqa: E731
    (num_heads, length), (rows, num_keys) = sizes, shape
    item = word(example) * word(num_heads) + word(head)
    query = item * word(length) + word(row) + jnp.arange(rows, dtype=jnp.uint32)
    return query[:, None] * word(num_keys) + jnp.arange(num_keys, dtype=jnp.uint32)[None]


def _written_out(mask: Mask, queries: Tokens, keys: Tokens, rows: np.ndarray) -> Mask:
    """What a mask says of some queries, [..., r, S]."""

    def one(row: Array, position: Array) -> Array:
        block = mask.block(Tokens(queries.start + row, position[..., None]), keys)
        return jnp.broadcast_to(block, (*block.shape[:-1], keys.size))[..., 0, :]

    positions = jnp.asarray(queries.position)[..., rows]
    return Dense(jax.vmap(one, in_axes=(0, -1), out_axes=-2)(jnp.asarray(rows), positions))
