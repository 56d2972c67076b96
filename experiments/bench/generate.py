"""A whole text: 128 tokens, greedily, by a small language model with a cache; `models` says which.

Everybody starts from one token and an empty cache with room for all, and has to write the same text. In JAX the loop
is one program; "ours" is `decoding.generate` with `language_model.extend`, Linen a scan with `decode=True`, torch an
eager loop that writes keys and values into tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.bench import flops, models
from experiments.bench.case import OURS, Build, Case, Ready, Row, Settings
from experiments.bench.measure import compiled, measure

LENGTHS = (128,)
BATCHES = (1, 8)


def cases(lengths: Sequence[int]) -> list[Case]:
    """Texts of these lengths, one alone and eight at a time."""
    return [case_of(models.Size(length=t, batch=b)) for t in lengths for b in BATCHES]


def case_of(size: models.Size) -> Case:
    """The case that a size is."""
    b, t, d = size.batch, size.length, size.d_model
    core = flops.attention(b, size.heads, t, t, size.width, causal=True)
    maps = 4 * flops.linear(b * t, d, d) + 2 * flops.linear(b * t, d, 4 * d)
    return Case(
        name="generate", what="a whole text", backward=False, causal=True,
        batch=b, length=t, keys=t, heads=size.heads, width=size.width, d_model=d,
        flops=size.layers * (core + maps) + flops.linear(b * t, d, size.vocabulary),
    )  # fmt: skip


def rows(case: Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """A row for each of the implementations."""
    return of_size(models.Size(length=case.length, batch=case.batch), names, settings)


def of_size(size: models.Size, names: Sequence[str], settings: Settings) -> list[Row]:
    """The rows for any size of the model."""
    builders: dict[str, Build] = {name: lambda _, name=name: BUILDERS[name](size) for name in names}
    return measure(case_of(size), builders, settings.seconds)


def _of_jax(make: Callable[[models.Size, dict], tuple[Callable, Any]], size: models.Size) -> Ready:
    """An implementation in JAX: `make` gives (params, first tokens [B]) → tokens [B, length], and the params."""
    import jax
    import jax.numpy as jnp

    arrays = models.arrays(size)
    write, params = make(size, arrays)
    params, first = jax.tree.map(jnp.array, params), jnp.asarray(arrays["tokens"][:, 0], jnp.int32)
    program, temporary = compiled(write, params, first)
    call = lambda: program(params, first).block_until_ready()  # noqa: E731
    return Ready(call, lambda: [np.asarray(call())], temporary)


def _ours(size: models.Size, arrays: dict) -> tuple[Callable, Any]:
    from experiments.bench.models import ours

    return ours.writer(size, arrays)


def _linen(size: models.Size, arrays: dict) -> tuple[Callable, Any]:
    from experiments.bench.models import of_linen

    return of_linen.writer(size, arrays)


def _torch(size: models.Size) -> Ready:
    import torch  # noqa: F401  # type: ignore

    from experiments.bench.models import of_torch

    write = of_torch.writer(size, models.arrays(size))
    return Ready(write, lambda: [write().numpy()])


BUILDERS: dict[str, Callable[[models.Size], Ready]] = {
    OURS: partial(_of_jax, _ours),
    "linen": partial(_of_jax, _linen),
    "torch": _torch,
}
