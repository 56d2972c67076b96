"""The figure of the training loss and of every evaluation of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments import folder as folders
from experiments.folder import METRICS
from experiments.tables import Training

FAR_ABOVE = 1.25  # times the first loss, which is about that of guessing


def draw(folder: Path, config: Training, unit: str, console: Console) -> None:
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
    points = [(line["step"], float(np.mean(line["validation_loss"]))) for line in evaluations]
    points = [point for point in points if math.isfinite(point[1])]
    if points:
        series["validation"] = ([step for step, _ in points], [loss for _, loss in points])
    drawing = figures.training_curve(series, title=f"{config.kind.replace('_', ' ')}: loss", ylabel=f"nats per {unit}")
    figures.save(drawing, folder / "figures" / "training")


def diverged(folder: Path) -> str | None:
    """A sentence where the loss of a run ended far above where it began, or is no number; None: it did not."""
    lines = folders.lines(folder / METRICS)
    losses = [float(np.mean(line["loss"])) for line in lines if "loss" in line]
    ends = [float(np.mean(line["validation_loss"])) for line in lines if "validation_loss" in line][-1:]
    if not losses:
        return None
    ends.append(float(np.mean(losses[-max(len(losses) // 10, 1) :])))
    worst = next((loss for loss in ends if not math.isfinite(loss)), max(ends))
    if math.isfinite(worst) and worst <= FAR_ABOVE * losses[0]:
        return None
    return (
        f"training diverged: the loss began at {losses[0]:.4g} and ended at {worst:.4g}; the numbers mean little. Try "
        "a lower training.learning_rate, a longer training.warmup_steps, or training.clip_norm = 1.0."
    )
