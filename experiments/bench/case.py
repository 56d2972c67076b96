"""What is measured: one case, one implementation of it, one row of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation that every implementation does.

    Attributes:
      name: of the benchmark: "attention", "layer", ….
      backward: forward and backward pass, else the forward pass alone.
      causal: whether a query sees only keys up to its own position.
      batch, length, keys: B, T and S.
      heads, width: N and H.
      d_model: D, 0 where there are no projections.
      flops: operations of one call, see `flops`; 0 where nobody counts them.
      what: what is done, where "forward" or "forward+backward" does not say it.
    """

    name: str
    backward: bool
    causal: bool
    batch: int
    length: int
    keys: int
    heads: int
    width: int
    d_model: int = 0
    flops: float
    what: str = ""

    @property
    def passes(self) -> str:
        """What is done, in words."""
        return self.what or ("forward+backward" if self.backward else "forward")

    @property
    def title(self) -> str:
        """The heading of its table."""
        if not self.length:
            return f"{self.name} · {self.passes}"
        keys = f" S {self.keys}" if self.keys != self.length else ""
        model = f" D {self.d_model}" if self.d_model else ""
        shape = f"B {self.batch} T {self.length}{keys}{model} N {self.heads} H {self.width}"
        return f"{self.name} · {self.passes}{' · causal' if self.causal else ''} · {shape}"


class Settings(NamedTuple):
    """How to measure.

    Attributes:
      seconds: to spend on the times of one case.
      keep_memory: whether processes that are started call `host.keep_memory`, as this one did.
    """

    seconds: float = 10.0
    keep_memory: bool = False


class Cannot(Exception):
    """An implementation cannot do a case; the message says why and becomes its row."""


class Ready(NamedTuple):
    """One implementation of one case, compiled and given its input.

    Attributes:
      call: does the computation once, and returns when it is done.
      answer: its result as NumPy arrays, in one layout for all implementations.
      temporary: bytes of temporary memory that the compiler plans; None where nobody says.
    """

    call: Callable[[], Any]
    answer: Callable[[], list[Any]]
    temporary: int | None = None


# Prepares an implementation; raises Cannot, or ImportError for a package that is not there.
Build = Callable[[Case], Ready]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one implementation.

    Attributes:
      case: the case.
      implementation: its name.
      milliseconds: median over the rounds; None if it was not timed, for which `note` is the reason.
      relative_to_ours: median over the rounds of its time divided by ours in the same round; above 1 is slower.
      spread: half the distance between the quartiles of its times, in milliseconds.
      matmul_fraction: its rate divided by that of a large matrix product, measured in between.
      temporary: bytes that the compiler plans.
      rounds: how often it was measured.
      note: why it was not timed.
      extra: more numbers, which some benchmarks have.
    """

    case: Case
    implementation: str
    milliseconds: float | None = None
    relative_to_ours: float | None = None
    spread: float | None = None
    matmul_fraction: float | None = None
    temporary: int | None = None
    rounds: int = 0
    note: str | None = None
    extra: dict[str, float | None] | None = None

    @property
    def gflops(self) -> float | None:
        """Useful operations per nanosecond."""
        return None if not self.milliseconds or not self.case.flops else self.case.flops / self.milliseconds / 1e6

    def record(self) -> dict[str, Any]:
        """The row as `--json` prints it."""
        case = asdict(self.case)
        return {
            "case": case["name"],
            "pass": self.case.passes,
            **{key: case[key] for key in ("causal", "batch", "length", "keys", "heads", "width", "d_model")},
            "implementation": self.implementation,
            "milliseconds": self.milliseconds,
            "relative_to_ours": self.relative_to_ours,
            "gflops": self.gflops,
            "temporary_mib": None if self.temporary is None else self.temporary / 2**20,
            "rounds": self.rounds,
            "spread": self.spread,
            "matmul_fraction": self.matmul_fraction,
            "reason": self.note,
            **(self.extra or {}),
        }
