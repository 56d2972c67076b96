"""The command line: `python -m experiments CONFIG [key=value …]`, and its siblings."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from experiments import extras, host, toml
from experiments.errors import UserError

_DESCRIPTION = """\
Run an experiment from a config file, or go on with one from the folder of an earlier run.

  python -m experiments configs/grammar.toml
  python -m experiments configs/grammar.toml --quick
  python -m experiments configs/grammar.toml training.steps=500 model.num_heads=8
  python -m experiments runs/grammar-1a2b3c4d

Other commands:
  python -m experiments heads RUN                         measure what its heads do: RUN/report.html
  python -m experiments heads MODEL --text FILE           the same of a pretrained model: a folder, a GGUF file
  python -m experiments translate RUN < sentences.txt     translate lines from standard input
  python -m experiments sample RUN [--prompt TEXT]        let a language model write
  python -m experiments claims                            run every study; what they say, in one table
  python -m experiments keys [KIND]                       what may stand in a config, and what it means
  python -m experiments fetch NAME …                      download public data and pretrained models
  python -m experiments bench attention                   time it against the other libraries
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for a mistake in what was asked, 1 for a run that failed, 130 if stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Compiler remarks about the host are noise; a person who wants them sets the variable.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command, rest = _run, arguments
    if arguments and arguments[0] in _COMMANDS:
        command, rest = _COMMANDS[arguments[0]], arguments[1:]
    try:
        return command(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        usage="python -m experiments CONFIG [key=value …] [--quick] [--runs FOLDER] [--json] [--tensorboard]\n"
        "       python -m experiments COMMAND …",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the folder of a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="TOML lines that override the config")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="does it run from end to end? A small model on little data, in about half a minute; its folder begins "
        "with quick- and its numbers mean nothing",
    )
    parser.add_argument(
        "--runs", metavar="FOLDER", default="runs", help="where the folders of runs are made (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, as the last line")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files into the run folder")
    options = parser.parse_intermixed_args(arguments)
    _no_such_command(options.config)
    extras.need("experiments")
    if options.tensorboard:
        extras.need("tensorboard")

    from rich.console import Console

    host.keep_memory()  # before jax allocates anything

    from experiments import run
    from mhajax import training

    if options.quick:  # compiling is what takes its time
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
    console = Console(stderr=options.json)
    config, folder = run.load(options.config, options.overrides, options.runs, small=options.quick)
    console.print(f"[dim]run folder[/dim] {folder}", highlight=False, soft_wrap=True)
    try:
        result = run.run(config, folder, console, tensorboard=options.tensorboard)
    except training.Interrupted as stop:
        print(f"{stop} The same command goes on from there.", file=sys.stderr)
        return 130
    except training.NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


def _no_such_command(word: str) -> None:
    """Refuse a word that is neither a file nor a command, if a command is near: `heds`."""
    from pathlib import Path

    near = toml.nearest(word, _COMMANDS)
    if near and not Path(word).exists():
        raise UserError(f"{word}: there is no such file, and no such command; did you mean {near}?")


def _translate(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments translate", description="Translate lines from standard input to standard output."
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--beams", type=int, help="other than the config's; 1 is greedy")
    options = parser.parse_args(arguments)
    if options.beams is not None and options.beams < 1:
        raise UserError(f"--beams must be at least 1, got {options.beams}.")

    extras.need("experiments")
    host.keep_memory()

    from rich.console import Console

    from experiments import writing

    if sys.stdin.isatty():
        print("one sentence a line; end with Ctrl-D", file=sys.stderr)
    lines = [line.rstrip("\r\n") for line in sys.stdin]
    for line in writing.translate(options.run, lines, beams=options.beams, console=Console(stderr=True)):
        print(line)
    return 0


def _sample(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments sample", description="Let the language model of a run write."
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--prompt", help="what it goes on from")
    parser.add_argument("--tokens", type=int, help="how much it writes")
    parser.add_argument("--temperature", type=float, help="below 1: safer, above: wilder, 0: greedy")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (default: 0)")
    options = parser.parse_args(arguments)
    extras.need("experiments")

    from rich.console import Console

    from experiments import writing

    given = {name: getattr(options, name) for name in ("prompt", "tokens", "temperature")}
    changes = {name: value for name, value in given.items() if value is not None}
    print(writing.sample(options.run, options.seed, console=Console(stderr=True), **changes))
    return 0


def _heads(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments heads",
        description="Measure what the heads of a run do, with intervals and baselines; writes RUN/report.html. With "
        "--text, of a pretrained model: a folder with config.json and model.safetensors, a GGUF file, or the name of "
        "one that was fetched.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run, or a pretrained model")
    parser.add_argument("--sentences", type=int, help="how many held-out sentences (windows of a text) are measured")
    parser.add_argument("--shown", type=int, help="how many of them the page shows with every head")
    parser.add_argument("--text", metavar="FILE", help="what a pretrained model reads")
    parser.add_argument("--length", type=int, help="tokens of a window of the text (default: 48)")
    parser.add_argument(
        "--runs", metavar="FOLDER", default="runs", help="where the folder of a pretrained model's report is made"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    options = parser.parse_args(arguments)
    extras.need("experiments")

    from rich.console import Console

    host.keep_memory()

    from experiments import run

    given = {name: getattr(options, name) for name in ("sentences", "shown")}
    changes = {name: value for name, value in given.items() if value is not None}
    console = Console(stderr=options.json)
    if options.text is None:
        if options.length is not None:
            raise UserError("heads: --length is for a text; the windows of a run are those of its config.")
        numbers = run.heads(options.run, console, **changes)
    else:
        extras.need("pretrained")
        from experiments.heads import pretrained

        sizes = {"windows": options.sentences or 8, "length": options.length or 48, "shown": options.shown or 4}
        for name, value in sizes.items():
            if value < (4 if name == "windows" else 2 if name == "length" else 1):
                raise UserError(f"heads: {name} is too small, got {value}.")
        numbers = pretrained.examine(options.run, options.text, options.runs, console, **sizes)
    if options.json:
        print(json.dumps(numbers, ensure_ascii=False))
    return 0


def _claims(arguments: list[str]) -> int:
    extras.need("experiments")
    host.keep_memory()

    from experiments import claims
    from mhajax import training

    try:
        return claims.command(arguments)
    except training.Interrupted as stop:
        print(f"{stop} The same command goes on from there.", file=sys.stderr)
        return 130


def _keys(arguments: list[str]) -> int:
    extras.need("experiments")
    from experiments import keys

    return keys.command(arguments)


def _fetch(arguments: list[str]) -> int:
    from experiments.data import fetch

    return fetch.command(arguments)


def _bench(arguments: list[str]) -> int:
    from experiments import bench

    return bench.command(arguments)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "translate": _translate,
    "sample": _sample,
    "heads": _heads,
    "claims": _claims,
    "keys": _keys,
    "fetch": _fetch,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
