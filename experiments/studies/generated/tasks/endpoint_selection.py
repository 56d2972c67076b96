"""Endpoint selection: can one head of any width do what two narrow heads can?

The input is (u, v, i, #): an arc u → v of a directed graph, a selector i of 1 or 2, and a query token. The answer, read
at #, is u for 1 and v for 2. A graph of m arcs has 2m samples, which are trained on and measured, all at each step: the
question is what can be represented, not what generalises. A token has one-hot features: what it is, where it stands.

What one head can reach. The weights at # are a factor E of each token over their sum Z, so Z times the logit of u minus
that of v is A(u, v) + h(i, u) − h(i, v): what u and v contribute, which does not depend on i, and what the selector
does, h(i, x) = E(i) (value(i) · readout(x) + c(x)), with c what x has without attention. Right answers for both i need
A + h(1, u) − h(1, v) > 0 > A + h(2, u) − h(2, v), so h(1, u) − h(2, u) > h(1, v) − h(2, v). Along a cycle this cannot
hold for all arcs, whatever the width and precision: at least one sample of every arc in a smallest set of arcs whose
removal leaves no cycle (MFAS) is wrong. So one head has an accuracy of at most 1 − MFAS / 2m, which the paper shows to
be reachable: 1 where the graph has no cycle, 3/4 for the complete digraph. Two heads reach 1 on every graph: one
attends to u if i is 1, the other to v if i is 2, and to the selector else, whose value is zero. MFAS is computed
exactly, by dynamic programming over sets of nodes.

The rule. Supported: no seed of any arm with one head and one layer passes the best of one head by more than half a
sample on any graph with a cycle; every arm with two heads that is no control has a mean accuracy of `reached` or more
on every graph; and on every graph with a cycle it leads every arm with one head that is no control: the interval of the
difference over seeds is above 0. Refuted: a seed of an arm with one head and one layer passes the best by more than
half a sample, or an interval is below 0. Else not resolved. The intervals are Student's, 95 % for all of them together
(Bonferroni).

Source: "Two (narrow) heads are better than (an arbitrarily wide) one", ICLR 2026, openreview RRmPbbZsvl; there the
complete digraph of 7 nodes is learned to 64.6–72.4 % with one head and to 100 % with two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.studies.generated import rules
from experiments.studies.generated.task import Case, Task
from experiments.studies.study import Verdict, Word

Arc = tuple[int, int]
CLAIM = "Two narrow heads do what one head of any width cannot."
LARGEST = 12  # nodes; the sets of nodes are counted
TOKENS = 4


def transitive(nodes: int) -> list[Arc]:
    """u → v for all u < v: no cycle."""
    return [(u, v) for u in range(nodes) for v in range(u + 1, nodes)]


def one_turned(nodes: int) -> list[Arc]:
    """The transitive tournament with the arc from the first to the last node turned round: one arc is in all cycles."""
    return [(v, u) if (u, v) == (0, nodes - 1) else (u, v) for u, v in transitive(nodes)]


def rotational(nodes: int) -> list[Arc]:
    """From every node to the (nodes − 1) // 2 nodes after it, round a circle."""
    return [(u, (u + step) % nodes) for u in range(nodes) for step in range(1, (nodes - 1) // 2 + 1)]


def complete(nodes: int) -> list[Arc]:
    """Both arcs between any two nodes."""
    return [(u, v) for u in range(nodes) for v in range(nodes) if u != v]


GRAPHS: dict[str, Callable[[int], list[Arc]]] = {
    "transitive tournament": transitive, "one arc turned": one_turned, "rotational tournament": rotational,
    "complete digraph": complete,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """`kind = "endpoint_selection"`: the arc (u, v) and a selector; the answer is u or v.

    Attributes:
      kind: of task.
      nodes: of every graph.
      graphs: names of GRAPHS.
      reached: the accuracy that two heads must reach.
    """

    kind: Literal["endpoint_selection"] = "endpoint_selection"
    nodes: int = 7
    graphs: tuple[str, ...] = tuple(GRAPHS)
    reached: float = 0.99

    def __post_init__(self):
        unknown = [name for name in self.graphs if name not in GRAPHS]
        if unknown or not self.graphs:
            raise ValueError(f"graphs must be of {', '.join(map(repr, GRAPHS))}, got {unknown or 'none'}.")
        if not 3 <= self.nodes <= LARGEST:
            raise ValueError(f"nodes must be between 3 and {LARGEST}, got {self.nodes}.")
        if not 0 < self.reached <= 1:
            raise ValueError(f"reached must be above 0 and at most 1, got {self.reached}.")
        if not any(feedback(GRAPHS[name](self.nodes), self.nodes) for name in self.graphs):
            raise ValueError(f"graphs must have one with a cycle, got {list(self.graphs)} of {self.nodes} nodes.")


class Batch(NamedTuple):
    """All samples of a graph.

    Attributes:
      features: [2m, 4, F].
      answers: node, [2m].
    """

    features: Array
    answers: Array


def feedback(arcs: Sequence[Arc], nodes: int) -> int:
    """MFAS: the least number of arcs without which the graph has no cycle, in nodes · 2^nodes steps.

    Over sets S of nodes, the most arcs that go forward if S comes first: forward(S + v) = forward(S) + arcs S → v.
    """
    into = [sum(1 << u for u, w in arcs if w == v) for v in range(nodes)]
    forward = [0] * (1 << nodes)
    for chosen in range(1, 1 << nodes):
        forward[chosen] = max(
            forward[rest := chosen & ~(1 << v)] + (into[v] & rest).bit_count() for v in range(nodes) if chosen >> v & 1
        )
    return len(arcs) - forward[-1]


def best_of_one_head(arcs: Sequence[Arc], nodes: int) -> float:
    """The highest accuracy that one head of any width reaches: 1 − MFAS / 2m."""
    return 1 - feedback(arcs, nodes) / (2 * len(arcs))


def samples(arcs: Sequence[Arc], nodes: int) -> Batch:
    """Both samples of every arc, as float32 features: one of nodes + 3 tokens, and one of 4 positions."""
    tokens = np.array([(u, v, nodes + i, nodes + 2) for u, v in arcs for i in (0, 1)])
    kinds = np.eye(nodes + 3, dtype=np.float32)[tokens]
    places = np.broadcast_to(np.eye(TOKENS, dtype=np.float32), (len(tokens), TOKENS, TOKENS))
    return Batch(
        jnp.asarray(np.concatenate([kinds, places], axis=-1)), jnp.asarray([arc[i] for arc in arcs for i in (0, 1)])
    )


def check(config: Config, arms: Sequence[Any]) -> None:
    """Raise a ValueError unless there are one head and two heads of one layer to compare."""
    heads = [arm.num_heads for arm in arms if not arm.control and arm.layers == 1]
    if 1 not in heads or 2 not in heads:
        raise ValueError(f"arms must have one with one head and one with two heads, of one layer and no controls, got "
                         f"{[arm.name for arm in arms]}.")  # fmt: skip


def make(config: Config) -> Task:
    """The task."""
    arcs = {name: GRAPHS[name](config.nodes) for name in config.graphs}
    cases = tuple(
        Case(
            f"{name}, MFAS {feedback(own, config.nodes)}", samples(own, config.nodes), config.nodes + 3 + TOKENS,
            config.nodes,
            {"accuracy": {"best of one head": best_of_one_head(own, config.nodes)}},
        )
        for name, own in arcs.items()
    )  # fmt: skip
    half = {case.name: 0.5 / (2 * len(own)) for case, own in zip(cases, arcs.values(), strict=True)}

    def loss(outputs: Array, batch: Batch) -> Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, batch.answers))

    def measure(outputs: Array, weights: Array, batch: Batch) -> dict[str, Array]:
        right = jnp.mean(jnp.argmax(outputs, axis=-1) == batch.answers)
        return {"accuracy": jnp.where(jnp.all(jnp.isfinite(outputs)), right, jnp.nan)}

    return Task(
        cases, lambda data, key, count: data, None, None, loss, measure, {"accuracy": "share of right answers"},
        "accuracy", "higher", lambda found: (verdict(config, cases, half, found),),
    )  # fmt: skip


def verdict(config: Config, cases: Sequence[Case], half: dict[str, float], found: Sequence[Any]) -> Verdict:
    """The rule above.

    Args:
      config: of the task.
      cases: the graphs.
      half: a sample's half in accuracy, of each graph.
      found: what the arms reached.
    """
    best = {case.name: case.lines["accuracy"]["best of one head"] for case in cases}
    cyclic = [name for name, most in best.items() if most < 1]
    shallow = [one for one in found if one.arm.num_heads == 1 and one.arm.layers == 1]
    ones = [one for one in shallow if not one.arm.control]
    twos = [one for one in found if one.arm.num_heads == 2 and one.arm.layers == 1 and not one.arm.control]
    passed = [
        f"“{one.arm.name}” {one.values[name]['accuracy'].max():.3f} of at most {best[name]:.3f} on {name}"
        for one in shallow
        for name in cyclic
        if one.values[name]["accuracy"].max() > best[name] + half[name]
    ]
    lowest = min((two.values[name]["accuracy"].mean(), name) for two in twos for name in best)
    leads = rules.intervals({
        f"“{two.arm.name}” before “{one.arm.name}” on {name}":
            two.values[name]["accuracy"] - one.values[name]["accuracy"]
        for two in twos for one in ones for name in cyclic
    })  # fmt: skip
    least = min(leads, key=lambda one: float(one.ahead.low))
    word: Word = "not resolved"
    if passed or any(rules.below(leads)):
        word = "refuted"
    elif all(rules.above(leads)) and lowest[0] >= config.reached:
        word = "supported"
    highest = max((one.values[name]["accuracy"].max() - best[name], name) for one in shallow for name in cyclic)
    said = "; ".join(passed) or f"no one-head seed passes its best (nearest: {highest[0]:+.3f} on {highest[1]})"
    return Verdict(
        CLAIM, word,
        f"{said}; two heads reach {lowest[0]:.3f} or more on every graph (lowest on {lowest[1]}); of {len(leads)} "
        f"leads of two heads before one the least certain is {rules.shown(least)}",
    )  # fmt: skip
