"""Claims tested on generated tasks with small models of attention alone: `kind = "generated_task"`.

A task (`tasks/`) makes samples from a key, knows what the best reachable is, and states the rule of its verdicts before
anything is run. The arms of the config are models of attention alone; all seeds of an arm are trained as one compiled
program, and arms of equal shape share it. Every arm takes for every case the best of the same learning rates, chosen
with seeds that are not reported.

A task of one's own is a module in tasks/ and a row of TASKS there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from experiments.studies.generated import report
from experiments.studies.generated.arms import Arm, Training, train
from experiments.studies.generated.tasks import TASKS, Tasks
from experiments.studies.study import Answer, Study, Train, Verdict
from experiments.studies.sweep import LEAST

__all__ = ["TASKS", "Arm", "Config", "Training", "answer", "hashes", "judge", "shrink"]

QUICK_STEPS = 10
# nearly all the time of a quick look is the compiler's, so it takes less of it
QUICK_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "generated_task"`: train arms of attention alone on a generated task, and decide by the task's rule.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: few steps and seeds, and everything says so. Left out: all of it.
      question: the title of the page.
      task: what is asked; its docstring states the rule.
      arms: the models.
      training: how each is trained.
      seeds: how many of each arm are reported.
    """

    kind: Literal["generated_task"] = "generated_task"
    quick: bool | None = None
    question: str
    task: Tasks  # pyright: ignore[reportInvalidTypeForm]
    arms: tuple[Arm, ...]
    training: Training = Training()
    seeds: int = 6

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms must be one or more of different names, got {names}.")
        if self.seeds < LEAST:
            raise ValueError(f"seeds must be at least {LEAST}, got {self.seeds}.")
        TASKS[self.task.kind].check(self.task, self.arms)


def shrink(config: Config) -> Config:
    """The same arms with few steps and seeds, and nothing tuned."""
    few = dataclasses.replace(
        config.training, steps=min(config.training.steps, QUICK_STEPS), rates=config.training.rates[:1]
    )
    return dataclasses.replace(config, seeds=LEAST, training=few)


def hashes(config: Config) -> dict[str, str]:
    """No data is read."""
    return {}


def answer(config: Config, models: Train) -> Answer:
    """Train the arms, and decide.

    Raises:
      ConfigError: an arm diverges with every learning rate.
    """
    task = TASKS[config.task.kind].make(config.task)
    options = QUICK_OPTIONS if config.quick else None
    return report.make(config, task, train(task, config.arms, config.training, config.seeds, options))


def judge(config: Config, result: dict[str, Any]) -> tuple[Verdict, ...]:
    """The verdicts that follow from the numbers in a result, by the task's rule."""
    return TASKS[config.task.kind].make(config.task).verdicts(report.reached(config.arms, result["arms"]))
