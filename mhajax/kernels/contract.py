"""What a kernel path says of itself, what it is asked and what it is given: the types that all paths share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jax import Array

from mhajax.interventions import Patch
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.kernels.rules import BUILT_IN, Rules
from mhajax.masks import Mask, Tokens

FEW_TOKENS = 8  # of a sequence: the dense path is for these

# Reasons that more than one path has.
CACHED = "a cache is read by the dense path, which does not copy it"
FEW = "there are few logits"
PATCHED = "a patch of logits or weights needs whole rows of them"


class Request(NamedTuple):
    """What is asked for, as far as the choice of a path depends on it."""

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
    log_sum_exp: bool  # whether the path itself must give it
    cached: bool  # keys and values come from a cache
    spread: bool = False  # the compiler may have to partition the work between devices
    rules: Rules = BUILT_IN
    patched: bool = False  # logits or weights are replaced

    @property
    def batch_heads(self) -> int:
        """B·N."""
        return math.prod(self.q.shape[:-2])

    @property
    def few(self) -> bool:
        """Whether the logits are so few that it does not pay to avoid holding them."""
        length, num_keys = self.q.shape[-2], self.k.shape[-2]
        few_logits = self.batch_heads * length * num_keys <= self.rules.few_logits
        return few_logits or min(length, num_keys) < FEW_TOKENS


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      batch_heads: heads of examples at a time; divides B·N, and divides the group size N/K or is a multiple of it.
      block_q: queries of a tile.
      block_k: keys of a tile.
    """

    batch_heads: int
    block_q: int
    block_k: int


class Plan(NamedTuple):
    """What a path says of how it would do a request."""

    why: str = "memory grows with T, in one kernel"  # what speaks for it, where "auto" takes it
    tiling: Tiling | None = None
    values_at_once: int = 0  # batch-heads at a time, in whole rows, where no gradient is taken; 0: as the tiling says
    visited: float | None = None  # fraction of the tiles that the mask does not rule out, if known


class Inputs(NamedTuple):
    """What a path is given: the arguments of `kernels.attend`, checked and in one form."""

    q: Array  # [..., N, T, H]
    k: Array  # [..., K, S, H]; query head n uses key head n // (N/K)
    v: Array  # [..., K, S, Hv]
    queries: Tokens
    keys: Tokens
    mask: Mask | None = None
    bias: Array | None = None  # [..., 1 or N, 1 or T, 1 or S], with as many axes as q; -inf masks
    score: Callable | None = None  # (score, head, q_position, k_position, *constants), of one pair
    constants: tuple[Array, ...] = ()
    scale: float = 1.0  # factor of the products q kᵀ
    dropout_rate: float = 0.0  # 0 without a key
    dropout_key: Array | None = None
    cached: bool = False  # values are finite, and keys that are not have NaN
    logits: Patch | None = None  # only for a path that has `capture`, as the next
    weights: Patch | None = None
    tiling: Tiling | None = None  # as the path planned it, as the next
    values_at_once: int = 0

    @property
    def patched(self) -> bool:
        """Whether logits or weights are replaced."""
        return self.logits is not None or self.weights is not None

    @property
    def guarded(self) -> bool:
        """Whether what is non-finite may be hidden and must stay where it is seen; a cache has seen to that itself."""
        return not self.cached and (self.mask is not None or self.bias is not None or self.patched)


class Path(Protocol):
    """A way to compute softmax(score(scale · q kᵀ) + bias, mask) v: a module, or any object with these functions.

    `choice.PATHS` lists those of the library; `kernel=` takes any other in place of a name. Optional besides:
    `plan(request)`, a `Plan`, whose tiling `attend` finds in its inputs; and `capture(inputs)`, the "logits" and
    "weights" [..., N, T, S], of a path that holds them all. Such a path does patches of them too.
    """

    def refusal(self, request: Request, /) -> str:
        """Why it cannot do this, which is for whatever `attend` does not read; "" if it can."""
        ...

    def reluctance(self, request: Request, /) -> str:
        """Why "auto" does not take it though it can; "" if it may."""
        ...

    def attend(self, inputs: Inputs, /) -> tuple[Array, LogSumExp | None]:
        """The heads' outputs [..., N, T, Hv] in the dtype of v, and their log-sum-exp [..., N, T] if it has one."""
        ...


class Choice(NamedTuple):
    """A path, how it cuts the work (None: not at all), and why not each of the others."""

    kernel: str  # the name of the path
    path: Path
    why: str
    others: dict[str, str]
    tiling: Tiling | None = None
    values_at_once: int = 0
    visited: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.why}"]
        if self.tiling is not None:
            batch_heads, block_q, block_k = self.tiling
            share = "" if self.visited is None else f"; {self.visited:.0%} of the tiles are visited"
            heads = "one head" if batch_heads == 1 else f"{batch_heads} heads"
            lines.append(f"  {heads} at a time, tiles of {block_q} queries × {block_k} keys{share}")
        if self.values_at_once:
            lines.append(f"  where no gradient is taken: {self.values_at_once} heads at a time, whole rows")
        return "\n".join([*lines, *(f"not {name}: {why}" for name, why in self.others.items())])
