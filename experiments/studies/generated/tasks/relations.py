"""Simultaneous relations: do heads attend to different parts of the input at the same time?

A sequence has T tokens, and every token has for each of R relations a key and a value. Keys are codes of `bits` signs,
all different within a relation, drawn anew for each sequence; values are one of V. The last token asks with one key of
each relation, and these belong to R different tokens. The answer is R values at once: of each relation that of the
token with its key. Error: the share of wrong values, of chance 1 − 1/V. Every token has values of all relations, so the
reader must know which of them to take from which token.

What can be reached. With one head for a relation all is found: N = R heads of width bits + V or more. One head has one
pattern for all R relations; if it attends to all R tokens alike, and each relation takes the value that most of them
have, the error is 1 − E[largest count of R draws from V] / R. Between the two nothing forbids an exact answer: already
two heads that give the R tokens R different pairs of weights, such as points of a circle, have outputs from which a
linear map finds all. So whether there is a knee at N = R is a question about training. Neither does the claim follow
from what heads cost: all arms without control have the same parameters, so their heads are the narrower, the more there
are, and narrow heads tell keys apart less well.

The rules, with Student's intervals over seeds, of 95 % for all differences of a claim together (Bonferroni).
(1) R heads reach a lower error than one head: error of N = 1 minus that of N = R, at every T. Supported: every interval
is above `margin`. Refuted: one is below it. Else not resolved.
(2) There is a knee at N = R: the error falls more from R/2 to R heads than from R to 2R. The difference of the two
falls at every T, by the same rule with margin 0.
(3) The knee is sharper for longer sequences: the difference of (2) at the longest T minus that at the shortest, by the
same rule with margin 0.

Sources: Yu et al. 2025, arXiv 2510.06662 (generalised D-retrieval: with fewer heads than D, parameters must grow with
T); Adler 2025, arXiv 2509.22840 (recovering relations at a fixed total width of keys). Here keys are found by a dot
product where theirs minimise a function, and there is no feed-forward network after the heads.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.studies.generated import rules
from experiments.studies.generated.task import Case, Task
from experiments.studies.paired import Comparison
from experiments.studies.study import Verdict, Word


@dataclass(frozen=True, kw_only=True)
class Config:
    """`kind = "relations"`: R values of R tokens, each found by a key, at once.

    Attributes:
      kind: of task.
      relations: R.
      values: V, of which one is the answer.
      bits: of a key.
      lengths: T, tokens besides the one that asks; one case each.
      batch: sequences in a step.
      test: sequences that are measured.
      margin: by how much the error of R heads must be lower than that of one.
    """

    kind: Literal["relations"] = "relations"
    relations: int = 4
    values: int = 4
    bits: int = 6
    lengths: tuple[int, ...] = (8, 32)
    batch: int = 64
    test: int = 2048
    margin: float = 0.05

    def __post_init__(self):
        if self.relations < 2 or self.values < 2:
            raise ValueError(f"relations and values must be at least 2, got {self.relations} and {self.values}.")
        if not 1 <= self.bits <= 12:
            raise ValueError(f"bits must be between 1 and 12, got {self.bits}.")
        if len(self.lengths) < 2 or not all(self.relations <= length <= 2**self.bits for length in self.lengths):
            raise ValueError(f"lengths must be two or more between relations={self.relations} and 2^bits="
                             f"{2**self.bits}, got {list(self.lengths)}.")  # fmt: skip
        if min(self.batch, self.test) < 1 or self.margin < 0:
            raise ValueError(f"batch and test must be at least 1 and margin at least 0, got {self.batch}, {self.test} "
                             f"and {self.margin}.")  # fmt: skip


class Batch(NamedTuple):
    """Sequences.

    Attributes:
      features: [B, T + 1, 2·R·bits + R·V + 1]: keys, values (one-hot), keys that are asked for, whether this asks.
      answers: [B, R], each below V.
      positions: of the tokens that are asked for, [B, R].
    """

    features: Array
    answers: Array
    positions: Array


def sample(config: Config, length: int, key: Array, count: int) -> Batch:
    """Sequences of `length` tokens and one that asks."""
    r, bits, v = config.relations, config.bits, config.values
    key_codes, key_values, key_positions = jax.random.split(key, 3)
    order = jnp.argsort(jax.random.uniform(key_codes, (count, r, 2**bits)), axis=-1)[..., :length]
    codes = 2.0 * (order[..., None] >> jnp.arange(bits) & 1) - 1  # [B, R, T, bits]
    values = jax.random.randint(key_values, (count, r, length), 0, v)
    positions = jnp.argsort(jax.random.uniform(key_positions, (count, length)), axis=-1)[:, :r]
    at = lambda array: jnp.take_along_axis(array, positions[:, :, None], axis=2)[:, :, 0]  # noqa: E731
    asked = jnp.take_along_axis(codes, positions[:, :, None, None], axis=2)[:, :, 0]  # [B, R, bits]
    by_token = lambda array: jnp.moveaxis(array, 1, 2).reshape(count, length, -1)  # noqa: E731
    told = jnp.concatenate([by_token(codes), by_token(jax.nn.one_hot(values, v))], axis=-1)
    asks = jnp.concatenate([asked.reshape(count, -1), jnp.ones((count, 1))], axis=-1)
    return Batch(
        jnp.concatenate([
            jnp.pad(told, ((0, 0), (0, 0), (0, asks.shape[-1]))),
            jnp.pad(asks, ((0, 0), (told.shape[-1], 0)))[:, None],
        ], axis=1),
        at(values), positions,
    )  # fmt: skip


def error_of_one_pattern(relations: int, values: int) -> float:
    """Where one head attends to all R tokens alike: 1 − E[largest count of R draws from V] / R.

    >>> error_of_one_pattern(2, 4)
    0.375
    """
    draws = itertools.product(range(values), repeat=relations)
    return 1 - sum(max(Counter(draw).values()) for draw in draws) / (relations * values**relations)


def check(config: Config, arms: Sequence[Any]) -> None:
    """Raise a ValueError unless there is one arm for 1, R/2, R and 2R heads each, all of the same parameters."""
    needed = _needed(config.relations)
    counts = [arm.num_heads for arm in arms if not arm.control]
    if config.relations % 2 or any(counts.count(heads) != 1 for heads in needed):
        raise ValueError(f"arms must have, besides controls, one of each of {needed} heads for relations="
                         f"{config.relations} (an even number), got {counts}.")  # fmt: skip
    widths = {(arm.width, arm.num_heads * (arm.head_dim or arm.width // arm.num_heads), arm.layers, arm.variant)
              for arm in arms if not arm.control}  # fmt: skip
    if len(widths) > 1:
        raise ValueError(f"arms must, besides controls, have the same width, num_heads · head_dim, layers and variant, "
                         f"got {sorted(widths)}.")  # fmt: skip


def make(config: Config) -> Task:
    """The task."""
    r, v = config.relations, config.values
    lines = {"error": {"one pattern for all": error_of_one_pattern(r, v), "chance": 1 - 1 / v}}
    cases = tuple(
        # what says how long a sequence is must have a shape that says it, as data are arrays
        Case(f"T = {length}", jnp.zeros(length), 2 * r * config.bits + r * v + 1, r * v, lines)
        for length in config.lengths
    )

    def loss(outputs: Array, batch: Batch) -> Array:
        logits = outputs.reshape(*outputs.shape[:-1], r, v)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers))

    def measure(outputs: Array, weights: Array, batch: Batch) -> dict[str, Array]:
        logits = outputs.reshape(*outputs.shape[:-1], r, v)
        wrong = jnp.mean(jnp.argmax(logits, axis=-1) != batch.answers)
        return {"error": jnp.where(jnp.all(jnp.isfinite(outputs)), wrong, jnp.nan)}

    return Task(
        cases, lambda data, key, count: sample(config, len(data), key, count), config.batch, config.test, loss,
        measure, {"error": "share of wrong values"}, "error", "lower", lambda found: verdicts(config, found),
    )  # fmt: skip


def verdicts(config: Config, found: Sequence[Any]) -> tuple[Verdict, ...]:
    """The three rules above."""
    r = config.relations
    claimed = {one.arm.num_heads: one for one in found if not one.arm.control}
    names = list(found[0].values)
    error = {name: {n: claimed[n].values[name]["error"] for n in _needed(r)} for name in names}
    gains = rules.intervals({f"{name}: by": error[name][1] - error[name][r] for name in names}, config.margin)
    falls = {name: (one[r // 2] - one[r]) - (one[r] - one[2 * r]) for name, one in error.items()}
    knees = rules.intervals({f"{name}: by": fall for name, fall in falls.items()})
    shortest, longest = (names[choose(range(len(names)), key=config.lengths.__getitem__)] for choose in (min, max))
    sharper = rules.intervals({f"{longest} against {shortest}: by": falls[longest] - falls[shortest]})
    means = "; ".join(
        f"{name}: " + ", ".join(f"N = {n} {float(one.mean()):.3f}" for n, one in error[name].items()) for name in names
    )
    return (
        _verdict(f"With {r} relations, {r} heads reach a lower error than one head of the same parameters.", gains),
        _verdict(f"There is a knee at N = R: the error falls more from {r // 2} to {r} heads than from {r} to {2 * r}.",
                 knees, f"error at {means}"),
        _verdict("The knee is sharper for longer sequences.", sharper),
    )  # fmt: skip


def _needed(relations: int) -> list[int]:
    return sorted({1, relations // 2, relations, 2 * relations})


def _verdict(claim: str, found: Sequence[Comparison], more: str = "") -> Verdict:
    word: Word = "supported" if all(rules.above(found)) else "refuted" if any(rules.below(found)) else "not resolved"
    margin = float(np.asarray(found[0].ahead.baseline))
    because = "; ".join(map(rules.shown, found)) + (f" (margin {margin:g})" if margin else "")
    return Verdict(claim, word, f"{because}; {more}" if more else because)
