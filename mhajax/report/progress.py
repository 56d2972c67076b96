"""How long work says how far it is: whoever calls hands in a function, and the library knows no screen.

def progress(what: str, total: int, unit: str):   # "where heads look", 200, "windows"
    ...                                           # a context manager of something with `advance(count)`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Piece(Protocol):
    """One piece of work under way."""

    def advance(self, count: int = 1) -> None:
        """So many more units are done."""


Progress = Callable[[str, int, str], AbstractContextManager[Piece]]
"""(what, total, unit) → a context that is open while that work goes on; pieces may lie inside each other."""


class _Silent:
    def advance(self, count: int = 1) -> None:
        pass


@contextmanager
def silent(what: str, total: int, unit: str) -> Iterator[Piece]:
    """Progress that nobody sees."""
    yield _Silent()
