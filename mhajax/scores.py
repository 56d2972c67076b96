"""What is done to the score of a pair before the softmax: functions that are handed to attention.

A score function says what becomes of one scaled product, (score, head, q_position, k_position) → score, and attention
lifts it over pairs, heads and examples without ever holding all of them. Those here are pytrees: their tables go
through `jit` as arguments, new values do not retrace, `vmap` maps over them, and they have gradients:

    y = attention.apply(params, x, config, score=scores.alibi(config.num_heads))
    y = attention.apply(params, x, config, score=scores.chain(scores.t5(table), scores.soft_cap(50.0)))
    loss = lambda table: attention.apply(params, x, config, score=scores.relative(table)).sum()
    gradient = jax.grad(loss)(table)

One of your own is a function of the four; what it has for every head, it reads with `at_head`. `with_sinks` is no
score function: it works on what the heads gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.tree_util import Partial
from jax.typing import ArrayLike


def slope(slopes: ArrayLike) -> Partial:
    """Far pairs count less, score − slopes[head] · |q_position − k_position|.

    Args:
      slopes: [N], in logits per token; may be learned.

    Raises:
      ValueError: if there is not one number for every head.

    >>> float(slope([0.5, 0.25])(1.0, 1, 3, 7))  # head 1, a distance of 4
    0.0
    """
    return Partial(_slope, _table("slope", slopes, "[N], one slope for every head", 1))


def _slope(slopes: Array, score: Array, head: Array, q_position: Array, k_position: Array) -> Array:
    return score - at_head(slopes, head, "scores.alibi or slope") * jnp.abs(q_position - k_position)


def alibi(num_heads: int) -> Partial:
    """ALiBi: `slope` with the slopes of the paper, 2^(-8/N), 2^(-16/N), …, 2^-8 for N a power of two.

    For another N, the slopes of the power of two below come first, then every other one of the power of two above.
    The paper's is causal; without a causal mask keys ahead count like keys as far behind.

    Args:
      num_heads: N.

    Raises:
      ValueError: if there is no head.

    >>> alibi(4).args[0].tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]

    References:
      Press et al. 2022, "Train Short, Test Long", section 3; N not a power of two: the authors' code.
    """
    if num_heads < 1:
        raise ValueError(f"scores.alibi: num_heads must be at least 1, got {num_heads}.")
    below = 1 << (num_heads.bit_length() - 1)
    first = 2.0 ** (-8 / below * np.arange(1, below + 1))
    between = 2.0 ** (-4 / below * np.arange(1, 2 * (num_heads - below), 2))
    return slope(np.concatenate([first, between]))


def relative(table: ArrayLike) -> Partial:
    """A learned bias by head and distance, score + table[head, clip(k_position − q_position, -m, m) + m].

    Args:
      table: [N, 2m + 1]; column m is for a key at the query's own position, the columns after it for keys ahead.

    Raises:
      ValueError: if the table does not have two axes and an odd number of columns.

    >>> float(relative([[10.0, 20.0, 30.0]])(1.0, 0, 5, 3))  # the key is behind
    11.0

    References:
      Shaw et al. 2018, "Self-Attention with Relative Position Representations", section 3.2 (their clipped distance;
      they add vectors to the keys). One number for every head: Liu et al. 2021, "Swin Transformer", eq. 4.
    """
    table = _table("relative", table, "[N, 2m + 1], one number for every head and distance from -m to m", 2)
    if table.shape[1] % 2 == 0:
        raise ValueError(
            f"scores.relative: table must have an odd number of columns, distances -m to m, got {table.shape}."
        )
    return Partial(_relative, table)


def _relative(table: Array, score: Array, head: Array, q_position: Array, k_position: Array) -> Array:
    most = table.shape[1] // 2
    return score + at_head(table, head, "scores.relative or t5")[jnp.clip(k_position - q_position, -most, most) + most]


def t5(table: ArrayLike, *, bidirectional: bool, max_distance: int = 128) -> Partial:
    """T5's learned bias: `relative` in which far distances share a number, the more of them the farther.

    Half of the buckets are for one distance each, the others grow with its logarithm up to `max_distance`.
    Bidirectional, the first half of all buckets is for keys behind and at the query, the second for keys ahead; else
    all are for keys behind, and keys ahead count as distance 0.

    Args:
      table: [N, buckets]; T5's own has 32 buckets and is [buckets, N].
      bidirectional: as T5's encoder (True) or decoder (False).
      max_distance: distances from here on share the last bucket.

    Raises:
      ValueError: for a table without two axes, too few or an odd number of buckets, a max_distance within the buckets
        of one distance.

    >>> t5(jnp.zeros((8, 32)), bidirectional=True)(1.0, 0, 5, 3).item()
    1.0

    References:
      Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.1; the formula of the buckets is in the
      authors' code.
    """
    table = _table("t5", table, "[N, buckets]; T5's own is [buckets, N]", 2)
    buckets = table.shape[1] // (2 if bidirectional else 1)  # of one direction
    exact = buckets // 2
    if exact < 1 or (bidirectional and table.shape[1] % 2) or max_distance <= exact:
        raise ValueError(
            f"scores.t5: table must be [N, buckets] with at least {4 if bidirectional else 2} buckets"
            f"{', an even number' if bidirectional else ''}, of which {exact} are for one distance each, below "
            f"max_distance; got {table.shape} and max_distance={max_distance}."
        )
    ahead = np.arange(-max_distance, max_distance + 1)
    away = np.abs(ahead) if bidirectional else np.maximum(-ahead, 0)
    growth = np.log(np.maximum(away, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (growth * (buckets - exact)).astype(int), buckets - 1)
    bucket = np.where(away < exact, away, far) + (buckets * (ahead > 0) if bidirectional else 0)
    return relative(table[:, bucket])


def soft_cap(cap: ArrayLike) -> Partial:
    """Scores that stay between -cap and cap, cap · tanh(score / cap).

    Args:
      cap: above 0; Gemma 2 has 50.

    Raises:
      ValueError: if cap is not one number, or not above 0.

    >>> float(soft_cap(2.0)(1e9, 0, 0, 0))
    2.0

    References:
      Gemma Team 2024, "Gemma 2", section 2.
    """
    if jnp.ndim(cap):
        raise ValueError(f"scores.soft_cap: cap must be one number, got {jnp.shape(cap)}.")
    if isinstance(cap, int | float) and cap <= 0:
        raise ValueError(f"scores.soft_cap: cap must be above 0, got {cap}.")
    return Partial(_soft_cap, jnp.asarray(cap, jnp.result_type(float)))


def _soft_cap(cap: Array, score: Array, head: Array, q_position: Array, k_position: Array) -> Array:
    del head, q_position, k_position
    return cap * jnp.tanh(score / cap)


def chain(*functions: Callable) -> Partial:
    """Score functions one after the other, the leftmost first.

    Args:
      functions: of this module, or any others of (score, head, q_position, k_position).

    >>> double = lambda score, head, q_position, k_position: 2 * score
    >>> float(chain(double, soft_cap(3.0))(1e9, 0, 0, 0)), float(chain(soft_cap(3.0), double)(1e9, 0, 0, 0))
    (3.0, 6.0)
    """
    leaf = jax.tree_util.all_leaves
    return Partial(_chain, *(Partial(function) if leaf([function]) else function for function in functions))


def _chain(*given) -> Array:
    *functions, score, head, q_position, k_position = given
    for function in functions:
        score = function(score, head, q_position, k_position)
    return score


def with_sinks(heads: Array, log_sum_exp: Array, sinks: ArrayLike) -> Array:
    """What the heads would have given with one more key, whose logit is `sinks[n]` and whose value is 0.

    That key takes its share of the softmax, so the weights of the others sum to σ(log_sum_exp − sink) instead of 1, and
    a head can attend to nothing. A sink of 0 is the softmax with 1 added to its sum, of -inf is no sink.
    `variants.sinks` is the layer; by hand, with the heads before w_o:

        _, seen = attention.apply_captured(params, x, config, capture=("heads", "log_sum_exp"))
        heads = scores.with_sinks(seen["heads"], seen["log_sum_exp"], sinks)
        y = jnp.einsum("...nth,nhd->...td", heads, params.w_o)

    Args:
      heads: [..., N, T, Hv].
      log_sum_exp: [..., N, T], -inf for a query that sees nothing, which gives zeros.
      sinks: [N], learned.

    Returns:
      [..., N, T, Hv] in the dtype of heads.

    Raises:
      ValueError: for shapes that do not belong together.

    >>> with_sinks(jnp.ones((1, 1, 2)), jnp.zeros((1, 1)), jnp.zeros(1)).tolist()
    [[[0.5, 0.5]]]

    References:
      Sinks: Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.3 (their SoftMax1
      is sink 0); one for every head: OpenAI 2025, "gpt-oss model card".
    """
    sinks = jnp.asarray(sinks)
    if heads.shape[:-1] != log_sum_exp.shape or sinks.shape != heads.shape[-3:-2]:
        raise ValueError(
            f"scores.with_sinks: for heads [..., N, T, Hv] = {heads.shape} log_sum_exp must be {heads.shape[:-1]} and "
            f"sinks [N] = {heads.shape[-3:-2]}, got {log_sum_exp.shape} and {sinks.shape}."
        )
    nothing = log_sum_exp == -jnp.inf
    share = jax.nn.sigmoid(jnp.where(nothing, 0, log_sum_exp) - sinks[:, None])
    share = jnp.where(nothing, 0, share)
    return (heads * share[..., None]).astype(heads.dtype)


def _table(function: str, given: ArrayLike, axes: str, rank: int) -> Array:
    table = jnp.asarray(given)
    if table.ndim != rank:
        name = "slopes" if rank == 1 else "table"
        raise ValueError(f"scores.{function}: {name} must be {axes}, got {table.shape}.")
    return table


def at_head(table: ArrayLike, head: Array, who: str) -> Array:
    """The head's row, for a score function of your own. An index beyond the end would not notice that there is none.

    Args:
      table: [N, …], something for every head.
      head: index of the head, as a score function is given it.
      who: whose table it is, for the error.

    Returns:
      [...], the row.

    Raises:
      ValueError: for a table of another number of heads than there are; for a head, given as a number, beyond it.

    >>> scale = lambda score, head, q_position, k_position: score * at_head(jnp.array([1.0, 0.5]), head, "scale")
    >>> float(scale(3.0, 1, 0, 0))
    1.5
    """
    table = jnp.asarray(table)
    expected, found = _NUM_HEADS.get(), table.shape[0]
    if expected not in (None, found):
        raise ValueError(
            f"{who}: must be made for N={expected} heads, as many as queries have, got {found}; inside shard_map "
            "N counts the heads of one device."
        )
    if not isinstance(head, Tracer) and not np.all((np.asarray(head) >= 0) & (np.asarray(head) < found)):
        raise ValueError(f"{who}: head must be 0 to {found - 1}, got {head}.")
    return table.at[head].get(mode="fill", fill_value=jnp.nan)


_NUM_HEADS: ContextVar[int | None] = ContextVar("num_heads", default=None)  # of the attention that is being traced


@contextmanager
def for_heads(num_heads: int) -> Iterator[None]:
    """Within it, a score function of this module that holds something for every head must hold it for so many heads.

    For who traces a score function: a user's may call one of these, so that looking at it from outside does not do.
    """
    token = _NUM_HEADS.set(num_heads)
    try:
        yield
    finally:
        _NUM_HEADS.reset(token)
