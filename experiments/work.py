"""What long work says while it goes on: a bar with rate and estimate on a terminal, a line now and then elsewhere.

    with work.shown_on(console):
        with work.piece("translating", 1000, "sentences") as piece:
            for batch in batches:
                …
                piece.advance(len(batch))

Whoever works names the piece; who watches is said once, from outside, as with logging. Where nobody watches, a piece
prints nothing. Until it has advanced for the first time a piece is "compiling …", and the rate leaves that time out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

EVERY = 10.0  # seconds between two lines, where there is no terminal
COMPILING = "compiling …"
T = TypeVar("T")


class Watch:
    """The pieces of work that one console shows, each below the one in whose midst it began; made by `shown_on`."""

    def __init__(self, console: Console):
        self.console = console
        wide = console.width >= 100
        one_line = Column(no_wrap=True, overflow="ellipsis")
        self.bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24 if wide else 10), MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", markup=False, table_column=one_line), TimeRemainingColumn(compact=True),
            console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._said = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self.bars.start()
        else:
            threading.Thread(target=self._lines, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.bars.stop()

    def print(self, text: str) -> None:
        """A line of news; where there are no bars, the next one is due some time after it."""
        self._said = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True)

    def _lines(self) -> None:
        while not self._over.wait(EVERY / 10):
            tasks = self.bars.tasks
            if tasks and time.monotonic() - self._said >= EVERY:
                self.print(self._described(tasks[-1].id))

    def _described(self, own: TaskID) -> str:
        """A piece of work in one line: what, how far, how fast, how long still."""
        task = next(task for task in self.bars.tasks if task.id == own)
        left = task.time_remaining
        parts = [f"{int(task.completed):,} of {int(task.total or 0):,} {task.fields['unit']}", task.fields["note"]]
        parts += [f"for {task.elapsed:,.0f} s"] if task.elapsed else []
        parts += [f"about {left:,.0f} s left"] if left and task.fields["note"] != COMPILING else []
        return f"{task.description}: {' · '.join(filter(None, parts))}"


class Piece:
    """One piece of work; made by `piece`."""

    def __init__(self, watch: Watch | None, what: str, total: int, unit: str, done: int = 0, note: str = COMPILING):
        self._watch, self._unit, self._done = watch, unit, done
        self._first: tuple[int, float] | None = None
        if watch is not None:
            self._own = watch.bars.add_task(what, total=total, completed=done, unit=unit, note=note)

    def advance(self, count: int = 1) -> None:
        """So many more units are done."""
        self.update(self._done + count)

    def update(self, done: int, note: str | None = None) -> None:
        """So many units are done; the note is the rate if none is given."""
        self._done, now = done, time.monotonic()
        if note is None:
            note = "" if self._first is None else _rate(done - self._first[0], now - self._first[1], self._unit)
        self._first = self._first or (done, now)
        if self._watch is not None:
            self._watch.bars.update(self._own, completed=done, note=note)

    def note(self, note: str) -> None:
        """Say something else beside the bar."""
        if self._watch is not None:
            self._watch.bars.update(self._own, note=note)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.bars.remove_task(self._own)


def _rate(done: int, seconds: float, unit: str) -> str:
    rate = done / max(seconds, 1e-9)
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def shown_on(console: Console) -> Iterator[Watch]:
    """While this is open, every piece of work is shown on this console; inside another one, that goes on."""
    outer = _WATCH.get()
    if outer is not None:
        yield outer
        return
    with Watch(console) as watch:
        token = _WATCH.set(watch)
        try:
            yield watch
        finally:
            _WATCH.reset(token)


@contextmanager
def piece(what: str, total: int, unit: str, note: str = COMPILING) -> Iterator[Piece]:
    """A piece of work of `total` units; `note` is what stands beside it until it advances."""
    own = Piece(_WATCH.get(), what, total, unit, note=note)
    try:
        yield own
    finally:
        own.close()


def each(items: Iterable[T], what: str, total: int, unit: str) -> Iterator[T]:
    """The items, one after the other, as a piece of work of which each is a unit."""
    with piece(what, total, unit) as own:
        for item in items:
            yield item
            own.advance()
