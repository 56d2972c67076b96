"""What the heads of a trained model do, over seeds: `kind = "trained_heads"`.

A training of several seeds, and claims about its heads. Each claim names a measurement, one number for each seed, and
what it must beat: what is reached without attention, by heads before the training, by other heads. Which these are, the
measurement says (`measurements.py`).

The rule, stated before anything is run, is that of `studies.paired`: the number against each of the others, seed by
seed; "better" of the claim says in which direction. Heads are chosen on one half of the held-out sentences and judged
on the other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.data import files
from experiments.errors import ConfigError
from experiments.studies.paired import Better
from experiments.studies.study import Answer, Study, Train, Verdict
from experiments.studies.sweep import LEAST, Base
from experiments.studies.trained_heads import report
from experiments.studies.trained_heads.measurements import MEASUREMENTS, Found, Question, seeds

__all__ = ["Claim", "Config", "answer", "hashes", "judge", "shrink"]


@dataclass(frozen=True)
class Claim:
    """A table [[claims]].

    Attributes:
      claim: a sentence that may be false.
      measure: a measurement: "follows", "needed", "reach", "apart" or "differ"; see measurements.py.
      of: a relation, such as "cross: verb written → the source's subject", or a kind of attention, such as "self".
      part: of a relation, by distance, such as "more than 10"; left out: all of it.
      words: the category of words whose loss "needed" looks at, such as "pronouns".
      better: whether lower or higher is.
      margin: by how much it must be better than each of the others.
    """

    claim: str
    measure: str
    of: str
    part: str = ""
    words: str = ""
    better: Better = "higher"
    margin: float = 0.0

    def __post_init__(self):
        if self.measure not in MEASUREMENTS:
            raise ValueError(f"measure must be one of {', '.join(MEASUREMENTS)}, got {self.measure!r}.")
        if self.margin < 0:
            raise ValueError(f"margin must be at least 0, got {self.margin}.")

    @property
    def question(self) -> Question:
        """What the measurement is asked."""
        return Question(self.of, self.part, self.words)


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "trained_heads"`: train over seeds, and say what the heads do.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: a small model on little data, and everything says so.
      question: the title of the page.
      literature: what others found, for the page; left out: nothing is said.
      base: the training.
      claims: about its heads.
      seeds: how many are trained.
      sentences: how many held-out sentences (windows of a text) are measured.
    """

    kind: Literal["trained_heads"] = "trained_heads"
    quick: bool | None = None
    question: str
    literature: str = ""
    base: Base
    claims: tuple[Claim, ...]
    seeds: int = 5
    sentences: int = 400

    def __post_init__(self):
        if not self.claims:
            raise ValueError("claims must be one or more, got none.")
        if self.seeds < LEAST:
            raise ValueError(f"seeds must be at least {LEAST}, got {self.seeds}.")
        if self.sentences < 8:
            raise ValueError(f"sentences must be at least 8, got {self.sentences}.")


def shrink(config: Config) -> Config:
    """The same claims about a small model, as --quick makes a training, with few seeds."""
    return dataclasses.replace(config, seeds=LEAST, sentences=20)


def hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the config of the training; the data are checked by its own run."""
    return {Path(config.base.path).name: files.sha256(config.base.path)}


def answer(config: Config, train: Train) -> Answer:
    """Train what is not there yet, measure, decide, and write the page.

    Raises:
      ConfigError: the training has no such relation, part, category or kind of attention.
    """
    lines = (*config.base.set, f"training.seeds={config.seeds}")
    train.check(config.base.path, lines)
    models = train.models(config.base.path, lines, "the model")
    measured = seeds(models, config.sentences)
    found = []
    for claim in config.claims:
        try:
            found.append([MEASUREMENTS[claim.measure](seed, claim.question) for seed in measured])
        except ConfigError as error:
            raise ConfigError(f"claim {claim.claim!r}: {error}") from None
    return report.make(config, found, measured[0].subject)


def judge(config: Config, result: dict[str, Any]) -> tuple[Verdict, ...]:
    """The verdicts that follow from the numbers in a result, by the rule."""
    found = [[Found(**one) for one in claim["by_seed"]] for claim in result["claims"]]
    return report.verdicts(config, found)
