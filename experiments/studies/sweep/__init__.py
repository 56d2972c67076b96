"""Is one arm of a training better than others? Any config of a training, with other values, over seeds.

Every arm is a run of its own, in the folder that the same command line would give it, so what is there is not trained
again; an interrupted study goes on with the arm that it was at. All arms see the same batches for the same seed.

The rule, stated before anything is run, is that of `studies.paired`: the claimed arm against each of the others, those
that are controls left out, seed by seed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.data import files
from experiments.errors import ConfigError, DataError
from experiments.studies import paired
from experiments.studies.paired import Better
from experiments.studies.study import Answer, Study, Train, Verdict
from experiments.studies.sweep import report, rules
from experiments.studies.sweep.rules import Trained
from mhajax import training

LEAST = 3  # seeds; two have no interval worth the name


@dataclass(frozen=True)
class Base:
    """The table [base].

    Attributes:
      path: the config of a training, which every arm changes.
      set: TOML lines for all arms, such as "training.steps=300".
    """

    path: str
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """A table [[arms]].

    Attributes:
      name: for a reader.
      set: TOML lines that make the arm, such as "model.num_heads=1".
      control: it is measured and drawn, and has no say in the verdict.
    """

    name: str
    set: tuple[str, ...] = ()
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "sweep"`: train arms that differ in a few values, over seeds, and say whether one is better.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: small arms of few seeds, and everything says so. Left out: all of it.
      question: the title of the page.
      claim: a sentence that may be false: that the first arm is better than the others.
      base: the training.
      arms: the claimed one first, then what it is claimed to be better than.
      seeds: how many of each arm.
      measure: a number of the result of a training, such as "validation_loss" or "bleu".
      better: whether lower or higher is.
      margin: by how much the first arm must be better.
      tuned: TOML lines, such as "training.learning_rate=1e-3", of which every arm takes the one that is best for its
        first seed; none: arms are taken as they are.
    """

    kind: Literal["sweep"] = "sweep"
    quick: bool | None = None
    question: str
    claim: str
    base: Base
    arms: tuple[Arm, ...]
    seeds: int = 5
    measure: str = "validation_loss"
    better: Better = "lower"
    margin: float = 0.0
    tuned: tuple[str, ...] = ()

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or sum(not arm.control for arm in self.arms) < 2:
            raise ValueError(f"arms must be two or more of different names, besides controls, got {names}.")
        if self.arms[0].control:
            raise ValueError(f"the first of arms is the claimed one and no control, got {names[0]!r}.")
        if self.seeds < LEAST:
            raise ValueError(f"seeds must be at least {LEAST}, got {self.seeds}.")
        if self.margin < 0:
            raise ValueError(f"margin must be at least 0, got {self.margin}.")


def shrink(config: Config) -> Config:
    """The same arms, made small as --quick makes a training, with few seeds and nothing tuned."""
    return dataclasses.replace(config, seeds=LEAST, tuned=())


def hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the config that the arms change; the data are checked by the arms' own runs."""
    return {Path(config.base.path).name: files.sha256(config.base.path)}


def answer(config: Config, train: Train) -> Answer:
    """Train what is not there yet, and compare.

    Raises:
      ConfigError: an arm is no valid config of a training, or its result has no such measure.
    """
    lines = {arm.name: (*config.base.set, *arm.set) for arm in config.arms}
    for arm, own in lines.items():
        for more in config.tuned or ("",):
            try:
                train.check(config.base.path, _seeds([*own, *filter(None, [more])], config.seeds))
            except (ConfigError, DataError) as error:
                raise ConfigError(f"arm {arm!r}: {error}") from None
    return report.make(config, [_trained(config, arm, lines[arm.name], train) for arm in config.arms])


def judge(config: Config, result: dict[str, Any]) -> tuple[Verdict, ...]:
    """The verdict that follows from the numbers in a result, by the rule."""
    arms = [Trained(**{name: arm[name] for name in Trained._fields}) for arm in result["arms"]]
    return (paired.verdict(config.claim, rules.compare(arms, config.better, config.margin)),)


def _trained(config: Config, arm: Arm, lines: tuple[str, ...], train: Train) -> Trained:
    """An arm with the best of the lines that are tried for it."""
    tried: dict[str, float | None] = {}
    spent = 0.0
    for line in config.tuned:
        try:
            result = train(config.base.path, _seeds([*lines, line], 1), f"{arm.name}, {line}")
        except training.NonFinite:  # such a setting is no candidate
            tried[line] = None
            continue
        tried[line] = _number(config, result)
        spent += result["seconds"]
    finite = {line: value for line, value in tried.items() if value is not None and math.isfinite(value)}
    if tried and not finite:
        raise ConfigError(f"arm {arm.name!r}: with none of the lines in tuned it has a finite {config.measure}.")
    best = [min(finite, key=lambda line: finite[line] * (1 if config.better == "lower" else -1))] if finite else []
    result = train(config.base.path, _seeds([*lines, *best], config.seeds), arm.name)
    _number(config, result)
    return Trained(
        arm.name, arm.control, (*arm.set, *best), result[f"{config.measure}_by_seed"], tried, result["parameters"],
        result["seconds"] + spent,
    )  # fmt: skip


def _seeds(lines: list[str], seeds: int) -> list[str]:
    return [*lines, f"training.seeds={seeds}"]


def _number(config: Config, result: dict[str, Any]) -> float:
    if not isinstance(result.get(config.measure), int | float):
        known = [name for name, value in result.items() if isinstance(value, float)]
        raise ConfigError(f"measure must be a number of the arms' results ({', '.join(known)}), got "
                          f"{config.measure!r}.")  # fmt: skip
    return float(result[config.measure])
