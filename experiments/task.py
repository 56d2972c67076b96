"""What an experiment is to the loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from rich.console import Console

from experiments.data.vocabulary import Vocabulary
from experiments.tables import Training
from mhajax import linen
from mhajax.report.subject import Subject


class Task(NamedTuple):
    """One experiment, ready to run; the `prepare` of a kind makes one.

    Attributes:
      init_params: PRNG key → parameters of the Flax module.
      loss: (params, batch, key) → (loss, {name: number}), what is trained on, as `training.make_step` takes it.
      batches: number of batches seen → the batches that follow.
      tokens: a batch → how many tokens it predicts (padding not counted).
      evaluate: parameters [seeds, ...] → {name: number per seed}; "score" chooses the best, higher is better.
      examine: number of sentences → what the measures of heads take; see `mhajax.report`.
      functional: parameters of the Flax module (one seed) → those of the functions.
      report: (parameters [seeds, ...], folder) → the result; prints what a person wants to see, writes figures.
      epoch: batches per epoch; None where there are none.
      hashes: what data was used, name → SHA-256.
      unit: what a token is, for a reader: "word", "character" or "token".
      notes: what a person should know before it starts.
      examples: number of batches seen → in words, which examples of the training data the next one has.
    """

    init_params: Callable[[Array], Any]
    loss: Callable[[Any, Any, Array], tuple[Array, dict[str, Array]]]
    batches: Callable[[int], Iterable[Any]]
    tokens: Callable[[Any], int]
    evaluate: Callable[[Any], dict[str, list[float]]]
    examine: Callable[[int], Subject]
    functional: Callable[[Any], Any]
    report: Callable[[Any, Path, Console], dict[str, Any]]
    epoch: int | None
    hashes: dict[str, str]
    unit: str
    notes: tuple[str, ...]
    examples: Callable[[int], str]


def seeds_of(params: Any) -> list[Any]:
    """The parameters of each seed, of parameters [seeds, ...]."""
    count = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda a, i=i: a[i], params) for i in range(count)]


def build_model(config: Training, words: Vocabulary) -> linen.Model:
    """The Flax module of a training's model, with the vocabulary's size filled in."""
    return linen.Model(replace(config.model, vocab_size=words.size))


def initialiser(model: linen.Model) -> Callable[[Array], Any]:
    """A function PRNG key → parameters of the module."""
    return lambda key: model.init(key, method="parameters")["params"]


def mean_and_spread(scores: dict[str, list[float]]) -> dict[str, Any]:
    """Mean over seeds; with more than one also the standard deviation and the single values."""
    result: dict[str, Any] = {name: round(float(np.mean(values)), 3) for name, values in scores.items()}
    for name, values in scores.items():
        if len(values) > 1:
            result |= {f"{name}_sd": round(float(np.std(values, ddof=1)), 3), f"{name}_by_seed": values}
    return result


def show_sample(text: str, folder: Path, console: Console) -> None:
    """Print what a model writes, and keep it in its folder."""
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, style="dim")
    console.print()
