"""A training step of a small language model; `models` says what everybody computes.

Every implementation trains in a process of its own, for its peak memory, and they take turns at steps. The memory
counts all that the process ever had, from the start of Python to compiling and training; "import" is what it had before
the model was made. The gradient of a product counts twice the product, that of attention 2.5 times.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from experiments.bench import flops, machine, models, timing
from experiments.bench.case import OURS, Cannot, Case, Row, Settings

LENGTHS = (256,)
BUILDERS = (OURS, "linen", "nnx", "torch")
_CHECKED, _TOLERANCE = 2, 1e-3  # so many losses must be ours within this, relative
_ROOT = Path(__file__).parents[2]


def cases(lengths: Sequence[int]) -> list[Case]:
    """The training step for every length, 4,096 tokens at a time."""
    return [case_of(models.Size(length=t, batch=max(1, 4096 // t))) for t in lengths]


def case_of(size: models.Size) -> Case:
    """The case that a size is."""
    b, t, d = size.batch, size.length, size.d_model
    core = flops.attention(b, size.heads, t, t, size.width, causal=True, backward=True)
    maps = 4 * flops.linear(b * t, d, d, backward=True) + 2 * flops.linear(b * t, d, 4 * d, backward=True)
    return Case(
        name="step", what="training step", backward=True, causal=True,
        batch=b, length=t, keys=t, heads=size.heads, width=size.width, d_model=d,
        flops=size.layers * (core + maps) + flops.linear(b * t, d, size.vocabulary, backward=True),
    )  # fmt: skip


def rows(case: Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """A row for each of the implementations, with tokens per second and peak memory."""
    return of_size(models.Size(length=case.length, batch=case.batch), names, settings)


def of_size(size: models.Size, names: Sequence[str], settings: Settings) -> list[Row]:
    """The rows for any size of the model."""
    case = case_of(size)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "size.json").write_text(json.dumps(dataclasses.asdict(size)))
        np.savez(Path(folder) / "arrays.npz", **models.arrays(size))  # type: ignore
        workers, notes, losses = dict[str, Worker](), dict[str, str](), dict[str, list[float]]()
        try:
            for name in names:
                kind = "ours-unrolled" if name == OURS else name  # which is what runs on a CPU are told to use
                try:
                    workers[name] = worker = Worker(kind, Path(folder), settings.keep_memory)
                    losses[name] = [worker.step() for _ in range(_CHECKED)]
                except Cannot as error:
                    notes[name] = str(error)
                    if name == OURS:
                        raise
                    continue
                error = max(abs(a / b - 1) for a, b in zip(losses[name], losses[OURS], strict=True))
                if not error <= _TOLERANCE:
                    notes[name] = f"WRONG: losses differ from ours by {error:.1e}: {losses[name]}, ours {losses[OURS]}"
            return _timed(case, names, {n: w for n, w in workers.items() if n not in notes}, notes, settings)
        finally:
            for worker in workers.values():
                worker.close()


def _timed(
    case: Case, names: Sequence[str], workers: dict[str, Worker], notes: dict[str, str], settings: Settings
) -> list[Row]:
    product, operations = machine.matmul()
    calls = {name: worker.step for name, worker in workers.items()}
    times, of_product = timing.interleave(calls, settings.seconds, warm=False, yardstick=product)
    found = []
    for name in names:
        if name in notes:
            found.append(Row(case=case, implementation=name, note=notes[name]))
            continue
        seen, worker = timing.summary(times[name]), workers[name]
        mib = lambda count: None if count is None else count / 2**20  # noqa: E731
        extra = {
            "tokens_per_second": case.batch * case.length / seen.median,
            "peak_mib": mib(worker.peak),
            "import_mib": mib(worker.base),
        }
        found.append(
            Row(
                case=case, implementation=name,
                milliseconds=seen.median * 1e3, spread=seen.spread * 1e3, rounds=seen.rounds,
                relative_to_ours=timing.ratio(times[name], times[OURS]),
                matmul_fraction=case.flops / seen.median * float(np.median(of_product)) / operations,
                extra=extra,
            )
        )  # fmt: skip
    return found


class Worker:
    """A process that does a step when asked to, see `worker`."""

    def __init__(self, kind: str, folder: Path, keep_memory: bool):
        self.peak: int | None = None
        self._errors: IO[str] = (folder / f"{kind}.stderr").open("w+")
        command = [sys.executable, "-m", "experiments.bench.worker", kind, str(folder), "keep" if keep_memory else "-"]
        self._process = subprocess.Popen(
            command, cwd=_ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self.base: int | None = self._answer()["base"]

    def step(self) -> float:
        """One training step; its loss."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is in its answer
        answer = self._answer()
        self.peak = answer["peak"]
        return answer["loss"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"reason": self._last_words()}
        if "reason" in answer:
            self.close()
            raise Cannot(answer["reason"])
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or [f"exit status {self._process.returncode}"]
        return f"fails: {said[-1]}"
