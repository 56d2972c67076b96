"""The run folder, and the way from a config to a result in it. This is the one place where results are written.

runs/grammar-1a2b3c4d/
  config.toml         every value, defaults spelled out
  environment.json    versions of packages, hashes of the data, the machine
  metrics.jsonl       a line a batch (loss, gradient norm, …) and a line an evaluation
  checkpoints/        latest state, best parameters
  vocabulary.json     the tokenizer
  figures/            pictures, each as SVG, PDF and PNG with its CSV
  report.html         what the heads do (if it was asked for); heads.json has its numbers
  result.json         written last: a run with a result is finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments import config as configs
from experiments import finished, language_modelling, quick, schema, toml, translation, work
from experiments.data.vocabulary import Vocabulary
from experiments.errors import ConfigError, DataError, UserError
from experiments.progress import Board, Display, Times, write
from experiments.task import Task, seeds_of
from mhajax import training

CONFIG, ENVIRONMENT, METRICS = "config.toml", "environment.json", "metrics.jsonl"
RESULT = "result.json"
HEADS, REPORT = "heads.json", "report.html"
_PACKAGES = ("mhajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "sacrebleu")


def load(path: str, overrides: list[str], runs: str, *, small: bool = False) -> tuple[configs.Experiment, Path]:
    """The config that a person named, with overrides, and the folder of its run.

    Args:
      path: a config file, or the folder of an earlier run.
      overrides: TOML lines such as `model.num_heads=8`.
      runs: where run folders are made. A run's folder is named after its config file and a hash of every value in it,
        so the same command always finds the same folder.
      small: a quick look at the config, see `experiments.quick`; the name of its folder begins with "quick-".
    """
    folder = Path(path)
    if small and (folder / CONFIG).is_file():
        raise UserError(f"--quick looks at a config file; {folder} is a run, which is what it is.")
    if (folder / CONFIG).is_file():
        return configs.read(folder / CONFIG, overrides), folder
    if folder.is_dir():
        raise ConfigError(f"{folder}: this folder has no {CONFIG}, so it is no run; give a config file or a run.")
    config = configs.read(folder, overrides)
    config = quick.shrink(config) if small else config
    digest = hashlib.sha256(schema.to_toml(config).encode()).hexdigest()[:8]
    return config, Path(runs) / f"{'quick-' if config.quick else ''}{folder.stem}-{digest}"


def load_run(path: str | Path) -> tuple[configs.Experiment, Path]:
    """The config and the folder of an earlier run."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: {_not_a_run(folder)}")
    return configs.read(folder / CONFIG), folder


def _not_a_run(folder: Path) -> str:
    if folder.is_dir():
        return f"this folder has no {CONFIG}, so it is not the folder of a run."
    if folder.exists():
        return "this is a file; give the folder of a run, which a run prints as its first line."
    where = folder.absolute().parent
    runs = [file.parent.name for file in where.glob(f"*/{CONFIG}")] if where.is_dir() else []
    near = toml.nearest(folder.name, runs)
    return f"there is no such folder in {where}" + (f"; did you mean {folder.with_name(near)}?" if near else ".")


def prepare(config: configs.Experiment, folder: Path) -> Task:
    """The experiment that a config describes; this is where a config becomes objects."""
    module = translation if isinstance(config, configs.Translation) else language_modelling
    return module.prepare(config, folder)  # pyright: ignore[reportArgumentType]


def run(config: configs.Experiment, folder: Path, console: Console, *, tensorboard: bool = False) -> dict[str, Any]:
    """Train (or go on training), evaluate, report, and write the result.

    A finished run is not trained again: its best parameters are evaluated and reported anew.

    Args:
      config: from `load`.
      folder: of the run; made if it is not there.
      console: where a person reads.
      tensorboard: also write the metrics for TensorBoard, to `folder`/tensorboard.

    Returns:
      What stands in result.json.
    """
    with work.shown_on(console):
        return _run(config, folder, console, tensorboard)


def _run(config: configs.Experiment, folder: Path, console: Console, tensorboard: bool) -> dict[str, Any]:
    times = Times(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _same_vocabulary(folder, config)
    if config.quick:
        console.print("[bold]a quick look[/bold]: a small model on little data; its numbers mean nothing")
    with work.piece("reading the data, making the vocabulary", 1, "step", note=""):
        task = prepare(config, folder)
    _same_data(folder, task)
    state, checkpoints = _latest(config.training, task, folder)
    write(folder / CONFIG, schema.to_toml(config))  # not before it is known to fit what the folder holds
    write(folder / ENVIRONMENT, json.dumps(_environment(task), indent=2) + "\n")
    for note in task.notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)
    finished = (folder / RESULT).is_file() and int(state.step) >= config.training.steps
    with Board(folder if tensorboard else None) as board:
        state = _train(config.training, task, state, checkpoints, folder, console, times, board)
    console.print()
    best = checkpoints.best_score()
    params = state.evaluated if best is None else checkpoints.best(state.evaluated)
    checkpoints.close()
    # What comes from a checkpoint is committed to its device; without that, nothing is compiled a second time.
    params = jax.device_put(jax.device_get(params))
    result = {"kind": config.kind, **({"quick": True} if config.quick else {}), **task.report(params, folder, console)}
    result |= {
        "parameters": sum(a.size for a in jax.tree.leaves(params)) // config.training.seeds,
        "seeds": config.training.seeds,
        "steps": config.training.steps,
        "best_step": config.training.steps if best is None else int(best["step"]),
        **(_timing_of(folder) if finished else times.summary()),
    }
    if not config.quick:
        _curve(folder, config)
    if config.heads.report:
        _report_heads(config, folder, task, params, console)
    write(folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    console.print(
        f"{result['parameters']:,} parameters, {result['seconds']:.0f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s in training · everything is in {folder}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return result


def translate(
    path: str | Path, sentences: Sequence[str], *, beams: int | None = None, console: Console | None = None
) -> list[str]:
    """Translations of sentences by the best parameters (of the first seed) of an earlier run; empty lines stay empty.

    Args:
      path: the folder of the run.
      sentences: one sentence each.
      beams: other than the config's; 1 is greedy.
      console: where a person is told of words that the run does not know, and how far it is; None for nowhere.
    """
    config, folder = load_run(path)
    if not isinstance(config, configs.Translation):
        raise UserError(f"{folder}: this run is a {config.kind}, not a translation; use: sample {folder}")
    model, words, params = finished.parameters(config, folder)
    wanted = [sentence for sentence in sentences if sentence.strip()]
    translator = translation.Translator(config, model, words)
    for number, sentence in enumerate(sentences, start=1):
        _warn(console, f"line {number}", words.unknown(sentence), words)
    with contextlib.nullcontext() if console is None else work.shown_on(console):
        outputs = iter(translator(seeds_of(params)[0], wanted, beams=beams) if wanted else [])
    return [next(outputs) if sentence.strip() else "" for sentence in sentences]


def _warn(console: Console | None, where: str, unknown: list[str], words: Vocabulary) -> None:
    """Tell of what a vocabulary does not know, which a model reads as one and the same unknown token."""
    if console is not None and unknown:
        listed = ", ".join(map(repr, unknown[:8])) + (" …" if len(unknown) > 8 else "")
        of = f"the {words.size:,} {words.unit}s that this run knows"
        console.print(f"warning: {where}: {listed} not among {of}", style="yellow", highlight=False, markup=False)


def sample(path: str | Path, seed: int = 0, *, console: Console | None = None, **changes: Any) -> str:
    """Text by the best parameters (of the first seed) of an earlier run.

    Args:
      path: the folder of the run.
      seed: another seed, another text.
      console: where a person is told of characters or words that the run does not know; None for nowhere.
      **changes: to the config's [sampling].
    """
    config, folder = load_run(path)
    if not isinstance(config, configs.LanguageModelling):
        raise UserError(f"{folder}: this run is a {config.kind}, not a language model; use: translate {folder}")
    try:
        sampling = dataclasses.replace(config.sampling, **changes)
    except ValueError as error:
        raise UserError(f"sample: {error}") from None
    model, words, params = finished.parameters(config, folder)
    if not words.encode(sampling.prompt):
        raise UserError(f"sample: the prompt {sampling.prompt!r} has no token in this run's vocabulary; give another.")
    _warn(console, "the prompt", words.unknown(sampling.prompt), words)
    with contextlib.nullcontext() if console is None else work.shown_on(console):
        return language_modelling.write_sample(model, words, seeds_of(params)[0], sampling, seed)


def heads(path: str | Path, console: Console, **changes: Any) -> dict[str, Any]:
    """Measure the heads of an earlier run: writes report.html, heads.json and figures to its folder.

    Args:
      path: the folder of the run.
      console: where a person reads.
      **changes: to the config's [heads].

    Returns:
      What stands in heads.json.
    """
    config, folder = load_run(path)
    try:
        config = dataclasses.replace(config, heads=dataclasses.replace(config.heads, **changes))
    except ValueError as error:
        raise UserError(f"heads: {error}") from None
    task, params = trained(config, folder)
    return _report_heads(config, folder, task, params, console)


def _report_heads(
    config: configs.Experiment, folder: Path, task: Task, params: Any, console: Console
) -> dict[str, Any]:
    from experiments import heads
    from mhajax import figures

    settings = config.heads
    found = heads.examine(
        task, params, config.training.seed, folder.name,
        sentences=settings.sentences, shown=settings.shown, console=console,
    )  # fmt: skip
    for name, drawing in found.drawings.items():
        figures.save(drawing, folder / "figures" / "heads" / name)
    write(folder / HEADS, json.dumps(found.numbers, indent=1, ensure_ascii=False) + "\n")
    found.page.save(folder / REPORT)
    console.print(f"the report about the heads is {folder / REPORT}, its numbers are {folder / HEADS}", soft_wrap=True)
    return found.numbers


def trained(config: configs.Experiment, folder: Path) -> tuple[Task, Any]:
    """The experiment of a run folder and its best parameters [seeds, ...].

    Raises:
      UserError: if nothing was trained in this folder yet.
    """
    task = prepare(config, folder)
    checkpoints = training.Checkpoints(folder / "checkpoints")
    like = _new_state(config.training, task)
    if checkpoints.latest_step() is None:
        raise UserError(f"{folder}: nothing is trained here yet; python -m experiments {folder} trains it.")
    params = checkpoints.restore(like).evaluated if checkpoints.best_score() is None else checkpoints.best(
        like.evaluated
    )  # fmt: skip
    checkpoints.close()
    return task, params


def _timing_of(folder: Path) -> dict[str, float]:
    """How long a finished run took; looking at it again does not change that."""
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return {name: result[name] for name in ("seconds", "tokens_per_second")}


def _new_state(config: training.Config, task: Task) -> training.State:
    return training.init(task.init_params, training.optimizer(config), config)


def _latest(config: training.Config, task: Task, folder: Path) -> tuple[training.State, training.Checkpoints]:
    """The latest state of the run, or a new one."""
    state = _new_state(config, task)
    checkpoints = training.Checkpoints(folder / "checkpoints")
    if checkpoints.latest_step() is not None:
        try:
            state = checkpoints.restore(state)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return state, checkpoints


def _train(
    config: training.Config, task: Task, state: training.State, checkpoints: training.Checkpoints,
    folder: Path, console: Console, times: Times, board: Board,
) -> training.State:  # fmt: skip
    """Train to the end, from wherever the state is."""
    done = int(state.step)
    _forget_after(folder / METRICS, done)
    times.start(done)
    if done >= config.steps:
        console.print(f"[dim]already trained: {done} batches[/dim]", highlight=False)
        return state
    (folder / RESULT).unlink(missing_ok=True)  # of a shorter training; a run with a result is finished
    if done:
        console.print(f"[dim]going on after batch {done} of {config.steps}[/dim]", highlight=False)
    step = training.make_step(task.loss, training.optimizer(config), config)
    with (
        open(folder / METRICS, "a", encoding="utf-8") as metrics,
        work.shown_on(console) as watch,
        Display(watch, config, task, done) as display,
    ):
        shapes: set[Any] = set()

        def timed(state: training.State, batch: Any) -> Any:
            """A step; the first of its shape is compiled, which is not the time of training."""
            shape = tuple(np.shape(array) for array in jax.tree.leaves(batch))
            if shape in shapes:
                return step(state, batch)
            shapes.add(shape)
            jax.block_until_ready(state)  # the steps before it are training
            display.compiling()
            with times.paused():
                return step(state, batch)

        def record(lines: list[dict[str, Any]]) -> None:
            metrics.writelines(json.dumps(line) + "\n" for line in lines)
            metrics.flush()
            os.fsync(metrics.fileno())
            times.save(lines[-1]["step"])
            display.show(lines, times)
            board.show(lines)

        def evaluate(params: Any) -> dict[str, list[float]]:
            with times.paused():
                return task.evaluate(params)

        def counted(seen: int) -> Iterator[Any]:
            for batch in task.batches(seen):
                times.tokens += task.tokens(batch)
                yield batch

        return training.fit(
            state, timed, counted, config, evaluate=evaluate, checkpoints=checkpoints, record=record
        )  # fmt: skip


def _curve(folder: Path, config: configs.Experiment) -> None:
    """The figure of the training loss and of every evaluation."""
    from mhajax import figures

    lines = list(_lines(folder / METRICS))
    training_lines = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation_loss" in line]
    every = max(len(training_lines) // 200, 1)
    chunks = [training_lines[i : i + every] for i in range(0, len(training_lines), every)]
    series = {"training": ([chunk[-1]["step"] for chunk in chunks], [_mean(chunk, "loss") for chunk in chunks])}
    if evaluations:
        series["validation"] = (
            [line["step"] for line in evaluations], [float(np.mean(line["validation_loss"])) for line in evaluations]
        )  # fmt: skip
    drawing = figures.training_curve(series, title=f"{config.kind.replace('_', ' ')}: loss", ylabel="nats per token")
    figures.save(drawing, folder / "figures" / "training")


def _mean(lines: Iterable[dict[str, Any]], name: str) -> float:
    return float(np.mean([line[name] for line in lines]))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a last line cut off by a kill is not one."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def _forget_after(path: Path, step: int) -> None:
    """Remove the lines of batches that the resumed run will see again."""
    kept = [json.dumps(line) + "\n" for line in _lines(path) if line["step"] <= step]
    write(path, "".join(kept))


def _same_vocabulary(folder: Path, config: configs.Experiment) -> None:
    """Refuse to go on with a vocabulary other than the run's own, which its parameters belong to."""
    if (folder / CONFIG).is_file():
        own = configs.read(folder / CONFIG).vocabulary
        if own != config.vocabulary:
            raise ConfigError(
                f"[vocabulary] of a run cannot change: {folder} was made with kind={own.kind!r}, size={own.size}, got "
                f"kind={config.vocabulary.kind!r}, size={config.vocabulary.size}; start a new run from the config file."
            )


def _same_data(folder: Path, task: Task) -> None:
    """Refuse to go on with data other than those the run began with."""
    path = folder / ENVIRONMENT
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))["data_sha256"]
        changed = sorted(name for name in before | task.hashes if before.get(name) != task.hashes.get(name))
        if changed:
            raise DataError(
                f"{folder}: this run began with other data: {', '.join(changed)} changed since. Bring the old data "
                "back, or start a new run with --runs FOLDER."
            )


def _environment(task: Task) -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "packages": versions,
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "data_sha256": task.hashes,
    }
