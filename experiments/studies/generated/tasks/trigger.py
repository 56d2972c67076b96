"""The trigger task: does a head that has nothing to say need a token to look at?

A sequence has T tokens. The first one has no content; the others have C normal numbers each, and one of them, at a
random place from the third on, is the trigger. The output at the trigger is the mean of the content of the tokens
between the first and it; at every other token it is zero. A token's features are what kind it is (first, trigger or
other), where it stands, and its content. One layer, and its output alone is read: nothing is added to x, so a head
cannot take back what it attended to. Error: mean ‖output − target‖² at triggers plus that at other tokens, both over
the mean of ‖target‖² at triggers. Answering zero always has error 1.

What can be reached. The weights of a softmax sum to 1, and a mean of values with positive weights is zero for any
content only if the weight rests on a token whose value does not depend on content: the first. So a softmax head that
solves the task has a sink there (Ran-Milo 2026 proves it). A sigmoid's weights may all be near zero, a learned sink
takes part in the softmax with value zero, a gate may close: these need no such token. A sigmoid must in return learn to
divide by the number of tokens, which it knows from the trigger's place.

Sink share: the mean weight on the first token, over heads and all tokens but the first and the trigger. A head that
attends alike to all that it may has the share drawn as a line.

The rules, with Student's intervals over seeds, 95 % for all differences of a claim together (Bonferroni). "Solved": the
whole interval of the error is below `solved`.
(1) A softmax head that solves the task has a sink: of every arm with softmax that sees the first token. Supported: all
solve it, and the intervals of the share are above 1/2. Refuted: one solves it, with a share whose interval is below
1/2. Else not resolved.
(2) The variants need no sink: of every arm of another variant from which the first token is hidden, the error minus
that of the softmax arm that sees it. Supported: every interval is below `margin`. Refuted: one is above it. Else not
resolved.
(3) Left free, the variants make no sink: of every arm of another variant that sees the first token. Supported: all
solve the task, and the intervals of the share are below that of uniform attention. Refuted: one solves it, with a
share whose interval is above 1/2. Else not resolved.
Arms that are controls have no say. A softmax arm from which the first token is hidden shows what is lost without it.

Source: Ran-Milo 2026, arXiv 2603.11487, where ReLU attention needs no sink; the variants: see `mhajax.variants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.studies.generated import rules
from experiments.studies.generated.task import Case, Task
from experiments.studies.study import Verdict, Word

KINDS = 3  # first, trigger, other
EARLIEST = 2  # place of a trigger: one token with content is before it
SINK, ERROR, UNIFORM = "sink share", "error", "uniform attention"
CLAIMS = (
    "A softmax head that solves the task has a sink: most of its attention rests on the first token where there is no "
    "trigger.",
    "Sigmoid attention, learned sinks and gated output need no sink: with the first token hidden they reach no higher "
    "error.",
    "Left free, they make no sink: they attend to the first token less than uniform attention does.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """`kind = "trigger"`: the mean of what precedes where the trigger is, else zero.

    Attributes:
      kind: of task.
      length: T.
      content: C, numbers of a token.
      batch: sequences in a step.
      test: sequences that are measured.
      solved: the error below which the task is solved; answering zero has 1.
      margin: by how much the error may be higher than that of a softmax head and count as no higher.
    """

    kind: Literal["trigger"] = "trigger"
    length: int = 16
    content: int = 8
    batch: int = 64
    test: int = 2048
    solved: float = 0.1
    margin: float = 0.02

    def __post_init__(self):
        if self.length <= EARLIEST + 1:
            raise ValueError(f"length must be at least {EARLIEST + 2}, got {self.length}.")
        if min(self.content, self.batch, self.test) < 1:
            raise ValueError(f"content, batch and test must be at least 1, got {self.content}, {self.batch} and "
                             f"{self.test}.")  # fmt: skip
        if not 0 < self.solved < 1 or self.margin < 0:
            raise ValueError(f"solved must be between 0 and 1 and margin at least 0, got {self.solved} and "
                             f"{self.margin}.")  # fmt: skip


class Batch(NamedTuple):
    """Sequences.

    Attributes:
      features: [B, T, 3 + T + C].
      targets: [B, T, C].
      triggers: whether a token is the trigger, bool [B, T].
    """

    features: Array
    targets: Array
    triggers: Array


def sample(config: Config, key: Array, count: int) -> Batch:
    """Sequences with a trigger each."""
    length = config.length
    key_content, key_place = jax.random.split(key)
    places = jnp.arange(length)
    triggers = places == jax.random.randint(key_place, (count, 1), EARLIEST, length)
    content = jax.random.normal(key_content, (count, length, config.content)).at[:, 0].set(0)
    before = jnp.cumsum(content, axis=1) - content
    means = before / jnp.maximum(places - 1, 1)[:, None]
    kinds = jnp.stack([jnp.broadcast_to(places == 0, triggers.shape), triggers, (places > 0) & ~triggers], axis=-1)
    where = jnp.broadcast_to(jnp.eye(length), (count, length, length))
    features = jnp.concatenate([kinds.astype(content.dtype), where, content], axis=-1)
    return Batch(features, jnp.where(triggers[..., None], means, 0), triggers)


def check(config: Config, arms: Sequence[Any]) -> None:
    """Raise a ValueError unless every rule has an arm."""
    sorts = {(arm.variant == "softmax", arm.hide_first) for arm in arms if not arm.control}
    missing = [
        f"{'softmax' if softmax else 'another variant'} that {'does not see' if hidden else 'sees'} the first token"
        for softmax, hidden in ((True, False), (False, True), (False, False))
        if (softmax, hidden) not in sorts
    ]
    if missing:
        raise ValueError(f"arms must have, besides controls, one of {'; one of '.join(missing)}; got "
                         f"{[arm.name for arm in arms]}.")  # fmt: skip


def make(config: Config) -> Task:
    """The task."""
    uniform = _uniform(config.length)
    lines = {ERROR: {"solved": config.solved, "zero always": 1.0}, SINK: {UNIFORM: uniform, "most": 0.5}}
    case = Case(f"T = {config.length}", jnp.zeros(0), KINDS + config.length + config.content, config.content, lines)

    def error(outputs: Array, batch: Batch) -> Array:
        squares = jnp.sum(jnp.square(outputs - batch.targets), axis=-1)[:, 1:]
        triggers = batch.triggers[:, 1:]
        wanted = jnp.sum(jnp.square(batch.targets)) / jnp.sum(triggers)
        return jnp.mean(squares, where=triggers) / wanted + jnp.mean(squares, where=~triggers) / wanted

    def measure(outputs: Array, weights: Array, batch: Batch) -> dict[str, Array]:
        on_first = jnp.mean(weights[..., 0], axis=1)[:, 1:]  # [B, T - 1]
        return {ERROR: error(outputs, batch), SINK: jnp.mean(on_first, where=~batch.triggers[:, 1:])}

    return Task(
        (case,), lambda data, key, count: sample(config, key, count), config.batch, config.test, error, measure,
        {ERROR: "squared error, of that of zero", SINK: "attention on the first token"}, ERROR, "lower",
        lambda found: verdicts(config, uniform, found), reads="all", residual=False,
    )  # fmt: skip


def verdicts(config: Config, uniform: float, found: Sequence[Any]) -> tuple[Verdict, ...]:
    """The three rules above.

    Args:
      config: of the task.
      uniform: the share of a head that attends alike to all that it may.
      found: what the arms reached.
    """
    said = [one for one in found if not one.arm.control]
    value = lambda one, measure: next(iter(one.values.values()))[measure]  # noqa: E731
    softmax = [one for one in said if one.arm.variant == "softmax" and not one.arm.hide_first]
    others = [one for one in said if one.arm.variant != "softmax"]
    free = [one for one in others if not one.arm.hide_first]
    hidden = [one for one in others if one.arm.hide_first]
    reference = value(softmax[0], ERROR)
    excess = rules.intervals(
        {f"“{one.arm.name}” higher by": value(one, ERROR) - reference for one in hidden}, config.margin
    )
    word: Word = "supported" if all(rules.below(excess)) else "refuted" if any(rules.above(excess)) else "not resolved"
    lost = [one for one in found if one.arm.variant == "softmax" and one.arm.hide_first]
    because = "; ".join(map(rules.shown, excess)) + f" (margin {config.margin:g}); softmax reaches "
    because += f"{reference.mean():.3g}" + "".join(
        f", and {value(one, ERROR).mean():.3g} without the first token" for one in lost
    )
    shares = {name: [(one.arm.name, value(one, ERROR), value(one, SINK)) for one in arms]
              for name, arms in (("softmax", softmax), ("free", free))}  # fmt: skip
    return (
        _of_shares(CLAIMS[0], shares["softmax"], config.solved, at_least=0.5),
        Verdict(CLAIMS[1], word, because),
        _of_shares(CLAIMS[2], shares["free"], config.solved, at_most=uniform),
    )


def _of_shares(
    claim: str, arms: Sequence[tuple[str, np.ndarray, np.ndarray]], solved: float, *,
    at_least: float | None = None, at_most: float | None = None,
) -> Verdict:  # fmt: skip
    """Rules 1 and 3: whether arms solve the task and their shares are at least, or at most, so much; refuted by 1/2."""
    errors = rules.intervals({f"“{name}”: error": error for name, error, _ in arms}, solved)
    done = rules.below(errors)
    shares = {f"“{name}”: share": share for name, _, share in arms}
    bound = at_least if at_most is None else at_most
    found, middle = rules.intervals(shares, bound or 0.0), rules.intervals(shares, 0.5)
    holds = rules.below(found) if at_most is not None else rules.above(found)
    fails = rules.above(middle) if at_most is not None else rules.below(middle)
    word: Word = "not resolved"
    if all(done) and all(holds):
        word = "supported"
    elif any(one and other for one, other in zip(done, fails, strict=True)):
        word = "refuted"
    more = f"uniform attention has {at_most:.3g}" if at_most is not None else f"solved is below {solved:g}"
    return Verdict(claim, word, "; ".join(map(rules.shown, [*errors, *found])) + f"; {more}")


def _uniform(length: int) -> float:
    """The share of the first token, averaged over the places 1 … T − 1 that are not the trigger."""
    places = np.arange(1, length)
    chance = np.where(places >= EARLIEST, 1 - 1 / (length - EARLIEST), 1.0)
    return float(np.sum(chance / (places + 1)) / np.sum(chance))
