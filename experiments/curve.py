"""The figure of the training loss and of every evaluation of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from experiments import config as configs
from experiments import folder as folders
from experiments.folder import METRICS


def draw(folder: Path, config: configs.Experiment, unit: str, console: Console) -> None:
    """Write figures/training of a run; without any batch in its metrics, say so.

    Args:
      folder: of the run.
      config: of the run.
      unit: what a token is, for a reader: "word", "character" or "token".
      console: where a person reads.
    """
    from mhajax import figures

    lines = folders.lines(folder / METRICS)
    batches = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation_loss" in line]
    if not batches:
        console.print(f"{folder / METRICS} has no batches: no figure of the training", style="dim", soft_wrap=True)
        return
    every = max(len(batches) // 200, 1)
    chunks = [batches[i : i + every] for i in range(0, len(batches), every)]
    means = [float(np.mean([line["loss"] for line in chunk])) for chunk in chunks]
    series = {"training": ([chunk[-1]["step"] for chunk in chunks], means)}
    if evaluations:
        series["validation"] = (
            [line["step"] for line in evaluations], [float(np.mean(line["validation_loss"])) for line in evaluations]
        )  # fmt: skip
    drawing = figures.training_curve(series, title=f"{config.kind.replace('_', ' ')}: loss", ylabel=f"nats per {unit}")
    figures.save(drawing, folder / "figures" / "training")
