"""A process that trains one implementation of the language model, a step whenever it is told to.

    python -m experiments.bench.worker KIND FOLDER KEEP

It reads lines from standard input: "step" does a step. It answers every line, and its own start, with a JSON object a
line: the loss, and the most memory that the process ever had. FOLDER holds `size.json` and `arrays.npz`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from experiments import host
from experiments.bench.models import Size


def main(kind: str, folder: str, keep: str) -> None:
    """Answer until standard input ends."""
    if keep == "keep":
        host.keep_memory()
    size = Size(**json.loads((Path(folder) / "size.json").read_text()))
    with np.load(Path(folder) / "arrays.npz") as stored:
        arrays = dict(stored)
    try:
        if kind == "torch":
            import torch  # noqa: F401  # type: ignore

            from experiments.bench.models import of_torch

            base, step = peak(), of_torch.stepper(size, arrays)
        else:
            import jax  # noqa: F401

            program = jax_program(kind, size)
            base, step = peak(), _of_jax(program, arrays)
    except ImportError as error:
        print(json.dumps({"reason": f"not installed: {error}"}), flush=True)
        return
    print(json.dumps({"base": base}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"loss": step(), "peak": peak()}), flush=True)


def jax_program(kind: str, size: Size) -> Callable:
    """The function of the arrays that gives a training step in JAX, and its state; imports what it needs."""
    if kind == "linen":
        from experiments.bench.models import of_linen as module
    elif kind == "nnx":
        from experiments.bench.models import of_nnx as module
    else:
        from experiments.bench.models import ours

        return partial(ours.program, size, unroll=size.layers if kind == "ours-unrolled" else 1)
    return partial(module.program, size)


def _of_jax(program: Callable, arrays: dict) -> Callable[[], float]:
    import jax

    function, state = program(arrays)
    step = jax.jit(function, donate_argnums=0)
    held = [jax.tree.map(lambda a: jax.numpy.array(a), state)]
    tokens = jax.numpy.asarray(arrays["tokens"], jax.numpy.int32)

    def call():
        loss, held[0] = step(held[0], tokens)
        return float(jax.block_until_ready((loss, held[0]))[0])

    return call


def peak() -> int | None:
    """The most bytes of memory that this process ever had; None where the system does not say.

    Linux counts in `ru_maxrss` what the process that started this one had, so it is asked elsewhere first.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
