"""What a person sees while a run goes on, and how long it took."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments import extras
from experiments import folder as folders
from experiments.task import Task
from experiments.work import COMPILING, Piece, Watch
from mhajax import training


class Display:
    """The training as a piece of work, and its evaluations as lines."""

    def __init__(self, watch: Watch, config: training.Config, task: Task, done: int):
        self._watch, self._config, self._task = watch, config, task
        self._piece = Piece(watch, "training", config.steps, "batches", done)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: Any) -> None:
        self._piece.close()

    def compiling(self) -> None:
        """Batches of a new shape have come."""
        self._piece.note(COMPILING)

    def show(self, lines: list[dict[str, Any]], times: Times) -> None:
        """News: batches, or an evaluation."""
        step = lines[-1]["step"]
        losses = [np.mean(line["loss"]) for line in lines if "loss" in line]
        if losses:
            note = f"loss {np.mean(losses):.3f} · {times.tokens_per_second():,.0f} tokens/s"
            if self._task.epoch:
                note += f" · epoch {step / self._task.epoch:.1f}"
            self._piece.update(step, note)
        else:
            shown = " · ".join(
                f"{name.replace('_', ' ')} {np.mean(value):.3f}"
                for name, value in lines[-1].items() if name not in ("step", "score")
            )  # fmt: skip
            self._watch.print(f"[dim]batch {step}:[/dim] {shown}")


class Board:
    """The metrics as TensorBoard files, if a folder is given; the mean over seeds."""

    def __init__(self, folder: Path | None):
        self._writer = None
        if folder is not None:
            extras.need("tensorboard")
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def show(self, lines: list[dict[str, Any]]) -> None:
        """Add the lines of metrics.jsonl."""
        if self._writer is not None:
            for line in lines:
                for name, value in line.items():
                    if name not in ("step", "score"):
                        self._writer.add_scalar(name, float(np.mean(value)), line["step"])


class Times:
    """Seconds and tokens of a run, added up over all the processes that worked on it."""

    def __init__(self, folder: Path):
        self._file = folder / folders.TIMES
        self._began = time.monotonic()
        self._before = {"seconds": 0.0, "training_seconds": 0.0, "tokens": 0}
        self._training_began: float | None = None
        self._paused = 0.0
        self.tokens = 0

    def start(self, done: int) -> None:
        """Training begins after `done` batches; what earlier processes did beyond them is lost work."""
        kept = [entry for entry in folders.times(self._file) if entry["step"] <= done]
        self._before |= kept[-1] if kept else {}
        self._saved = kept
        self._training_began = time.monotonic()

    def paused(self):
        """A context whose time is not training's."""
        return _Pause(self)

    def add_pause(self, seconds: float) -> None:
        self._paused += seconds

    def save(self, step: int) -> None:
        """Keep the sums as they are after this batch."""
        self._saved = [*self._saved[-200:], {"step": step, **self._sums()}]
        folders.write(self._file, json.dumps(self._saved))

    def tokens_per_second(self) -> float:
        """Real target tokens per second of training (this process), neither compiling nor evaluating included."""
        began = self._began if self._training_began is None else self._training_began
        return self.tokens / max(time.monotonic() - began - self._paused, 1e-9)

    def summary(self) -> dict[str, float]:
        """`seconds` of the whole run and `tokens_per_second` of its training."""
        trained = self._before if not self.tokens else self._saved[-1]
        return {
            "seconds": round(self._before["seconds"] + time.monotonic() - self._began, 1),
            "tokens_per_second": round(trained["tokens"] / max(trained["training_seconds"], 1e-9), 1),
        }

    def _sums(self) -> dict[str, float]:
        now = time.monotonic()
        began = now if self._training_began is None else self._training_began
        return {
            "seconds": self._before["seconds"] + now - self._began,
            "training_seconds": self._before["training_seconds"] + now - began - self._paused,
            "tokens": self._before["tokens"] + self.tokens,
        }


class _Pause:
    def __init__(self, times: Times):
        self._times = times

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self._times.add_pause(time.monotonic() - self._began)
