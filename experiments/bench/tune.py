"""What "auto" should decide by on this machine: `python -m experiments bench tune [FILE]`.

One number of `kernels.rules.Rules` after the other, with those found before: its candidates are timed in turns on the
cases that it matters for, and the one of the least geometric mean of ratios is taken, if that is 5 % better than the
number built in. Candidates that lead to the same choice are one program.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.bench import attention, machine, timing
from experiments.bench.case import OURS, Case
from experiments.errors import UserError
from mhajax.kernels import rules
from mhajax.kernels.rules import BUILT_IN, Rules

FILE = "mhajax-rules.toml"
_BETTER = 0.95  # of the time that the built-in number takes; less is noise
_FORWARD, _BOTH = (False,), (False, True)
_FULL, _CAUSAL = (False,), (True,)


class Question(NamedTuple):
    """One number of the rules, what it may be, and the cases by which that is decided."""

    name: str
    candidates: tuple[int, ...]
    cases: tuple[Case, ...]


class Answer(NamedTuple):
    """A question, the time of each candidate relative to the one before, and what is taken."""

    question: Question
    ratios: dict[int, float]
    taken: int


def _cases(batch: int, lengths: Sequence[int], causal: Sequence[bool], backward: Sequence[bool]) -> tuple[Case, ...]:
    shapes = [(max(1, batch * lengths[0] // t), t, t, attention.HEADS, attention.WIDTH) for t in lengths]
    return tuple(c for c in attention.of_shapes("tune", shapes) if c.causal in causal and c.backward in backward)


def questions() -> tuple[Question, ...]:
    """Every number, in the order in which they are asked."""
    short = _cases(1, (32,), _CAUSAL, _BOTH) + _cases(1, (64,), _CAUSAL, _BOTH)
    whole = _cases(8, (256, 512, 1024), (False, True), _FORWARD)
    return (
        Question("few_logits", (2**12, 2**14, 2**16), short),
        Question("tile_tokens", (256, 512, 1024), _cases(4, (512, 2048), _FULL, (True,))),
        Question("masked_tile_tokens", (128, 256, 512), _cases(4, (512, 2048), _CAUSAL, (True,))),
        Question("tile_logits", (2**17, 2**18, 2**19, 2**20), _cases(8, (128, 512), (False, True), (True,))),
        Question("keys_at_once", (0, 256, 512, 1024), whole),
    )


def command(arguments: list[str]) -> int:
    """`python -m experiments bench tune`; the exit status."""
    import jax

    parser = argparse.ArgumentParser(prog="python -m experiments bench tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("file", nargs="?", default=FILE, help=f"where to write what was found (default: {FILE})")
    parser.add_argument("--seconds", type=float, default=3.0, help="to spend on the times of a case (default: 3)")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        raise UserError(f"bench tune --seconds must be above 0, got {options.seconds}.")
    if jax.default_backend() != "cpu":
        raise UserError(f"bench tune: these numbers are for CPUs, this is {jax.default_backend()}; nothing to measure.")
    new = not Path(options.file).exists()
    try:
        open(options.file, "a", encoding="utf-8").close()  # before minutes are spent
        if new:  # nothing stays of it if these minutes are interrupted
            Path(options.file).unlink()
    except OSError as error:
        raise UserError(f"bench tune: {options.file} cannot be written: {error.strerror}.") from None
    console = Console()
    console.print(machine.describe(kept=False), highlight=False, soft_wrap=True)
    found, answers = BUILT_IN, []
    for question in questions():
        console.print(f"[dim]{question.name} …[/dim]", highlight=False)
        answers.append(answer(question, found, options.seconds))
        found = dataclasses.replace(found, **{question.name: answers[-1].taken})
    console.print(_table(answers))
    rules.write(options.file, found, machine.processor())
    changed = [a.question.name for a in answers if a.taken != getattr(BUILT_IN, a.question.name)]
    what = f"other than built in: {', '.join(changed)}" if changed else "nothing here is better than what is built in"
    console.print(f"{what}; export {rules.VARIABLE}={options.file} to use it", highlight=False, soft_wrap=True)
    return 0


def answer(question: Question, before: Rules, seconds: float, prepare: Callable[[Case], Any] | None = None) -> Answer:
    """Measure the candidates of a question.

    Args:
      question: what is asked.
      before: the rules found so far; ratios are relative to them.
      seconds: to spend on the times of each case.
      prepare: case → implementation, ours if None.
    """
    prepare = attention.BUILDERS[OURS] if prepare is None else prepare
    present = getattr(before, question.name)
    candidates = sorted({*question.candidates, present})
    ratios: dict[int, list[float]] = {candidate: [] for candidate in candidates}
    for case in question.cases:
        choices: dict[int, str] = {}
        for candidate in candidates:
            with rules.using(dataclasses.replace(before, **{question.name: candidate})):
                choices[candidate] = attention.choice(case)
        programs = {}
        for candidate, choice in choices.items():
            if choice not in programs:
                with rules.using(dataclasses.replace(before, **{question.name: candidate})):
                    programs[choice] = prepare(case).call
        times, _ = timing.interleave(programs, seconds)
        for candidate, choice in choices.items():
            ratios[candidate].append(timing.ratio(times[choice], times[choices[present]]))
    means = {candidate: float(np.exp(np.mean(np.log(values)))) for candidate, values in ratios.items()}
    best = min(means, key=lambda candidate: means[candidate])
    return Answer(question, means, best if means[best] < _BETTER else present)


def _table(answers: Sequence[Answer]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("number", no_wrap=True)
    shown.add_column("built in", justify="right")
    shown.add_column("candidates: time relative to what it was")
    shown.add_column("taken", justify="right")
    for question, ratios, taken in answers:
        listed = " · ".join(f"{candidate:,}: {ratio:.2f}" for candidate, ratio in ratios.items())
        shown.add_row(question.name, f"{getattr(BUILT_IN, question.name):,}", listed, f"[bold]{taken:,}[/bold]")
    return shown
