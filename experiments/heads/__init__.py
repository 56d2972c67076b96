"""What the heads of a trained run do, measured: `python -m experiments heads RUN`.

examined.py   what the measures need of a model, and its held-out sentences
of_pairs.py   that of a translator
of_text.py    that of a language model, or of an encoder
pretrained.py the same of a model from a file or a folder, on any text
gold.py       what the grammar knows: the keys that a head should look at
measure.py    where every head looks, sentence by sentence
costs.py      what is lost without each head, and without more and more of them
findings.py   values with intervals and baselines, over sentences and seeds
roles.py      one word for each head
report.py     the page; numbers.py the same as JSON; table.py in a terminal
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from rich.console import Console

from experiments.heads import findings, numbers, report
from experiments.task import Task, seeds_of
from mhajax.figures import Drawing
from mhajax.report.page import Page


class Report(NamedTuple):
    """The answers about a run's heads, as a page, as pictures and as numbers."""

    page: Page
    drawings: dict[str, Drawing]
    numbers: dict[str, Any]


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
    model = task.examine(sentences)
    found = findings.examine(model, trained, untrained, console)
    page, drawings = report.make(model, found, trained, name, shown)
    return Report(page, drawings, numbers.as_json(model, found, len(trained)))
