"""The kinds of experiments: a module for each, in one of two tables.

A *training* makes parameters. Its module exports `Config`, which is a `tables.Training`, and `prepare(config, folder)`,
which makes a `Task`.
A *study* asks a question and answers it. Its module exports `Config`, which is a `studies.Study`, `hashes(config)`,
`answer(config, train)`, which makes a `studies.Answer`, and `judge(config, result)`: the verdicts that follow from the
numbers in a result.
Both export `shrink(config)`: the same, small, for `--quick`.

`kind = "…"` in a file is the name in these tables.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, Union

from experiments import language_modelling, masked_modelling, translation
from experiments.studies import STUDIES

TRAININGS: dict[str, ModuleType] = {
    "translation": translation, "language_model": language_modelling, "masked_language_model": masked_modelling,
}  # fmt: skip

__all__ = ["STUDIES", "TRAININGS", "configs", "shrink"]


def configs() -> Any:
    """The union of the configs of all kinds, as `schema.read` takes it."""
    return Union[tuple(module.Config for module in (TRAININGS | STUDIES).values())]  # noqa: UP007


def shrink(config: Any) -> Any:
    """The same experiment, small; values that are smaller already stay."""
    return dataclasses.replace((TRAININGS | STUDIES)[config.kind].shrink(config), quick=True)
