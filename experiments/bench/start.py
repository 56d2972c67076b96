"""What has to be waited for before the first result: to import, and to compile.

Imports are timed in fresh processes, Python's own start and that of JAX included. Compiling is tracing, lowering and
XLA's work, with JAX's caches emptied before: a layer forward+backward (D = 512, N = 8, B = 1), and the training step of
a language model of twelve layers (D = 64). There, "ours" is the scanned stack that `language_model` has without asking,
"ours-unrolled" what is fastest on a CPU; the models in Flax are plain loops over layers, as most are written.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.bench import layer, models, timing, worker
from experiments.bench.case import OURS, Cannot, Case, Row, Settings

LENGTHS = (512,)
BUILDERS = (OURS, "ours-unrolled", "jax", "linen", "nnx", "equinox", "haiku", "torch")
_MODULES = {OURS: "mhajax", "jax": "jax", "linen": "flax.linen", "nnx": "flax.nnx", "equinox": "equinox",
            "haiku": "haiku", "torch": "torch"}  # fmt: skip
_IMPORT, _LAYER, _MODEL = "import", "compile a layer", "compile a training step of 12 layers"
_ROOT = Path(__file__).parents[2]


def cases(lengths: Sequence[int]) -> list[Case]:
    """Importing, and for every length compiling a layer and a model."""
    common: dict[str, Any] = {"name": "start", "batch": 1, "flops": 0.0}
    found = [Case(what=_IMPORT, causal=False, backward=False, length=0, keys=0, heads=0, width=0, **common)]
    for t in lengths:
        for what, d, n in ((_LAYER, layer.D_MODEL, layer.HEADS), (_MODEL, 64, 4)):
            found.append(
                Case(
                    what=what, causal=True, backward=True, length=t, keys=t, heads=n, width=d // n, d_model=d, **common
                )
            )
    return found


def rows(case: Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """A row for each of the implementations that have this to wait for."""
    makers = {_IMPORT: _import, _LAYER: _layer, _MODEL: _model}
    calls, notes = dict[str, Callable[[], Any]](), dict[str, str]()
    for name in names:
        try:
            calls[name] = makers[case.what](name, case)
        except ImportError as error:
            notes[name] = f"not installed: {error}"
        except Cannot as error:
            notes[name] = str(error)
    times, _ = timing.interleave(calls, settings.seconds, warm=False)
    found = []
    for name in names:
        if name in notes:
            found.append(Row(case=case, implementation=name, note=notes[name]))
            continue
        seen = timing.summary(times[name])
        found.append(
            Row(
                case=case, implementation=name,
                milliseconds=seen.median * 1e3, spread=seen.spread * 1e3, rounds=seen.rounds,
                relative_to_ours=timing.ratio(times[name], times[OURS]),
            )
        )  # fmt: skip
    return found


def _import(name: str, case: Case) -> Callable[[], Any]:
    module = _MODULES.get(name)
    if module is None:
        raise Cannot("is the same package as ours")
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ImportError(f"No module named '{module}'")
    command = [sys.executable, "-c", f"import {module}"]
    return lambda: subprocess.run(command, check=True, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _layer(name: str, case: Case) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    makers = {OURS: layer.ours, "linen": layer.linen, "nnx": layer.nnx, "equinox": layer.equinox, "haiku": layer.haiku}
    if name not in makers:
        raise Cannot("has no layer of its own to compile")
    apply, convert = makers[name](case)
    params = jax.jit(convert)(layer.weights(case))
    x, cotangent = (jnp.array(a) for a in layer.streams(case))
    loss = lambda params, x, cotangent: jnp.sum(apply(params, x) * cotangent)  # noqa: E731
    return partial(_compile, jax.value_and_grad(loss, argnums=(0, 1)), params, x, cotangent)


def _model(name: str, case: Case) -> Callable[[], Any]:
    if name not in models.KINDS or name == "torch":
        raise Cannot("nothing is compiled" if name == "torch" else "see linen and nnx")
    size = models.Size(layers=12, d_model=case.d_model, heads=case.heads, length=case.length, batch=1, vocabulary=512)
    arrays = models.arrays(size)
    function, state = worker.jax_program(name, size)(arrays)
    return partial(_compile, function, state, arrays["tokens"].astype("int32"))


def _compile(function: Callable, *arguments: Any) -> None:
    import jax

    jax.clear_caches()
    jax.jit(function).lower(*arguments).compile()
