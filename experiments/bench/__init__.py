"""Benchmarks of attention against the other libraries, side by side in one run: `python -m experiments bench`."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Sequence
from typing import Any

from experiments import host
from experiments.bench.case import OURS, Case, Settings
from experiments.errors import UserError

_DESCRIPTION = """\
Time attention, against the other libraries that are installed, side by side in one run.

  attention   softmax(q kᵀ) v for given q, k, v, T from 128 to 8192
  odd         the same for lengths and widths that are not round numbers
  layer       with the projections
  decode      one token with a cache
  generate    a whole text by a small language model
  heads       all removals of one head, at once and in a loop; half of the heads; capture of a head's weights
  step        a training step of a small language model; peak memory of each process
  start       time to import, and to compile
  tune        what "auto" should decide by on this machine (2 to 3 minutes); has options of its own

Every result is compared with ours before it is timed. Implementations take turns; "× ours" is the median of the ratios
within a round, above 1 is slower than ours.
"""

CASES = ("attention", "odd", "layer", "decode", "generate", "heads", "step", "start")


def command(arguments: list[str]) -> int:
    """`python -m experiments bench`; the exit status."""
    if arguments[:1] == ["tune"]:
        from experiments.bench import tune

        return tune.command(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.case == "tune":
        raise UserError("bench tune has options of its own: python -m experiments bench tune [FILE] [--seconds S].")
    benchmark = importlib.import_module(f"experiments.bench.{options.case}")
    names = _names(options.only, list(benchmark.BUILDERS))
    cases = _cases(options, benchmark)
    kept = host.keep_memory() if options.keep_memory else False  # before jax allocates anything

    from rich.console import Console

    from experiments.bench import machine, report

    Console(stderr=options.json).print(machine.describe(kept), highlight=False, soft_wrap=True)
    console = Console()
    if not options.json:
        console.print(report.LEGEND, style="dim", highlight=False)
        console.print()
    for case in cases:
        rows = benchmark.rows(case, names, Settings(options.seconds, options.keep_memory))
        if options.json:
            for line in report.lines(rows):
                print(line, flush=True)
        else:
            report.show(console, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments bench",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", choices=(*CASES, "tune"), metavar="CASE", help=", ".join((*CASES, "tune")))
    parser.add_argument("--only", nargs="+", metavar="PEER", help="these implementations; ours is always there")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="these lengths (of the cache, for decode)")
    parser.add_argument("--pass", dest="passes", choices=("forward", "backward"), help="only this one of both passes")
    parser.add_argument("--causal", choices=("yes", "no"), help="only causal, or only full attention")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="to spend on a table; at least 3 rounds (default: 10)"
    )
    parser.add_argument("--keep-memory", action="store_true", help="let the C library keep freed memory, as runs do")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    return parser


def _names(only: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The implementations asked for, ours first."""
    for name in only or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise UserError(f"bench --only: PEER must be one of {', '.join(known)}, got {name!r}{meant}")
    return [name for name in known if only is None or name in only or name == OURS]


def _cases(options: argparse.Namespace, benchmark: Any) -> list[Case]:
    if not options.seconds > 0:
        raise UserError(f"bench --seconds must be above 0, got {options.seconds}.")
    lengths = options.lengths or benchmark.LENGTHS
    if min(lengths) < 1:
        raise UserError(f"bench --lengths must be at least 1, got {min(lengths)}.")
    cases = [
        case
        for case in benchmark.cases(lengths)
        if (options.passes is None or case.backward == (options.passes == "backward"))
        and (options.causal is None or case.causal == (options.causal == "yes"))
    ]
    if not cases:
        known = ", ".join(map(str, benchmark.LENGTHS))
        raise UserError(f"bench {options.case}: nothing is left to measure; its lengths are {known}.")
    return cases
