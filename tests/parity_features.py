"""The rows of the parity matrix: what the kernels are asked for, and what the loops are told that it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from reference import numbers

from mhajax import masks, scores


class Sizes(NamedTuple):
    """The letters of the library."""

    b: int = 2
    n: int = 4
    k: int = 2
    t: int = 13
    s: int = 17
    h: int = 5
    hv: int = 3


class Case(NamedTuple):
    """What is asked for, and what the loops are told.

    Attributes:
      options: arguments of `kernels.attend`, from the extras.
      allowed: broadcasts to [B, N, T, S].
      logits: (products [B, N, T, S], extras) → logits, in NumPy; None: the products themselves.
      extras: what has a gradient besides q, k and v.
      dropped: arguments of the dropout.
      leading: the axes before the heads; None: [B].
      call: (attend, q, k, v) → heads, log-sum-exp; None: one call with the options.
      items: heads of examples that one call is given.
    """

    options: Callable[[dict], dict] = lambda extras: {}
    allowed: Any = True
    logits: Callable[[Any, dict], Any] | None = None
    extras: dict[str, Any] = {}
    sizes: Sizes = Sizes()
    dtype: str = "float32"
    dropped: dict[str, Any] = {}
    leading: tuple[int, ...] | None = None
    call: Callable[..., Any] | None = None

    @property
    def items(self) -> int:
        return (1 if self.call is not None else self.sizes.b) * self.sizes.n

    @property
    def wide(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"


def masked(mask: Any, allowed: Any, **others: Any) -> Case:
    return Case(lambda extras: {"mask": mask}, allowed, **others)


def biased(*shape: int, **others: Any) -> Case:
    """A bias of this shape, with its gradient."""
    bias = numbers(40, *shape)
    return Case(lambda extras: {"bias": extras["bias"]}, True, lambda x, e: x + e["bias"], {"bias": bias}, **others)


def scored(score: Callable[[dict], Any], logits: Callable, extras: dict, **others: Any) -> Case:
    """A score function made of the extras, under a causal mask."""
    return Case(lambda e: {"score": score(e), "mask": masks.causal()}, CAUSAL, logits, extras, **others)


def booleans(seed: int, *shape: int) -> Any:
    """About half True, with a row of queries that sees nothing."""
    array = np.random.default_rng(seed).random(shape) < 0.5
    array[..., 1, :] = False
    return array


B, N, K, T, S, _, _ = Sizes()
Q_PLACE, K_PLACE = np.arange(T)[:, None], np.arange(S)
DISTANCE = K_PLACE - Q_PLACE  # above 0 for keys ahead
CAUSAL = DISTANCE <= 0
LENGTHS = np.array([9, 0])
UNPADDED = K_PLACE < LENGTHS[:, None, None, None]
PREFIX = np.array([4, 7])
IN_PREFIX = K_PLACE < PREFIX[:, None, None, None]
RANDOM = np.random.default_rng(7)
Q_SEGMENT, K_SEGMENT = np.sort(RANDOM.integers(0, 4, (B, T))), np.sort(RANDOM.integers(0, 4, (B, S)))
PAIRS, EXAMPLES, HEADS, ALL = (
    booleans(i, *shape) for i, shape in enumerate([(T, S), (B, T, S), (N, T, S), (B, N, T, S)])
)
HOLES = np.where(ALL, numbers(41, B, N, T, S), -np.inf)
Q_PLACES, K_PLACES = (RANDOM.permuted(np.tile(np.arange(n), (B, 1)), axis=1) for n in (T, S))
PLACES = {"queries": masks.Tokens(0, jnp.asarray(Q_PLACES)), "keys": masks.Tokens(0, jnp.asarray(K_PLACES))}
APART = K_PLACES[:, None, None, :] - Q_PLACES[:, None, :, None]
SLOPES = (2.0 ** -np.array([2, 4, 6, 8]))[:, None, None]
PADDED_CAUSAL = masks.causal() & masks.lengths(np.array([9, 17]))
UNPADDED_CAUSAL = CAUSAL & (K_PLACE < np.array([9, 17])[:, None, None, None])
SQUARE = Sizes(s=T)


def every_third(q: Any, k: Any, step: Any) -> Any:
    return (q + 2 * k) % step != 0


def t5_bucket(distance: Any) -> Any:
    """Of 8 buckets, 4 for each direction, 2 of which are for one distance and 2 for distances up to 11."""
    away = np.abs(distance)
    far = 2 + (np.log(np.maximum(away, 1) / 2) / np.log(11 / 2) * 2).astype(int)
    return np.where(away < 2, away, np.minimum(far, 3)) + 4 * (distance > 0)


def own(extras: dict) -> Any:
    """A user's score function, which closes over two arrays."""
    factor, near = extras["factor"], extras["near"]
    return lambda score, head, q, k: score * factor[head] + near[(q + k) % 5] - 0.1 * jnp.tanh(score)


def own_logits(x: Any, extras: dict) -> Any:
    near = extras["near"][(Q_PLACE + K_PLACE) % 5]
    return x * extras["factor"][:, None, None] + near - 0.1 * np.tanh(x)


def one_row(value: float) -> Case:
    """A score function that gives the third query the same number for every key."""
    return Case(
        lambda e: {"score": lambda score, head, q, k: jnp.where(q == 2, value, score)},
        logits=lambda x, e: np.where(Q_PLACE == 2, value, x),
    )


def one_example(attend: Callable, q: Any, k: Any, v: Any) -> Any:
    def one(q: Any, k: Any, v: Any, length: Any) -> Any:
        heads, seen = attend(q, k, v, mask=masks.causal() & masks.lengths(length), capture=("log_sum_exp",))
        return heads, seen["log_sum_exp"]

    return jax.vmap(one)(q, k, v, LENGTHS)


TABLE = {"table": numbers(42, N, 7)}
relative = lambda x, e: x + e["table"][:, np.clip(DISTANCE, -3, 3) + 3]  # noqa: E731
two_axes = lambda x, e: (x.reshape(2, 2, *x.shape[1:]) + e["bias"]).reshape(x.shape)  # noqa: E731
DROPPED = {"dropout_rate": 0.3, "dropout_key": jax.random.key(3)}
EVERYTHING = Case(
    lambda e: {"mask": masks.lengths(LENGTHS), "bias": e["bias"], "score": scores.relative(e["table"])},
    UNPADDED,
    lambda x, e: relative(x, e) + e["bias"],
    TABLE | {"bias": numbers(47, N, 1, S)},
    dropped=DROPPED,
)

CASES = {
    "nothing but q, k, v": Case(),
    "causal, T = S": masked(masks.causal(), CAUSAL[:, :T], sizes=SQUARE),
    "causal, T ≠ S": masked(masks.causal(), CAUSAL),
    "window": masked(masks.window(3, after=2), (DISTANCE >= -3) & (DISTANCE <= 2)),
    "window, causal, T = S": masked(masks.causal() & masks.window(3), (CAUSAL & (DISTANCE >= -3))[:, :T], sizes=SQUARE),
    "prefix by example, or causal": masked(masks.causal() | masks.prefix(PREFIX), CAUSAL | IN_PREFIX),
    "chunk, causal": masked(masks.causal() & masks.chunk(4), CAUSAL & (Q_PLACE // 4 == K_PLACE // 4)),
    "segments": masked(
        masks.segments(Q_SEGMENT, K_SEGMENT), Q_SEGMENT[:, None, :, None] == K_SEGMENT[:, None, None, :]
    ),
    "lengths, one of them 0": masked(masks.lengths(LENGTHS), UNPADDED),
    "booleans [T, S]": masked(masks.dense(PAIRS), PAIRS),
    "booleans [B, N, T, S]": masked(masks.dense(ALL), ALL),
    "booleans by example": masked(masks.per_example(EXAMPLES), EXAMPLES[:, None]),
    "booleans by head": masked(masks.per_head(HEADS), HEADS),
    "mask function of your own": masked(masks.function(every_third, 3), every_third(Q_PLACE, K_PLACE, 3)),
    "`&`, `\\|`, `~` together": masked(
        masks.lengths(LENGTHS) & ~(masks.causal() & masks.window(5)) | masks.per_head(HEADS) & masks.chunk(3),
        UNPADDED & ~(CAUSAL & (DISTANCE >= -5)) | HEADS & (Q_PLACE // 3 == K_PLACE // 3),
    ),
    "positions by example": Case(
        lambda e: {"mask": masks.causal(), "score": scores.relative(e["table"]), **PLACES},
        APART <= 0,
        lambda x, e: x + np.moveaxis(e["table"][:, np.clip(APART[:, 0], -3, 3) + 3], 1, 0),
        TABLE,
    ),
    "bias [T, S] and its gradient": biased(T, S),
    "bias [N, T, S] and its gradient": biased(1, N, T, S),
    "bias by key [B, 1, 1, S] and its gradient": biased(B, 1, 1, S),
    "bias by query [N, T, 1] and its gradient": biased(N, T, 1),
    "bias [B, N, T, S] and its gradient": biased(B, N, T, S),
    "bias with -inf and its gradient, mask": Case(
        lambda e: {"bias": e["bias"], "mask": masks.causal()}, CAUSAL, lambda x, e: x + e["bias"], {"bias": HOLES}
    ),
    "score: ALiBi": scored(lambda e: scores.alibi(N), lambda x, e: x - SLOPES * np.abs(DISTANCE), {}),
    "score: T5, gradient of the table": scored(
        lambda e: scores.t5(e["table"], bidirectional=True, max_distance=11),
        lambda x, e: x + e["table"][:, t5_bucket(DISTANCE)],
        {"table": numbers(43, N, 8)},
    )._replace(allowed=True, options=lambda e: {"score": scores.t5(e["table"], bidirectional=True, max_distance=11)}),
    "score: relative, gradient of the table": scored(lambda e: scores.relative(e["table"]), relative, TABLE),
    "score: soft cap": scored(lambda e: scores.soft_cap(0.7), lambda x, e: 0.7 * np.tanh(x / 0.7), {}),
    "score: relative, then soft cap": scored(
        lambda e: scores.chain(scores.relative(e["table"]), scores.soft_cap(0.7)),
        lambda x, e: 0.7 * np.tanh(relative(x, e) / 0.7),
        TABLE,
    ),
    "score of your own, gradient of what it closes over": scored(
        own, own_logits, {"factor": numbers(44, N), "near": numbers(45, 5)}
    ),
    "scale of every head and its gradient": Case(
        lambda e: {"scale": e["scale"]},
        logits=lambda x, e: x * Sizes().h ** 0.5 * e["scale"],
        extras={"scale": numbers(51, N, 1, 1)},
    ),
    "sinks and their gradient": Case(
        lambda e: {"mask": PADDED_CAUSAL}, UNPADDED_CAUSAL, None, {"sinks": numbers(46, N)}
    ),
    "dropout": Case(dropped=DROPPED),
    "dropout, mask, bias, score": EVERYTHING,
    "one key head for each query head": Case(sizes=Sizes(k=4)),
    "grouped heads, N = 6, K = 3": masked(masks.causal(), CAUSAL, sizes=Sizes(n=6, k=3)),
    "one key head for all": masked(masks.causal(), CAUSAL, sizes=Sizes(k=1)),
    "values wider than keys, Hv = 7": Case(sizes=Sizes(hv=7)),
    "one query, T = 1": Case(sizes=Sizes(t=1)),
    "one key, S = 1": masked(masks.causal(), True, sizes=Sizes(s=1)),
    "no batch": masked(masks.causal(), CAUSAL, sizes=Sizes(b=1), leading=()),
    "two batch axes, a bias shared along one": Case(
        lambda e: {"mask": masks.lengths(np.array([[9, 0], [17, 2]])), "bias": e["bias"]},
        K_PLACE < np.array([9, 0, 17, 2])[:, None, None, None],
        two_axes,
        {"bias": numbers(48, 2, 1, N, 1, S)},
        sizes=Sizes(b=4),
        leading=(2, 2),
    ),
    "a query with nothing to attend to": masked(masks.lengths(LENGTHS[::-1]) & masks.dense(ALL), UNPADDED[::-1] & ALL),
    "NaN, Inf in masked keys, values": masked(PADDED_CAUSAL, UNPADDED_CAUSAL),
    "NaN, Inf in a visible key, value, query": masked(PADDED_CAUSAL, UNPADDED_CAUSAL),
    "log-sum-exp and its gradient": masked(masks.lengths(LENGTHS) & masks.causal(), UNPADDED & CAUSAL),
    "float64": masked(masks.causal() & masks.dense(ALL), CAUSAL & ALL, dtype="float64"),
    "bfloat16": masked(PADDED_CAUSAL, UNPADDED_CAUSAL, dtype="bfloat16"),
    "float16": masked(PADDED_CAUSAL, UNPADDED_CAUSAL, dtype="float16"),
    "`vmap` over the batch": masked(
        masks.causal() & masks.lengths(LENGTHS), UNPADDED & CAUSAL, call=one_example
    ),
    "`vmap` over score tables": scored(lambda e: scores.relative(e["table"]), relative, TABLE),
    "`vmap` over gates": masked(PADDED_CAUSAL, UNPADDED_CAUSAL, extras={"gates": numbers(49, N)}),
    "mask as an argument of `jit`": masked(masks.lengths(LENGTHS) & masks.causal(), CAUSAL),
    "capture of weights, logits": masked(PADDED_CAUSAL, UNPADDED_CAUSAL),
    "gradients of gradients": masked(PADDED_CAUSAL & masks.dense(ALL), UNPADDED_CAUSAL & ALL),
    "gradients of gradients: mask, bias, score, dropout": EVERYTHING,
    "forward mode: `jvp`, `hessian`": masked(PADDED_CAUSAL, UNPADDED_CAUSAL),
    "`cached=True`": Case(lambda e: {"mask": PADDED_CAUSAL, "cached": True}, UNPADDED_CAUSAL),
    "score that sets a whole row to -1e9": one_row(-1e9),
    "score that hides a whole row": one_row(-np.inf),
}  # fmt: skip
