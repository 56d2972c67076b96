"""Which cases every run of the tests has. The others are marked slow: `python -m pytest -m slow` runs them, and CI."""

from collections.abc import Iterable
from typing import Any

import pytest


def tiered(cases: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters of a test: these cases in every run, one of every promise, and the others in the slow tier."""
    cases = list(cases)
    missing = [case for case in always if case not in cases]
    if missing or not always:
        raise ValueError(f"tiered: expected cases that are there, got {missing or 'none'}; there are {cases}")
    return [case if case in always else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    """A tuple is the arguments of a test with several; of a test with one, the case is that argument, never a tuple."""
    if isinstance(case, tuple) and len(case) == 1:
        raise ValueError(f"tiered: a case of a test with one argument is that argument, got {case}; write a list")
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
