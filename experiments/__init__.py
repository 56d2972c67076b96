"""The application: config → data → training → result. `python -m experiments CONFIG`, and `load` for a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.finished import Run


def load(run: str | Path, seed: int = 0) -> Run:
    """A finished run: `params, config, vocabulary, apply = experiments.load("runs/grammar-1a2b3c4d")`.

    Args:
      run: its folder.
      seed: which of its seeds, counted from 0.

    Returns:
      Its best parameters, the config of its model, its vocabulary and the function of the model; see `finished.Run`.

    Raises:
      UserError: this is not the folder of a run, nothing is trained in it yet, or there is no such seed.
    """
    from experiments import extras

    extras.need("experiments")
    from experiments import finished
    from experiments import run as running

    return finished.load(*running.load_training(run), seed=seed)
