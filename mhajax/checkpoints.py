"""The states of a training on disk: the latest two and the best two, each written whole or not at all.

    folder/latest/12/SHA256SUMS   what every file of it must be; `sha256sum -c SHA256SUMS` checks it by hand
                    /state/       the arrays, written by Orbax
    folder/best/10/…/params/, score.json
    folder/saved                  there since the first state was saved

A checkpoint is written beside its place and renamed to it with its digests, so what has a number for a name is whole
unless something damaged it later. What is damaged is never restored, and the error says how to go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

KEPT = 2  # of each kind: where the newest is damaged, the one before it is offered
SUMS, SCORE, SAVED = "SHA256SUMS", "score.json", "saved"


class Damaged(ValueError):
    """A checkpoint is not as it was written, or it is gone."""


class NotSaved(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The latest states and the best parameters of a run.

    Args:
      folder: where they are; nothing is made before the first is saved.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).absolute()
        self._latest, self._best = self.folder / "latest", self.folder / "best"

    def latest_step(self) -> int | None:
        """Batches seen by the latest state; None if nothing was saved.

        Raises:
          Damaged: states were saved, and all are gone.
        """
        step = _newest(self._latest)
        if step is None and (self.folder / SAVED).exists():
            raise Damaged(
                f"checkpoints: {self._latest} held states of this run and is empty now, so it cannot go on. Bring the "
                f"folder back from a copy, or delete {self.folder} to train from the beginning."
            )
        return step

    def save(self, state: Any) -> None:
        """Keep this state (`training.State`) as the latest; one that is already there is not written again.

        Raises:
          ValueError: a later state was saved before.
          NotSaved: the disk is full, or the folder cannot be written.
        """
        step, latest = int(state.step), _newest(self._latest)
        if latest is not None and latest > step:
            raise ValueError(
                f"checkpoints.save: {self._latest} holds a state of batch {latest}, got one of batch {step}, which "
                "would not be the latest; save it to another folder."
            )
        if latest != step:
            _write(self._latest / str(step), lambda part: _save_arrays(part / "state", state._asdict()))
            _guarded(self.folder / SAVED, Path.touch)

    def restore(self, like: Any) -> Any:
        """The latest state.

        Args:
          like: a state of the same shapes; arrays or `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: nothing was saved, or arrays of other shapes: the checkpoint belongs to another config.
          Damaged: the latest state is not as it was written.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(f"checkpoints.restore: {self._latest} holds no state; save one first.")
        return self._read(self._latest, step, partial(self._state, like=like))

    def offer(self, state: Any, score: float) -> bool:
        """Keep the evaluated parameters if the score is higher than all before; whether they were kept.

        A score that is NaN or infinite is not higher than any. A run that was killed may have kept parameters from
        after its latest state. They stay: the run will come by the same bits again.

        Raises:
          Damaged: the best parameters until now are not as they were written.
          NotSaved: the disk is full, or the folder cannot be written.
        """
        best, step = self.best_score(), int(state.step)
        if not math.isfinite(score) or best is not None and (best["step"] >= step or score <= best["score"]):
            return False

        def fill(part: Path) -> None:
            _save_arrays(part / "params", state.evaluated)
            (part / SCORE).write_text(json.dumps({"step": step, "score": score}), encoding="utf-8")

        _write(self._best / str(step), fill)
        return True

    def best_score(self) -> dict[str, float] | None:
        """Step and score of the best parameters; None if there are none.

        Raises:
          Damaged: they are not as they were written.
        """
        step = _newest(self._best)
        if step is None:
            return None
        return self._read(self._best, step, lambda path: json.loads((path / SCORE).read_text(encoding="utf-8")))

    def best(self, like: Any) -> Any:
        """The best parameters [seeds, ...], of the same shapes as `like`.

        Raises:
          ValueError: there are none, or they have other shapes.
          Damaged: they are not as they were written.
        """
        step = _newest(self._best)
        if step is None:
            raise ValueError(f"checkpoints.best: {self._best} holds no parameters; offer some first.")
        return self._read(self._best, step, lambda path: _restore_arrays(path / "params", like))

    def close(self) -> None:
        """Nothing is open between calls; kept so that a caller need not know."""

    def _read(self, kind: Path, step: int, read: Callable[[Path], Any]) -> Any:
        """What is read from a checkpoint, or from the one that a training has put in its place meanwhile."""
        while True:
            try:
                self._check(kind, step)
                return read(kind / str(step))
            except Exception:
                newest = _newest(kind)
                if newest is None or newest <= step:
                    self._check(kind, step)  # what went wrong, where it was damaged while it was read
                    raise
                step = newest

    def _state(self, path: Path, like: Any) -> Any:
        state = type(like)(**_restore_arrays(path / "state", like._asdict()))
        if int(state.step) != int(path.name):
            raise Damaged(self._message(self._latest, int(path.name), f"it holds batch {int(state.step)}"))
        return state

    def _check(self, kind: Path, step: int) -> None:
        damage = _damage(kind / str(step))
        if damage is not None:
            raise Damaged(self._message(kind, step, damage))

    def _message(self, kind: Path, step: int, damage: str) -> str:
        whole = [earlier for earlier in _steps(kind) if earlier < step and _damage(kind / str(earlier)) is None]
        what = "state" if kind == self._latest else "best parameters"
        message = f"checkpoints: the {what} of batch {step} in {kind / str(step)} cannot be trusted: {damage}. "
        if not whole:
            return message + f"Bring the folder back from a copy, or delete {self.folder} to train from the beginning."
        goes = "training goes on after it" if kind == self._latest else "they are taken instead"
        return message + f"Those of batch {whole[-1]} are whole: delete {kind / str(step)}, and {goes}."


def _steps(kind: Path) -> list[int]:
    """The steps of which a folder holds checkpoints, ascending."""
    if not kind.is_dir():
        return []
    return sorted(int(path.name) for path in kind.iterdir() if path.name.isascii() and path.name.isdigit())


def _newest(kind: Path) -> int | None:
    return max(_steps(kind), default=None)


def _write(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a checkpoint: filled and summed up beside its place, then renamed to it; the oldest go."""
    part = path.with_name(f"{path.name}.part")

    def write(path: Path) -> None:
        for stale in path.parent.glob("*.part"):
            shutil.rmtree(stale, ignore_errors=True)
        part.mkdir(parents=True)
        fill(part)
        lines = [f"{_sha256(file)}  {file.relative_to(part).as_posix()}\n" for file in _files(part)]
        (part / SUMS).write_text("".join(lines), encoding="utf-8")
        os.rename(part, path)

    try:
        _guarded(path, write)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for step in _steps(path.parent)[:-KEPT]:
        shutil.rmtree(path.with_name(str(step)), ignore_errors=True)


def _guarded(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except Exception as error:  # Orbax hands on what its storage says, in types of its own
        raise NotSaved(
            f"checkpoints: {path} could not be written: {_reason(error)}. What was saved before is whole; make room "
            "or another place to write, and the training goes on from there."
        ) from None


def _reason(error: Exception) -> str:
    """What the system said, without what others said about it."""
    number = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    told = os.strerror(int(number[1])) if number else error.strerror if isinstance(error, OSError) else None
    return told or _first_line(error)


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint, but those that a desktop hides among them."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (SUMS, ".DS_Store"))


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: its files are those, and as, that were written."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        there = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
        for name in sorted(sums.keys() | there.keys()):
            if name not in there:
                return f"{name!r:.80} is missing"
            if name not in sums:
                return f"{SUMS} does not list {name}"
            if _sha256(there[name]) != sums[name]:
                return f"the SHA-256 of {name} is not what {SUMS} says"
    except FileNotFoundError:
        return f"{SUMS} is missing (it was damaged, or written by a version that had none)"
    except (OSError, UnicodeDecodeError) as error:
        return _first_line(error)
    return None if sums else f"{SUMS} is empty"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_arrays(path: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    with _told_once(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(tree))


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """What Orbax raises it logs too, and then every write still under way fails aloud: here, it is only raised.

    Such writes end in threads of TensorStore, some after Orbax has raised: what keeps them quiet stays after a failure.
    """
    before, orbax = sys.unraisablehook, logging.getLogger("absl")

    def hook(lost: Any) -> None:
        if str(lost.exc_value) != "Event loop is closed":
            before(lost)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(_no_lost_write)
    orbax.addFilter(_no_warning)
    try:
        yield
        sys.unraisablehook = before
    except BaseException:
        warnings.filterwarnings("ignore", "coroutine .*write_fragment.* was never awaited", RuntimeWarning)
        raise
    finally:
        orbax.removeFilter(_no_warning)


def _no_warning(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING


def _no_lost_write(record: logging.LogRecord) -> bool:
    return not any(name in record.getMessage() for name in ("OCDBT", "write_fragment"))  # TensorStore's, Orbax's


def _restore_arrays(path: Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    with _told_once(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(path)
        saved = getattr(saved, "item_metadata", saved)
        _check_shapes(path, getattr(saved, "tree", saved), like)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
        return checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))


def _check_shapes(path: Path, saved: Any, like: Any) -> None:
    def shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        names = [(jax.tree_util.keystr(name, simple=True, separator="."), leaf) for name, leaf in leaves]
        return sorted((name, tuple(leaf.shape)) for name, leaf in names if hasattr(leaf, "shape"))

    have, want = shapes(saved), shapes(like)
    if sorted(shape for _, shape in have) != sorted(shape for _, shape in want):
        sizes = [sum(int(np.prod(shape)) for _, shape in some) for some in (have, want)]
        raise ValueError(
            f"checkpoints: {path.parent} holds {len(have)} arrays of {sizes[0]:,} numbers in other shapes than this "
            f"model's {len(want)} of {sizes[1]:,}; it was written with another config. Use that config, or another "
            "folder."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
