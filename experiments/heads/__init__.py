"""What the heads of a trained run do, measured: `python -m experiments heads RUN`. The measures are `mhajax.report`.

held_out.py   the held-out text of a run
of_pairs.py   a translator, and its held-out sentences
gold.py       what the grammar knows: the keys that a head should look at
pretrained.py the report of a model from a file or a folder, on any text
table.py      every head of one model in a terminal
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax
from rich.console import Console

from experiments import work
from experiments.task import Task, seeds_of
from mhajax import report
from mhajax.report import Report


def examine(task: Task, params: Any, seed: int, name: str, *, sentences: int, shown: int, console: Console) -> Report:
    """Measure every head of every seed of a run, and say what was found.

    Args:
      task: of the run.
      params: its parameters [seeds, ...].
      seed: of the training; the untrained models that serve as baseline are those that the training began with.
      name: of the run, for the page.
      sentences: how many held-out sentences (windows of a text) are measured.
      shown: how many of them the view shows.
      console: where a person reads.
    """
    trained = [task.functional(one) for one in seeds_of(params)]
    untrained = [task.functional(task.init_params(jax.random.key(seed + i))) for i in range(len(trained))]
    subject = task.examine(sentences)
    with work.shown_on(console):
        return report.examine(subject, trained, untrained, name=name, shown=shown, progress=progress)


def progress(what: str, total: int, unit: str) -> AbstractContextManager[work.Piece]:
    """The library's progress as a piece of work; what is counted in steps compiles nothing by itself."""
    return work.piece(what, total, unit, note="" if unit == "steps" else work.COMPILING)
