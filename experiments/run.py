"""The way from a config to a result in a run folder. This is the one place where results are written."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from experiments import config as configs
from experiments import (
    curve,
    environment,
    finished,
    host,
    kinds,
    schema,
    studies,
    toml,
    work,
)
from experiments import folder as folders
from experiments.errors import ConfigError, DataError, UserError
from experiments.folder import CHECKPOINTS, CONFIG, ENVIRONMENT, HEADS, METRICS, ORIGIN, REPORT, RESULT, write
from experiments.progress import Board, Display, Times
from experiments.tables import Training
from experiments.task import Task
from mhajax import linen, training
from mhajax.checkpoints import Checkpoints, Damaged


def load(path: str, overrides: list[str], runs: str, *, small: bool = False) -> tuple[Any, Path]:
    """The config that a person named, with overrides, and the folder of its run.

    Args:
      path: a config file, or the folder of an earlier run.
      overrides: TOML lines such as `model.num_heads=8`.
      runs: where run folders are made. A run's folder is named after its config file and a hash of every value in it,
        so the same command always finds the same folder. An earlier run continued with other values has a folder of
        its own beside that run's, which stays as it is.
      small: a quick look at the config, see `kinds.shrink`; the name of its folder begins with "quick-".
    """
    folder = Path(path)
    if _is_run(folder):
        if small:
            raise UserError(f"--quick looks at a config file; {folder} is a run, which is what it is.")
        own = load_run(folder)[0]
        config = configs.read(folder / CONFIG, overrides)
        return config, folder if config == own else folders.continued(folder, schema.to_toml(config))
    if _is_folder(folder):
        raise ConfigError(f"{folder}: this folder has no {CONFIG}, so it is no run; give a config file or a run.")
    config = configs.read(folder, overrides)
    config = kinds.shrink(config) if small else config
    stem = f"quick-{folder.stem}" if config.quick else folder.stem
    return config, Path(runs) / folders.name(stem, schema.to_toml(config))


def load_run(path: str | Path) -> tuple[Any, Path]:
    """The config and the folder of an earlier run."""
    folder = Path(path)
    if not _is_run(folder):
        raise UserError(f"{folder}: {_not_a_run(folder)}")
    folders.check(folder)
    return configs.read(folder / CONFIG), folder


def load_training(path: str | Path) -> tuple[Training, Path]:
    """The config and the folder of an earlier run that trained something.

    Raises:
      UserError: it is a study.
    """
    config, folder = load_run(path)
    if not isinstance(config, Training):
        raise UserError(f"{folder}: this is a study ({config.kind}), not a training; its report is {folder / REPORT}")
    return config, folder


def _is_run(folder: Path) -> bool:
    return _is_folder(folder) and (folder / CONFIG).is_file()


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _not_a_run(folder: Path) -> str:
    if _is_folder(folder):
        return f"this folder has no {CONFIG}, so it is not the folder of a run."
    try:
        there = folder.exists()
    except (OSError, ValueError):
        return "this cannot be the name of a folder; give the folder of a run, which a run prints as its first line."
    if there:
        return "this is a file; give the folder of a run, which a run prints as its first line."
    where = folder.absolute().parent
    runs = [file.parent.name for file in where.glob(f"*/{CONFIG}")] if where.is_dir() else []
    near = toml.nearest(folder.name, runs)
    return f"there is no such folder in {where}" + (f"; did you mean {folder.with_name(near)}?" if near else ".")


def prepare(config: Training, folder: Path) -> Task:
    """The experiment that a config describes; this is where a config becomes objects."""
    return kinds.TRAININGS[config.kind].prepare(config, folder)


def run(config: Any, folder: Path, console: Console, *, tensorboard: bool = False) -> dict[str, Any]:
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
    with folders.opened(folder), work.shown_on(console):
        if not isinstance(config, Training):
            train = Arms(folder.parent, console, small=bool(config.quick))
            return studies.run(kinds.STUDIES[config.kind], config, folder, console, train)
        return _run(config, folder, console, tensorboard)


class Arms:
    """The trainings of a study, beside its own folder; a `studies.Train`.

    Args:
      runs: where their folders are made.
      console: where a person reads.
      small: they are quick looks.
    """

    def __init__(self, runs: Path, console: Console, *, small: bool):
        self._runs, self._console, self._small = runs, console, small
        self._elapsed = self._seconds = 0.0  # in trainings, by now; what they took when they were trained

    def check(self, path: str, lines: Sequence[str]) -> None:
        """Raise a ConfigError or DataError unless this is the config of a training."""
        self._load(path, lines)

    def __call__(self, path: str, lines: Sequence[str], name: str) -> dict[str, Any]:
        """The result of a config with other values, trained if it is not there yet."""
        began = time.perf_counter()
        result = self._result(path, lines, name)
        self._elapsed += time.perf_counter() - began
        self._seconds += result["seconds"]
        return result

    def cost(self, elapsed: float) -> float:
        """What a study of so many seconds would have taken if none of its trainings had been there already."""
        return elapsed - self._elapsed + self._seconds

    def _result(self, path: str, lines: Sequence[str], name: str) -> dict[str, Any]:
        config, folder = self._load(path, lines)
        if (folder / RESULT).is_file() and load_run(folder)[0] == config:
            return folders.read_json(folder / RESULT, "seconds", "parameters")
        self._console.print(
            f"[bold]{escape(name)}[/bold] [dim]{escape(str(folder))}[/dim]", highlight=False, soft_wrap=True
        )
        return run(config, folder, self._console)

    def models(self, path: str, lines: Sequence[str], name: str) -> studies.Models:
        """The models of a config with other values, trained if they are not there yet."""
        self(path, lines, name)
        config, folder = self._load(path, lines)
        with folders.opened(folder):
            task, params = trained(config, folder)
        return studies.Models(task, params, config.training.seed, linen.Model(config.model).functions.attentions)

    def _load(self, path: str, lines: Sequence[str]) -> tuple[Training, Path]:
        config = configs.read(path, lines)
        if not isinstance(config, Training):
            raise ConfigError(f"{path}: this is a study ({config.kind}); the arms of a study are trainings.")
        stem, seeds = Path(path).stem, config.training.seeds
        if self._small:
            config = kinds.shrink(config)
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, seeds=seeds))
            stem = f"quick-{stem}"
        return config, self._runs / folders.name(stem, schema.to_toml(config))


def _run(config: Training, folder: Path, console: Console, tensorboard: bool) -> dict[str, Any]:
    times = Times(folder)
    origin = _begin(config, folder)
    if config.quick:
        console.print("[bold]a quick look[/bold]: a small model on little data; its numbers mean nothing")
    with work.piece("reading the data, making the vocabulary", 1, "step", note=""):
        task = prepare(config, folder)
    environment.same_data(folder, task.hashes)
    state, checkpoints = _latest(config.training, task, folder)
    if origin is not None and not (folder / CONFIG).is_file():
        write(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")
    if not (folder / CONFIG).is_file():  # not before it is known to fit what the folder holds
        write(folder / CONFIG, schema.to_toml(config))
    write(folder / ENVIRONMENT, json.dumps(environment.describe(task.hashes, folder), indent=2) + "\n")
    for note in task.notes:
        console.print(note, style="dim", highlight=False, soft_wrap=True)
    was_finished = (folder / RESULT).is_file() and int(state.step) >= config.training.steps
    with Board(folder if tensorboard else None) as board:
        state = _train(config.training, task, state, checkpoints, folder, console, times, board)
    console.print()
    params, best_step = finished.chosen(checkpoints, state)
    # What comes from a checkpoint is committed to its device; without that, nothing is compiled a second time.
    params = jax.device_put(jax.device_get(params))
    result = {"kind": config.kind, **({"quick": True} if config.quick else {}), **task.report(params, folder, console)}
    result |= {
        "parameters": sum(a.size for a in jax.tree.leaves(params)) // config.training.seeds,
        "seeds": config.training.seeds,
        "steps": config.training.steps,
        "best_step": best_step,
        **({} if origin is None else {"continued_from": origin}),
        **((_timing_of(folder) if was_finished else None) or times.summary()),
    }
    warning = curve.diverged(folder)
    if warning is not None:
        result["warning"] = warning
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)
    if not config.quick:
        curve.draw(folder, config, task.unit, console)
    if config.heads.report:
        _report_heads(config, folder, task, params, console)
    result = folders.plain(result)
    write(folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    console.print(
        f"{result['parameters']:,} parameters, {result['seconds']:.0f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s in training · everything is in {folder}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return result


def _begin(config: Training, folder: Path) -> dict[str, Any] | None:
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
    own, _ = load_training(source)
    if own.vocabulary != config.vocabulary:
        raise ConfigError(
            f"[vocabulary] of a run cannot change: {source} was made with kind={own.vocabulary.kind!r}, "
            f"size={own.vocabulary.size}, got kind={config.vocabulary.kind!r}, size={config.vocabulary.size}; start a "
            "new run from the config file."
        )
    folders.copy(source, folder)
    step = finished.asked(Checkpoints(folder / CHECKPOINTS).latest_step)
    if step is None:
        raise ConfigError(f"{source}: nothing is trained here yet, so there is nothing to go on from with other "
                          "values; start from the config file with them.")  # fmt: skip
    if step > config.training.steps:
        raise ConfigError(f"training.steps={config.training.steps} is less than the {step} batches that {source} has "
                          "seen; start a shorter run from the config file.")  # fmt: skip
    before = {"origin": folders.read_json(source / ORIGIN)} if (source / ORIGIN).is_file() else {}
    return {"run": source.name, "step": step, "config_sha256": folders.digest(schema.to_toml(own)), **before}


def heads(path: str | Path, console: Console, **changes: Any) -> dict[str, Any]:
    """Measure the heads of an earlier run: writes report.html, heads.json and figures to its folder.

    Args:
      path: the folder of the run.
      console: where a person reads.
      **changes: to the config's [heads].

    Returns:
      What stands in heads.json.
    """
    config, folder = load_training(path)
    try:
        config = dataclasses.replace(config, heads=dataclasses.replace(config.heads, **changes))
    except ValueError as error:
        raise UserError(f"heads: {error}") from None
    with folders.opened(folder):
        task, params = trained(config, folder)
        return _report_heads(config, folder, task, params, console)


def _report_heads(config: Training, folder: Path, task: Task, params: Any, console: Console) -> dict[str, Any]:
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


def trained(config: Training, folder: Path) -> tuple[Task, Any]:
    """The experiment of a run folder and its best parameters [seeds, ...].

    Raises:
      UserError: if nothing was trained in this folder yet.
    """
    task = prepare(config, folder)
    state, checkpoints = _latest(config.training, task, folder)
    if int(state.step) == 0:
        raise UserError(f"{folder}: nothing is trained here yet; python -m experiments {folder} trains it.")
    return task, finished.chosen(checkpoints, state)[0]


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
    one = jax.eval_shape(lambda: _new_state(dataclasses.replace(config, seeds=1), task))
    host.check_room(
        "[model] parameters and what the optimizer keeps of them", one, config.seeds,
        "model.d_model, model.d_ff, the number of layers, vocabulary.size or training.seeds",
    )  # fmt: skip
    if finished.asked(checkpoints.latest_step) is None:
        if (folder / RESULT).is_file():
            raise DataError(
                f"{folder}: there is a {RESULT}, but what was trained is gone from {folder / CHECKPOINTS}. Bring it "
                f"back from a copy, or delete {RESULT} to train again."
            )
        with work.piece("drawing the first parameters", 1, "step"):
            return _new_state(config, task), checkpoints
    return finished.asked(checkpoints.restore, jax.eval_shape(lambda: _new_state(config, task))), checkpoints


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

        try:
            return training.fit(
                state, timed, counted, config, evaluate=evaluate, checkpoints=checkpoints, record=record
            )  # fmt: skip
        except Damaged as error:
            raise DataError(str(error)) from None
        except training.NonFinite as error:
            examples = task.examples(error.batch - 1)
            raise training.NonFinite(f"{error} Batch {error.batch} has {examples}.", error.batch) from None


def _forget_after(path: Path, step: int) -> None:
    """Remove the lines of batches that the resumed run will see again."""
    kept = [json.dumps(line) + "\n" for line in folders.lines(path) if line["step"] <= step]
    if kept or path.is_file():
        write(path, "".join(kept))
