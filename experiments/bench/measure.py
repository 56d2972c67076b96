"""From implementations of a case to rows: prepare, compare with ours, and only then take times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from experiments.bench import machine, timing
from experiments.bench.case import OURS, Build, Cannot, Case, Ready, Row

TOLERANCE = 2e-4


def measure(case: Case, builders: Mapping[str, Build], seconds: float) -> list[Row]:
    """A row for every implementation, in the order given.

    One that cannot do the case, or whose package is not there, gets a row with the reason; one whose result is not ours
    gets a row that says WRONG. Neither is timed.

    Args:
      case: what to compute.
      builders: by name; `ours` is one of them.
      seconds: to spend on taking times.
    """
    notes, ready = dict[str, str](), dict[str, Ready]()
    ours = builders[OURS](case)
    expected = ours.answer()
    for name, build in builders.items():
        try:
            candidate = ours if name == OURS else build(case)
            wrong = "" if name == OURS else difference(candidate.answer(), expected)
        except ImportError as error:
            notes[name] = f"not installed: {error}"
        except Cannot as error:
            notes[name] = str(error)
        except Exception as error:  # a peer that breaks is a finding, not the end of the run
            notes[name] = f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            if wrong:
                notes[name] = f"WRONG: {wrong}"
            else:
                ready[name] = candidate
    product, operations = machine.matmul()
    calls = {name: candidate.call for name, candidate in ready.items()}
    times, of_product = timing.interleave(calls, seconds, yardstick=product)
    best = operations / float(np.median(of_product))
    rows = []
    for name in builders:
        if name in notes:
            rows.append(Row(case=case, implementation=name, note=notes[name]))
            continue
        seen = timing.summary(times[name])
        rows.append(
            Row(
                case=case,
                implementation=name,
                milliseconds=seen.median * 1e3,
                relative_to_ours=timing.ratio(times[name], times[OURS]),
                spread=seen.spread * 1e3,
                matmul_fraction=case.flops / seen.median / best,
                temporary=ready[name].temporary,
                rounds=seen.rounds,
            )
        )
    return rows


def difference(arrays: Iterable[Any], expected: Iterable[Any]) -> str:
    """What is wrong with an answer, in words; empty if nothing is.

    The error of an array is the largest one of its elements, relative to the largest element expected.
    """
    for number, (got, want) in enumerate(zip(arrays, expected, strict=True)):
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            return f"result {number} has shape {got.shape}, ours {want.shape}"
        error = float(np.max(np.abs(got - want)) / max(float(np.max(np.abs(want))), 1e-30))
        if not error <= TOLERANCE:  # NaN too
            return f"result {number} differs from ours by {error:.1e} of its largest element"
    return ""


def compiled(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> tuple[Callable, int | None]:
    """A jitted function for these arguments, and the bytes of temporary memory that it plans.

    Raises:
      Cannot: if that is more than the machine has left.
    """
    import jax

    jitted = jax.jit(function, donate_argnums=donate)
    program = jitted.lower(*arguments).compile()
    plan = program.memory_analysis()
    temporary = None if plan is None else int(plan.temp_size_in_bytes)
    if temporary is not None and temporary > 0.8 * machine.available():
        raise Cannot(f"needs {temporary / 2**30:.1f} GiB of temporary memory, more than the machine has left")
    return program, temporary


def jax_ready(function: Callable, arguments: tuple, answer: Callable[[Any], list[Any]]) -> Ready:
    """An implementation in JAX: `function` of these arguments, `answer` makes its output comparable."""
    import jax

    program, temporary = compiled(function, *arguments)
    call = lambda: jax.block_until_ready(program(*arguments))  # noqa: E731
    return Ready(call, lambda: answer(call()), temporary)
