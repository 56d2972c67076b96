"""Times of several functions, taken in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MIN_ROUNDS, MAX_ROUNDS = 3, 300
_BURST = 0.01  # seconds: a short function is called for about as long, and its mean is one measurement
_SHORT = 0.05  # seconds: a shorter one is called once untimed before, to have caches and threads to itself
_LONG = 1.0  # seconds
_YARDSTICK = 0.2  # share of the time that the yardstick may take


class Summary(NamedTuple):
    """Median and spread of the times of one function, in seconds."""

    median: float
    spread: float  # half the distance between the quartiles
    rounds: int


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float,
    *,
    warm: bool = True,
    yardstick: Callable[[], Any] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Times of every function, one number a round.

    Every round calls every function: the order moves on by one each round and is turned around every other round, so
    that nobody always comes after the same neighbour. Rounds go on until the seconds are used up, but there are at
    least `MIN_ROUNDS`, so that slow functions are measured few times and fast ones often.

    Args:
      functions: by name; each returns when its work is done.
      seconds: to spend, all functions together.
      warm: call every function once or twice before, and short ones often at a time; False for what is warm, or must
        not be repeated.
      yardstick: one more function, called in as many rounds as fit in a fifth of the time.

    Returns:
      Seconds per call, name → [rounds], and those of the yardstick.
    """
    burst = {name: _prepare(function) if warm else 1 for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    of_yardstick: list[float] = []
    if yardstick is not None:
        yardstick()
    names, begin, collecting = list(functions), time.perf_counter(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(MAX_ROUNDS):
            spent = time.perf_counter() - begin
            if number >= MIN_ROUNDS and spent >= seconds:
                break
            for name in order(names, number):
                times[name].append(_measure(functions[name], burst[name]))
            if yardstick is not None and sum(of_yardstick) <= _YARDSTICK * (time.perf_counter() - begin):
                of_yardstick.append(_measure(yardstick, 1))
    finally:
        if collecting:
            gc.enable()
    return {name: np.array(values) for name, values in times.items()}, np.array(of_yardstick)


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`.

    >>> [order("abc", n) for n in range(3)]
    [['a', 'b', 'c'], ['a', 'c', 'b'], ['c', 'a', 'b']]
    """
    start = number % len(names) if names else 0
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if number % 2 else turned


def summary(times: np.ndarray) -> Summary:
    """Median and spread."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return Summary(float(middle), float(high - low) / 2, len(times))


def ratio(times: np.ndarray, reference: np.ndarray) -> float:
    """Median of the ratios within the same round, which a slow phase of the machine does not move."""
    return float(np.median(times / reference))


def _prepare(function: Callable[[], Any]) -> int:
    """How often to call it at a time; warms it up, a long one with a single call."""
    once = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        function()
        once = time.perf_counter() - begin
        if once >= _LONG:
            break
    return 1 if once >= _SHORT else min(100, 1 + math.ceil(_BURST / max(once, 1e-7)))


def _measure(function: Callable[[], Any], calls: int) -> float:
    if calls > 1:
        function()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls
