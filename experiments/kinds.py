"""The kinds of experiments: a module for each, in one of two tables.

A *training* makes parameters: its module exports `prepare(config, folder)`, which makes a `Task`.
A *study* asks a question and answers it: its module exports `Config`, `shrink(config)`, `hashes(config)` and
`answer(config)`, which makes a `studies.Answer`.

`config.Experiment` lists the configs of both, `kind = "…"` in a file names one.
"""

from types import ModuleType

from experiments import language_modelling, translation
from experiments.studies import STUDIES

TRAININGS: dict[str, ModuleType] = {"translation": translation, "language_model": language_modelling}

__all__ = ["STUDIES", "TRAININGS"]
