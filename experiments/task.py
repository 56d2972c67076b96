"""What an experiment is to the loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array
from rich.console import Console

from experiments.heads.examined import Examined


class Task(NamedTuple):
    """One experiment, ready to run; `translation.prepare` and `language_modelling.prepare` make one.

    Attributes:
      init_params: PRNG key → parameters of the Flax module.
      loss: (params, batch, key) → (loss, {name: number}), what is trained on, as `training.make_step` takes it.
      batches: number of batches seen → the batches that follow.
      tokens: a batch → how many tokens it predicts (padding not counted).
      evaluate: parameters [seeds, ...] → {name: number per seed}; "score" chooses the best, higher is better.
      examine: number of sentences → what the measures of heads take; see `experiments.heads`.
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
    examine: Callable[[int], Examined]
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
