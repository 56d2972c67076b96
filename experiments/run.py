"""The way from a config to a result in a run folder. This is the one place where results are written."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments import config as configs
from experiments import folder as folders
from experiments import language_modelling, schema, translation
from experiments.errors import ConfigError, DataError, UserError
from experiments.folder import CHECKPOINTS, CONFIG, ENVIRONMENT, HEADS, METRICS, ORIGIN, REPORT, RESULT, write
from experiments.progress import Board, Display, Times
from experiments.task import Task, seeds_of
from mhajax import training
from mhajax.checkpoints import Checkpoints, Damaged

_PACKAGES = ("mhajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "sacrebleu")


def load(path: str, overrides: list[str], runs: str) -> tuple[configs.Experiment, Path]:
    """The config that a person named, with overrides, and the folder of its run.

    Args:
      path: a config file, or the folder of an earlier run.
      overrides: TOML lines such as `model.num_heads=8`.
      runs: where run folders are made. A run's folder is named after its config file and a hash of every value in it,
        so the same command always finds the same folder. An earlier run continued with other values has a folder of
        its own beside that run's, which stays as it is.
    """
    folder = Path(path)
    if _is_run(folder):
        own = load_run(folder)[0]
        config = configs.read(folder / CONFIG, overrides)
        return config, folder if config == own else folders.continued(folder, schema.to_toml(config))
    if _is_folder(folder):
        raise ConfigError(f"{folder}: expected a config file or the folder of a run, got a folder without {CONFIG}.")
    config = configs.read(folder, overrides)
    return config, Path(runs) / folders.name(folder.stem, schema.to_toml(config))


def load_run(path: str | Path) -> tuple[configs.Experiment, Path]:
    """The config and the folder of an earlier run."""
    folder = Path(path)
    if not _is_run(folder):
        raise UserError(f"{folder}: expected the folder of a run, got {'one' if _is_folder(folder) else 'no folder'} "
                        f"without {CONFIG}.")  # fmt: skip
    folders.check(folder)
    return configs.read(folder / CONFIG), folder


def _is_run(folder: Path) -> bool:
    return _is_folder(folder) and (folder / CONFIG).is_file()


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


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
    with folders.opened(folder):
        return _run(config, folder, console, tensorboard)


def _run(config: configs.Experiment, folder: Path, console: Console, tensorboard: bool) -> dict[str, Any]:
    times = Times(folder)
    origin = _begin(config, folder)
    task = prepare(config, folder)
    _same_data(folder, task)
    state, checkpoints = _latest(config.training, task, folder)
    if origin is not None and not (folder / CONFIG).is_file():
        write(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")
    if not (folder / CONFIG).is_file():  # not before it is known to fit what the folder holds
        write(folder / CONFIG, schema.to_toml(config))
    write(folder / ENVIRONMENT, json.dumps(_environment(task, folder), indent=2) + "\n")
    for note in task.notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)
    finished = (folder / RESULT).is_file() and int(state.step) >= config.training.steps
    with Board(folder if tensorboard else None) as board:
        state = _train(config.training, task, state, checkpoints, folder, console, times, board)
    console.print()
    params, best_step = _chosen(checkpoints, state)
    result = {"kind": config.kind, **task.report(params, folder, console)}
    result |= {
        "parameters": sum(a.size for a in jax.tree.leaves(params)) // config.training.seeds,
        "seeds": config.training.seeds,
        "steps": config.training.steps,
        "best_step": best_step,
        **({} if origin is None else {"continued_from": origin}),
        **((_timing_of(folder) if finished else None) or times.summary()),
    }
    _curve(folder, config, console)
    if config.heads.report:
        _report_heads(config, folder, task, params, console)
    write(folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    console.print(
        f"{result['parameters']:,} parameters, {result['seconds']:.0f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s in training · everything is in {folder}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return result


def _begin(config: configs.Experiment, folder: Path) -> dict[str, Any] | None:
    """What must be so before anything is done in a folder; where the run goes on from, if it is a continued one."""
    if (folder / CONFIG).is_file():
        if load_run(folder)[0] != config:
            raise ConfigError(
                f"{folder}: this is the run of another config. To go on from it with other values: python -m "
                f"experiments {folder} key=value"
            )
        return folders.read_json(folder / ORIGIN, "run", "step") if (folder / ORIGIN).is_file() else None
    source = folders.source_of(folder)
    if source is None:
        return None
    own, _ = load_run(source)
    if own.vocabulary != config.vocabulary:
        raise ConfigError(
            f"[vocabulary] of a run cannot change: {source} was made with kind={own.vocabulary.kind!r}, "
            f"size={own.vocabulary.size}, got kind={config.vocabulary.kind!r}, size={config.vocabulary.size}; start a "
            "new run from the config file."
        )
    folders.copy(source, folder)
    step = _asked(Checkpoints(folder / CHECKPOINTS).latest_step)
    if step is None:
        raise ConfigError(f"{source}: nothing is trained here yet, so there is nothing to go on from with other "
                          "values; start from the config file with them.")  # fmt: skip
    if step > config.training.steps:
        raise ConfigError(f"training.steps={config.training.steps} is less than the {step} batches that {source} has "
                          "seen; start a shorter run from the config file.")  # fmt: skip
    before = {"origin": folders.read_json(source / ORIGIN)} if (source / ORIGIN).is_file() else {}
    return {"run": source.name, "step": step, "config_sha256": folders.digest(schema.to_toml(own)), **before}


def _asked(question: Callable[..., Any], *arguments: Any) -> Any:
    """What checkpoints answer; their refusals as mistakes told without a traceback."""
    try:
        return question(*arguments)
    except Damaged as error:
        raise DataError(str(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _chosen(checkpoints: Checkpoints, state: training.State) -> tuple[Any, int]:
    """The best parameters, or the last where no evaluation found any, and their step."""
    best = _asked(checkpoints.best_score)
    if best is None:
        return state.evaluated, int(state.step)
    return _asked(checkpoints.best, state.evaluated), int(best["step"])


def translate(path: str | Path, sentences: Sequence[str], *, beams: int | None = None) -> list[str]:
    """Translations of sentences by the best parameters (of the first seed) of an earlier run; empty lines stay empty.

    Args:
      path: the folder of the run.
      sentences: one sentence each.
      beams: other than the config's; 1 is greedy.
    """
    config, folder = load_run(path)
    if not isinstance(config, configs.Translation):
        raise UserError(f"{folder}: this run is a {config.kind}, not a translation; use: sample {folder}")
    _, params = trained(config, folder)
    wanted = [sentence for sentence in sentences if sentence.strip()]
    translator = translation.load_translator(config, folder)
    outputs = iter(translator(seeds_of(params)[0], wanted, beams=beams) if wanted else [])
    return [next(outputs) if sentence.strip() else "" for sentence in sentences]


def sample(path: str | Path, seed: int = 0, **changes: Any) -> str:
    """Text by the best parameters (of the first seed) of an earlier run.

    Args:
      path: the folder of the run.
      seed: another seed, another text.
      **changes: to the config's [sampling].
    """
    config, folder = load_run(path)
    if not isinstance(config, configs.LanguageModelling):
        raise UserError(f"{folder}: this run is a {config.kind}, not a language model; use: translate {folder}")
    try:
        sampling = dataclasses.replace(config.sampling, **changes)
    except ValueError as error:
        raise UserError(f"sample: {error}") from None
    _, params = trained(config, folder)
    write = language_modelling.load_writer(config, folder)
    return write(seeds_of(params)[0], sampling, seed)


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
    state, checkpoints = _latest(config.training, task, folder)
    if int(state.step) == 0:
        raise UserError(f"{folder}: nothing is trained here yet; python -m experiments {folder} trains it.")
    return task, _chosen(checkpoints, state)[0]


def _timing_of(folder: Path) -> dict[str, float] | None:
    """How long a finished run took; looking at it again does not change that. None if the result is damaged or gone."""
    try:
        result = folders.read_json(folder / RESULT, "seconds", "tokens_per_second")
        return {name: float(result[name]) for name in ("seconds", "tokens_per_second")}
    except (DataError, OSError, TypeError, ValueError):
        return None


def _new_state(config: training.Config, task: Task) -> training.State:
    return training.init(task.init_params, training.optimizer(config), config)


def _latest(config: training.Config, task: Task, folder: Path) -> tuple[training.State, Checkpoints]:
    """The latest state of the run, or a new one."""
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    if _asked(checkpoints.latest_step) is None:
        if (folder / RESULT).is_file():
            raise DataError(
                f"{folder}: there is a {RESULT}, but what was trained is gone from {folder / CHECKPOINTS}. Bring it "
                f"back from a copy, or delete {RESULT} to train again."
            )
        return _new_state(config, task), checkpoints
    return _asked(checkpoints.restore, jax.eval_shape(lambda: _new_state(config, task))), checkpoints


def _train(
    config: training.Config, task: Task, state: training.State, checkpoints: Checkpoints,
    folder: Path, console: Console, times: Times, board: Board,
) -> training.State:  # fmt: skip
    """Train to the end, from wherever the state is."""
    done = int(state.step)
    _forget_after(folder / METRICS, done)
    times.start(done)
    if done >= config.steps:
        console.print(f"[dim]already trained: {done} batches[/dim]", highlight=False)
        return state
    if done:
        console.print(f"[dim]going on after batch {done} of {config.steps}[/dim]", highlight=False)
    step = training.make_step(task.loss, training.optimizer(config), config)
    with open(folder / METRICS, "a", encoding="utf-8") as metrics, Display(console, config, task, done) as display:

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

        try:
            return training.fit(
                state, step, counted, config, evaluate=evaluate, checkpoints=checkpoints, record=record
            )  # fmt: skip
        except Damaged as error:
            raise DataError(str(error)) from None
        except training.NonFinite as error:
            examples = task.examples(error.batch - 1)
            raise training.NonFinite(f"{error} Batch {error.batch} has {examples}.", error.batch) from None


def _curve(folder: Path, config: configs.Experiment, console: Console) -> None:
    """The figure of the training loss and of every evaluation."""
    from mhajax import figures

    lines = folders.lines(folder / METRICS)
    training_lines = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation_loss" in line]
    if not training_lines:
        console.print(f"{folder / METRICS} has no batches: no figure of the training", style="dim", soft_wrap=True)
        return
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


def _forget_after(path: Path, step: int) -> None:
    """Remove the lines of batches that the resumed run will see again."""
    kept = [json.dumps(line) + "\n" for line in folders.lines(path) if line["step"] <= step]
    if kept or path.is_file():
        write(path, "".join(kept))


def _same_data(folder: Path, task: Task) -> None:
    """Refuse to go on with data other than those the run began with."""
    path = folder / ENVIRONMENT
    if path.is_file():
        before = folders.read_json(path, "data_sha256")["data_sha256"]
        if not isinstance(before, dict):
            raise DataError(f"{path}: data_sha256 must name the data and their SHA-256; the file is damaged.")
        changed = sorted(name for name in before | task.hashes if before.get(name) != task.hashes.get(name))
        if changed:
            raise DataError(
                f"{folder}: this run began with other data: {', '.join(changed)} changed since. Bring the old data "
                "back, or start a new run with --runs FOLDER."
            )


def _environment(task: Task, folder: Path) -> dict[str, Any]:
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
        "files_sha256": folders.sums(folder),
    }
