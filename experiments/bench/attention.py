# pyright: reportMissingImports=false
"""Attention for given queries, keys and values: softmax(q kᵀ / √H) v.

Everybody gets the arrays in the layout that it wants, [B, T, N, H] or [B, N, T, H], and gives its gradients in the
same. The backward pass is the gradient with respect to q, k and v for a fixed random cotangent. Equinox has the
function, but does not export it; Haiku computes attention only inside of its layer. "plain" is softmax between two
einsums. Ours alone keeps NaN behind a mask, and gives zeros for a query whose keys are all masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.bench import flops, machine
from experiments.bench.case import OURS, Build, Cannot, Case, Ready, Row, Settings
from experiments.bench.measure import jax_ready, measure

BATCHES = {128: 32, 512: 8, 1024: 2, 2048: 1, 4096: 1, 8192: 1}
LENGTHS = tuple(BATCHES)
HEADS, WIDTH = 8, 64


def cases(lengths: Sequence[int]) -> list[Case]:
    """Forward and forward+backward, full and causal, for every length; short ones in batches."""
    shapes = [(BATCHES.get(t, max(1, 2048 // t)), t, t, HEADS, WIDTH) for t in lengths]
    return of_shapes("attention", shapes)


def rows(case: Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """A row for each of the implementations."""
    return measure(case, {name: BUILDERS[name] for name in names}, settings.seconds)


def of_shapes(name: str, shapes: Sequence[tuple[int, int, int, int, int]]) -> list[Case]:
    """The cases of shapes (B, T, S, N, H)."""
    return [
        Case(
            name=name, backward=backward, causal=causal,
            batch=b, length=t, keys=s, heads=n, width=h,
            flops=flops.attention(b, n, t, s, h, causal=causal, backward=backward),
        )
        for b, t, s, n, h in shapes
        for causal in ((False, True) if t > 1 else (False,))
        for backward in (False, True)
    ]  # fmt: skip


def arrays(case: Case) -> tuple[np.ndarray, ...]:
    """q, k, v and the cotangent, [B, N, T or S, H], the same for everybody."""
    random = np.random.default_rng(0)
    sizes = (case.length, case.keys, case.keys, case.length)
    return tuple(random.standard_normal((case.batch, case.heads, size, case.width), np.float32) for size in sizes)


def _of_jax(layout: str, make: Callable[[Case], Callable], case: Case) -> Ready:
    """An implementation in JAX: `make` gives a function of q, k and v in this layout."""
    import jax
    import jax.numpy as jnp

    attend = make(case)
    swap = lambda a: np.swapaxes(a, 1, 2) if layout == "BTNH" else a  # noqa: E731
    q, k, v, cotangent = (jnp.array(np.ascontiguousarray(swap(a))) for a in arrays(case))
    if not case.backward:
        return jax_ready(attend, (q, k, v), lambda out: [swap(np.asarray(out))])
    loss = lambda q, k, v, cotangent: jnp.sum(attend(q, k, v) * cotangent)  # noqa: E731
    function = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return jax_ready(function, (q, k, v, cotangent), lambda out: [swap(np.asarray(g)) for g in out[1]])


def visible(case: Case) -> Any:
    """bool [T, S], or None for all; made inside of the compiled function, as the users of the peers do."""
    import jax.numpy as jnp

    return jnp.tril(jnp.ones((case.length, case.keys), bool)) if case.causal else None


def _ours(case: Case) -> Callable:
    from mhajax import kernels, masks

    mask = masks.causal() if case.causal else None
    queries, keys = masks.tokens(case.length), masks.tokens(case.keys)
    return lambda q, k, v: kernels.attend(q, k, v, mask=mask, queries=queries, keys=keys)[0]


def choice(case: Case) -> str:
    """What `kernels.explain` says of ours."""
    import jax
    import jax.numpy as jnp

    from mhajax import kernels, masks

    q, k = (
        jax.ShapeDtypeStruct((case.batch, case.heads, t, case.width), jnp.float32) for t in (case.length, case.keys)
    )
    return str(kernels.explain(q, k, k, mask=masks.causal() if case.causal else None))


def jax_nn(case: Case) -> Callable:
    import jax

    return partial(jax.nn.dot_product_attention, is_causal=case.causal, implementation="xla")


def _linen(case: Case) -> Callable:
    from flax import linen

    return lambda q, k, v: linen.dot_product_attention(q, k, v, mask=visible(case))


def _nnx(case: Case) -> Callable:
    from flax import nnx

    return lambda q, k, v: nnx.dot_product_attention(q, k, v, mask=visible(case))


def _equinox(case: Case) -> Callable:
    import jax
    from equinox.nn import _attention

    one = lambda q, k, v: _attention.dot_product_attention(q, k, v, visible(case))  # noqa: E731
    return jax.vmap(jax.vmap(one))


def _haiku(case: Case) -> Ready:
    import haiku  # noqa: F401  # type: ignore

    raise Cannot("has no function for given q, k, v; see bench layer")


def tokamax(implementation: Any, case: Case) -> Callable:
    import tokamax as library  # type: ignore
    from absl import flags

    if not flags.FLAGS.is_parsed():  # tokamax would read our command line
        flags.FLAGS(["bench"])
    return partial(library.dot_product_attention, is_causal=case.causal, implementation=implementation)


def _plain(case: Case) -> Callable:
    """What one writes down without a library, in the layout that suits it."""
    import jax
    import jax.numpy as jnp

    def attend(q, k, v):
        logits = jnp.einsum("bnth,bnsh->bnts", q, k) * case.width**-0.5
        if case.causal:
            logits = jnp.where(visible(case), logits, -jnp.inf)
        return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(logits), v)

    return attend


def _attnax(case: Case) -> Callable:
    import attnax  # type: ignore

    return lambda q, k, v: attnax.standard_attention(q, k, v, mask=visible(case))


def _torch(case: Case) -> Ready:
    import torch

    torch.set_num_threads(machine.threads())
    q, k, v, cotangent = (torch.from_numpy(a) for a in arrays(case))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=case.causal)
    if not case.backward:

        def forward():
            with torch.inference_mode():
                return attend(q, k, v)

        return Ready(forward, lambda: [forward().numpy()])

    for array in (q, k, v):
        array.requires_grad_(True)
    call = lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), cotangent)  # noqa: E731
    return Ready(call, lambda: [g.numpy() for g in call()])


BUILDERS: dict[str, Build] = {
    OURS: partial(_of_jax, "BNTH", _ours),
    "jax.nn": partial(_of_jax, "BTNH", jax_nn),
    "linen": partial(_of_jax, "BTNH", _linen),
    "nnx": partial(_of_jax, "BTNH", _nnx),
    "equinox": partial(_of_jax, "BNTH", _equinox),
    "haiku": _haiku,
    "tokamax-xla": partial(_of_jax, "BTNH", partial(tokamax, "xla")),
    "tokamax-chunked": partial(_of_jax, "BTNH", partial(tokamax, "xla_chunked")),
    "attnax": partial(_of_jax, "BNTH", _attnax),
    "plain": partial(_of_jax, "BNTH", _plain),
    "torch": _torch,
}
