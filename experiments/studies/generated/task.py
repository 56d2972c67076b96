"""What a generated task is to the study: samples made from a key, a loss, measures, and the rule of the verdicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jax import Array

from experiments.studies.paired import Better
from experiments.studies.study import Verdict


class Case(NamedTuple):
    """One setting of a task, such as a graph or a length, in which every arm is trained.

    Attributes:
      name: for a reader.
      data: arrays that samples are made from. Cases of equal shapes share the compiled program.
      features: F, numbers that a token has.
      outputs: C, numbers that are read at a token.
      lines: measure → name → what theory or a baseline reaches, drawn into the figure.
    """

    name: str
    data: Any
    features: int
    outputs: int
    lines: dict[str, dict[str, float]]


class Task(NamedTuple):
    """A task; the `make` of a module in tasks/ makes one from its config.

    Attributes:
      cases: one or more.
      sample: (data of a case, PRNG key, number of samples) → a batch, a NamedTuple with `features` [B, T, F].
      batch, test: samples of a step of the training, and of the held-out batch. None: `sample` gives all that there
        are, to be trained on and measured.
      loss: (outputs, batch) → a number.
      measure: (outputs, weights of the first layer [B, N, T, S], batch) → {measure: a number}.
      labels: measure → what it is, with its unit, for a figure; in the order of the figures.
      chosen_by, better: the measure by which learning rates are chosen, and whether lower or higher is better.
      verdicts: what the arms reached (`arms.Found`) → the verdicts, by the rule that the task's docstring states.
      reads, residual: as in `model.Config`.
    """

    cases: tuple[Case, ...]
    sample: Callable[[Any, Array, int | None], Any]
    batch: int | None
    test: int | None
    loss: Callable[[Array, Any], Array]
    measure: Callable[[Array, Array, Any], dict[str, Array]]
    labels: dict[str, str]
    chosen_by: str
    better: Better
    verdicts: Callable[[Any], tuple[Verdict, ...]]
    reads: Literal["last", "all"] = "last"
    residual: bool = True
