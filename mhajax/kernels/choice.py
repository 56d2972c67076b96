"""Which path computes an attention, and in what tiles: a pure function of platform, shapes and options."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhajax import masks
from mhajax.kernels import cudnn
from mhajax.kernels.grid import Tiling, fitting
from mhajax.kernels.rules import BUILT_IN, Rules
from mhajax.masks import Mask, Tokens

FEW_TOKENS = 8  # of a sequence: the dense path is for these
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
    log_sum_exp: bool  # whether the path itself must give the logarithm of the sums
    cached: bool  # keys and values come from a cache
    spread: bool = False  # the compiler may have to partition the work between devices
    rules: Rules = BUILT_IN

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
    values_at_once: int  # heads at a time, in whole rows, where no gradient is taken; 0: as the tiling says
    why: str
    others: dict[str, str]
    visited: float | None  # share of the tiles that the mask does not rule out, as far as it is known

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.why}"]
        if self.tiling is not None:
            items, rows, columns = self.tiling
            share = "" if self.visited is None else f"; {self.visited:.0%} of the tiles are visited"
            heads = "one head" if items == 1 else f"{items} heads"
            lines.append(f"  {heads} at a time, tiles of {rows} queries × {columns} keys{share}")
        if self.values_at_once:
            lines.append(f"  where no gradient is taken: {self.values_at_once} heads at a time, whole rows")
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
    absent = {name: _absence(name, request) for name in NAMES}
    if kernel == "auto":
        wanted, why = _preferred(request, {name: refused[name] or absent[name] for name in NAMES})
    else:
        wanted, why = kernel, "asked for"
        if refused[kernel]:
            able = [name for name in NAMES if not refused[name] and not absent[name]]
            raise ValueError(
                f"kernels: kernel={kernel!r} cannot do this: {refused[kernel]}; use kernel='auto' or one of "
                f"{', '.join(able)}."
            )
    unused = {name: "it holds all T × S logits" if name == "dense" else "not needed" for name in NAMES}
    others = {name: refused[name] or absent[name] or unused[name] for name in NAMES if name != wanted}
    tiling, visited, values_at_once = None, None, 0
    if wanted == "blockwise":
        tiling, values_at_once = _tiling(request), _values_at_once(request)
        some, _ = masks.known_tiles(request.mask, request.queries, request.keys, tiling.rows, tiling.columns)
        visited = float(np.mean(some))
    return Choice(wanted, tiling, values_at_once, why, others, visited)


def spread() -> bool:
    """Whether what is traced now may be partitioned by the compiler: there are devices, and no `shard_map` around."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and not (mesh.axis_names and mesh.are_all_axes_manual)


def _absence(name: str, request: Request) -> str:
    """Why "auto" does not take a path that could do it; empty if it may. A path asked for by name is taken."""
    if name == "splash" and request.platform != "tpu":
        return "splash attention needs a TPU"
    if name == "splash" and request.spread:
        return "the compiler cannot partition splash attention between devices: call it inside shard_map"
    return ""


def _refusal(name: str, request: Request) -> str:
    """Why a path cannot do what is asked; empty if it can."""
    if name == "blockwise" and request.cached:
        return "a cache is read by the dense path, which does not copy it"
    if name == "cudnn":
        return _cudnn_refusal(request)
    if name == "splash":
        return _splash_refusal(request)
    return ""


def _cudnn_refusal(request: Request) -> str:
    if request.platform != "gpu":
        return "cuDNN needs an NVIDIA GPU"
    if jax.default_backend() == "gpu" and cudnn.absence():
        return cudnn.absence()
    dtypes = {jnp.dtype(a.dtype) for a in (request.q, request.k, request.v)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)}:
        return f"cuDNN attention is for float16 or bfloat16, not {', '.join(sorted(map(str, dtypes)))}"
    width, value_width = request.q.shape[-1], request.v.shape[-1]
    if width > 128 or width % 8 or value_width != width:
        return f"cuDNN attention needs H = Hv, a multiple of 8 up to 128, not H={width} and Hv={value_width}"
    found = masks.conditions(request.mask)
    if found.segments is not None:
        return "cuDNN attention has no segments"
    if found.window is not None and (not found.causal or found.lengths is not None):
        return "cuDNN attention has windows that look back only, without lengths"
    length, num_keys = request.q.shape[-2], request.k.shape[-2]
    if found.causal and length != num_keys:
        return f"cuDNN attention is causal for T = S only, not T={length} and S={num_keys}"
    return _plain_refusal("cuDNN attention", request)


def _splash_refusal(request: Request) -> str:
    if jnp.result_type(request.q.dtype, request.k.dtype, request.v.dtype) == jnp.float64:
        return "splash attention has no float64"
    if jax.config.jax_enable_x64:
        return "splash attention cannot be traced while jax_enable_x64 is on"
    return _plain_refusal("splash attention", request)


def _plain_refusal(who: str, request: Request) -> str:
    """Why a kernel that knows masks by index only, and nothing that changes the logits, cannot do it."""
    if request.cached:
        return "a cache is read by the dense path, which does not copy it"
    asked = {"bias": request.bias, "score function": request.score, "dropout of our kind": request.dropout}
    for what, wanted in asked.items():
        if wanted:
            return f"{who} has no {what}"
    if request.log_sum_exp:
        return f"{who} gives no log_sum_exp"
    found, queries, keys = masks.conditions(request.mask), request.queries, request.keys
    if found.rest:
        return f"{who} has no mask like {found.rest[0]!r}"
    if found.window is not None and not all(isinstance(side, int) for side in found.window):
        return f"{who} needs a window that is known when the program is traced"
    if (found.causal or found.window is not None) and (queries.origin is None or queries.origin != keys.origin):
        return f"{who} compares indices, and positions are not known to be the same as indices"
    looked_up = found.lengths is not None or found.segments is not None
    if looked_up and not all(isinstance(t.start, int) and t.start == 0 for t in (queries, keys)):
        return f"{who} needs queries and keys that start at index 0"
    return ""


def _preferred(request: Request, refused: dict[str, str]) -> tuple[str, str]:
    length, num_keys = request.q.shape[-2], request.k.shape[-2]
    if refused["blockwise"]:
        return "dense", refused["blockwise"]
    if request.items * length * num_keys <= request.rules.few_logits or min(length, num_keys) < FEW_TOKENS:
        return "dense", "there are few logits"
    if not refused["cudnn"]:
        return "cudnn", "memory grows with T, in one kernel"
    if not refused["splash"] and min(length, num_keys) >= 128:
        return "splash", "memory grows with T, in one kernel"
    return "blockwise", "memory grows with T" + ", and the logits stay in the cache" * (request.platform == "cpu")


def _tiling(request: Request) -> Tiling:
    length, num_keys = request.q.shape[-2], request.k.shape[-2]
    if request.platform == "cpu":  # logits stay in the cache; 16 heads are enough, or an eighth of the logits
        most, logits = request.rules.masked_tile_tokens, request.rules.tile_logits
        most = request.rules.tile_tokens if request.mask is None else most
        rows, columns = _even(length, most), _even(num_keys, most)
        room = max(1, min(logits // (rows * columns), max(16, logits // 8 // (rows * columns))))
    else:  # fill the machine: all heads at once, as far as their logits stay below 256 MiB
        rows, columns = _even(length, 512), _even(num_keys, 512)
        room = max(1, 2**26 // (rows * columns))
    return Tiling(fitting(request.items, room, request.group), rows, columns)


def _values_at_once(request: Request) -> int:
    """All heads, if rows are short enough for the compiler to take both products and the softmax as one loop."""
    plain = not (request.bias or request.score or request.dropout or request.log_sum_exp)
    fuses = request.platform == "cpu" and not request.spread
    return request.items if plain and fuses and request.k.shape[-2] <= request.rules.keys_at_once else 0


def _even(size: int, most: int) -> int:
    """Size of the fewest equal parts of at most so many tokens."""
    return -(-size // -(-size // most))
