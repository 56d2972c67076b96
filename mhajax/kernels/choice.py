"""Which path computes an attention, and in what tiles: a pure function of platform, shapes and options."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from mhajax import masks
from mhajax.kernels.grid import Tiling
from mhajax.masks import Mask, Tokens

NAMES = ("dense", "blockwise", "cudnn", "splash")


class Request(NamedTuple):
    """What is asked for, as far as the choice depends on it."""

    platform: str  # "cpu", "gpu" or "tpu"
    q: Any  # shapes and dtypes: [..., N, T, H]
    k: Any  # [..., K, S, H]
    v: Any  # [..., K, S, Hv]
    mask: Mask | None
    queries: Tokens
    keys: Tokens
    bias: bool
    score: bool
    dropout: bool
    log_sum_exp: bool  # whether the logarithm of the sums is asked for
    cached: bool  # keys and values come from a cache

    @property
    def items(self) -> int:
        """B·N."""
        return math.prod(self.q.shape[:-2])

    @property
    def group(self) -> int:
        """N/K."""
        return self.q.shape[-3] // self.k.shape[-3]


class Choice(NamedTuple):
    """A path, how it cuts the work (None: not at all), and why not each of the others."""

    kernel: str
    tiling: Tiling | None
    why: str
    others: dict[str, str]
    visited: float | None  # share of the tiles that the mask does not rule out, as far as it is known

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.why}"]
        if self.tiling is not None:
            items, rows, columns = self.tiling
            share = "" if self.visited is None else f"; {self.visited:.0%} of the tiles are visited"
            lines.append(f"  {items} heads at a time, tiles of {rows} queries × {columns} keys{share}")
        return "\n".join([*lines, *(f"not {name}: {why}" for name, why in self.others.items())])


def choose(request: Request, kernel: str = "auto") -> Choice:
    """The path for a request.

    Args:
      request: what is asked for.
      kernel: "auto", or the name of a path.

    Raises:
      ValueError: for a name that does not exist, or a path that cannot do what is asked; it says which can.
    """
    if kernel not in ("auto", *NAMES):
        raise ValueError(f"kernels: kernel must be auto or one of {', '.join(NAMES)}, got {kernel!r}.")
    refused = {name: _refusal(name, request) for name in NAMES}
    if kernel == "auto":
        wanted, why = _preferred(request, refused)
    else:
        wanted, why = kernel, "asked for"
        if refused[kernel]:
            able = [name for name in NAMES if not refused[name]]
            raise ValueError(
                f"kernels: kernel={kernel!r} cannot do this: {refused[kernel]}; use kernel='auto' or one of "
                f"{', '.join(able)}."
            )
    others = {name: refused[name] or "not needed" for name in NAMES if name != wanted}
    tiling = visited = None
    if wanted == "blockwise":
        tiling = _tiling(request)
        some, _ = masks.known_tiles(request.mask, request.queries, request.keys, tiling.rows, tiling.columns)
        visited = float(np.mean(some))
    return Choice(wanted, tiling, why, others, visited)


def _refusal(name: str, request: Request) -> str:
    """Why a path cannot do what is asked; empty if it can."""
    if name == "blockwise" and request.cached:
        return "a cache is read by the dense path, which does not copy it"
    if name == "cudnn" and request.platform != "gpu":
        return "cuDNN needs an NVIDIA GPU"
    if name == "splash" and request.platform != "tpu":
        return "splash attention needs a TPU"
    return ""


def _preferred(request: Request, refused: dict[str, str]) -> tuple[str, str]:
    length, num_keys = request.q.shape[-2], request.k.shape[-2]
    if refused["blockwise"]:
        return "dense", refused["blockwise"]
    if request.items == 0 or min(length, num_keys) < 32 or length * num_keys <= 64 * 64:
        return "dense", "there are few logits"
    return "blockwise", "memory grows with T, and the logits stay in the processor's cache"


def _tiling(request: Request) -> Tiling:
    length, num_keys = request.q.shape[-2], request.k.shape[-2]
    if request.platform == "cpu":
        rows = _even(length, 512)
        columns = _even(num_keys, 512 if request.mask is not None else 1024)
        room = max(1, 2**19 // (rows * columns)) if length == rows else 1  # 2 MiB of logits at a time
    else:  # fill the machine: all heads at once, as far as their logits stay below 256 MiB
        rows, columns = _even(length, 512), _even(num_keys, 512)
        room = max(1, 2**26 // (rows * columns))
    return Tiling(_fitting(request.items, request.group, room), rows, columns)


def _even(size: int, most: int) -> int:
    """Size of the fewest equal parts of at most so many tokens."""
    return -(-size // -(-size // most))


def _fitting(items: int, group: int, most: int) -> int:
    """The largest number up to `most` that divides the items, and the group or is a multiple of it."""
    fits = [n for n in range(1, min(items, most) + 1) if items % n == 0 and (group % n == 0 or n % group == 0)]
    return max(fits, default=1)
