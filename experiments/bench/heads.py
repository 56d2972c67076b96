"""What is done with heads, and what it costs.

"remove each head": the losses without each head of an encoder of six layers of 16 heads, one at a time. "ours" is
`heads.ablation.of_stages`; "lifted" is `heads.importance.ablations`, which knows no model, on all heads of a layer at a
time; "loop" is a Python loop over the heads around one jitted forward pass with gates and unrolled layers. The loss is
the square of a fixed projection of the output, which costs next to nothing.

"remove half": an attention without every second of its 16 heads, "ours" with parameters that were sliced, "all-heads"
with all of them; what has to agree are all heads with gates of 0.

"capture": a long attention that also returns the weights of one head, "ours" of all queries, "rows" of 64 of them, and
"plain", which returns none. Here the memory is that of the output too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.bench import flops, layer
from experiments.bench.case import OURS, Build, Case, Ready, Row, Settings
from experiments.bench.measure import compiled, jax_ready, measure

LAYERS, HEADS = 6, 16
_EACH, _HALF, _CAPTURE = "remove each head", "remove half of the heads", "capture the weights of a head"
_ABLATED = {32: ((256, 8), (512, 8)), 64: ((256, 8),), 128: ((256, 8),)}  # T: (D, B), …
_HALVED = {128: 32, 512: 8, 2048: 1}  # T: B
_CAPTURED = (4096,)
_ROWS = 64
LENGTHS = tuple(sorted({*_ABLATED, *_HALVED, *_CAPTURED}))


def cases(lengths: Sequence[int]) -> list[Case]:
    """Removals of each head for short lengths, of half of them from 128 on, capture for long ones."""
    each = [ablation_case(t, d, b) for t in lengths for d, b in _ABLATED.get(t, ())]
    half = [half_case(t, layer.D_MODEL, _HALVED[t]) for t in lengths if t in _HALVED]
    return each + half + [capture_case(t, layer.D_MODEL, 1) for t in lengths if t in _CAPTURED]


def rows(case: Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """A row for each of the implementations that the case is about."""
    return measure(case, {n: _PARTS[n][case.what] for n in names if case.what in _PARTS[n]}, settings.seconds)


def ablation_case(length: int, d_model: int, batch: int, *, heads: int = HEADS) -> Case:
    """All removals of one head; its operations are those of a loop."""
    core = flops.attention(batch, heads, length, length, d_model // heads)
    one_layer = core + 12 * flops.linear(batch * length, d_model, d_model)
    return _case(_EACH, length, d_model, batch, heads, LAYERS * heads * LAYERS * one_layer)


def half_case(length: int, d_model: int, batch: int, *, heads: int = HEADS) -> Case:
    """One attention; its operations are those of all heads."""
    return _case(_HALF, length, d_model, batch, heads, _attention_flops(length, d_model, batch, heads))


def capture_case(length: int, d_model: int, batch: int, *, heads: int = HEADS) -> Case:
    """One attention."""
    return _case(_CAPTURE, length, d_model, batch, heads, _attention_flops(length, d_model, batch, heads))


def _attention_flops(length: int, d_model: int, batch: int, heads: int) -> float:
    core = flops.attention(batch, heads, length, length, d_model // heads)
    return core + 4 * flops.linear(batch * length, d_model, d_model)


def _case(what: str, length: int, d_model: int, batch: int, heads: int, operations: float) -> Case:
    return Case(
        name="heads", what=what, backward=False, causal=False, batch=batch, length=length, keys=length,
        heads=heads, width=d_model // heads, d_model=d_model, flops=operations,
    )  # fmt: skip


def _encoder(case: Case) -> tuple[Any, Any, Any, Callable]:
    """Config, parameters, input [B, T, D], and the loss of every sentence from the output."""
    import jax
    import jax.numpy as jnp

    from mhajax import transformer

    config = transformer.Config(d_model=case.d_model, num_heads=case.heads, num_layers=LAYERS, unroll=LAYERS)
    params = jax.jit(partial(transformer.init_params, config=config))(jax.random.key(0))
    x, direction = jax.random.normal(jax.random.key(1), (2, case.batch, case.length, case.d_model))
    readout = lambda features: jnp.sum(jnp.einsum("btd,btd->bt", features, direction) ** 2, axis=-1)  # noqa: E731
    return config, params, x, readout


def _each_ours(case: Case) -> Ready:
    from mhajax import transformer
    from mhajax.heads import ablation

    config, params, x, readout = _encoder(case)

    def removals(params, x):
        stage = transformer.Stage(params, config, x, {}, {"attention": "attention"})
        return ablation.of_stages([stage], readout).attention

    return jax_ready(removals, (params, x), lambda losses: [np.asarray(losses)])


def _each_lifted(case: Case) -> Ready:
    import jax.numpy as jnp

    from mhajax.heads import importance

    function, arguments = _gated(case)
    removals = lambda *given: importance.ablations(  # noqa: E731
        lambda gates: function(*given, gates), jnp.ones((LAYERS, case.heads)), batch_size=case.heads
    )
    return jax_ready(removals, arguments, lambda losses: [np.asarray(losses)])


def _each_in_a_loop(case: Case) -> Ready:
    import jax

    function, arguments = _gated(case)
    gates = [
        jax.device_put(1 - one.reshape(LAYERS, case.heads)) for one in np.eye(LAYERS * case.heads, dtype=np.float32)
    ]
    one, temporary = compiled(function, *arguments, gates[0])
    call = lambda: jax.block_until_ready([one(*arguments, removed) for removed in gates])  # noqa: E731
    by_head = lambda: np.stack(call()).reshape(LAYERS, case.heads, case.batch)  # noqa: E731
    return Ready(call, lambda: [np.swapaxes(by_head(), 1, 2)], temporary)


def _gated(case: Case) -> tuple[Callable, tuple]:
    """The losses [B] as a function of (params, x, gates [L, N]), and its first arguments."""
    from mhajax import PerAttention, transformer

    config, params, x, readout = _encoder(case)

    def losses(params, x, gates):
        return readout(transformer.apply(params, x, config, gates=PerAttention(attention=gates)))

    return losses, (params, x)


def _half_ours(case: Case) -> Ready:
    from mhajax import attention

    config = attention.Config(d_model=case.d_model, num_heads=case.heads // 2, head_dim=case.width)
    return layer.prepared(
        lambda params, x: attention.apply(params, x, config),
        lambda weights: _params({name: w[::2] for name, w in weights.items()}),
        case,
    )


def _half_all(case: Case) -> Ready:
    import jax
    import jax.numpy as jnp

    from mhajax import attention

    config = attention.Config(d_model=case.d_model, num_heads=case.heads)
    plain = layer.prepared(lambda params, x: attention.apply(params, x, config), _params, case)
    gates = 1.0 - jnp.arange(case.heads) % 2
    gated = jax.jit(lambda params, x: attention.apply(params, x, config, gates=gates))
    params = _params(layer.weights(case))
    return plain._replace(answer=lambda: [np.asarray(gated(params, layer.streams(case)[0]))])


def _capture(queries: int | None, case: Case) -> Ready:
    """The layer with the weights of a head in the middle, of all queries (None), of some, or (0) of none."""
    import jax

    from mhajax import attention
    from mhajax.interventions import Capture

    config = attention.Config(d_model=case.d_model, num_heads=case.heads)
    rows = None if queries is None else tuple(range(0, case.length, max(1, case.length // max(queries, 1))))
    capture = () if queries == 0 else Capture(("weights",), heads=(case.heads // 2,), rows=rows)
    function = lambda params, x: attention.apply_captured(params, x, config, capture=capture)  # noqa: E731
    arguments = _params(layer.weights(case)), layer.streams(case)[0]
    program, temporary = compiled(function, *arguments)
    arguments = jax.device_put(arguments)
    returned = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(function, *arguments)))
    call = lambda: jax.block_until_ready(program(*arguments))  # noqa: E731
    return Ready(call, lambda: [np.asarray(call()[0])], None if temporary is None else temporary + returned)


def _params(weights: dict[str, Any]) -> Any:
    from mhajax import attention

    return attention.Params(**weights)


# Who does what.
_PARTS: dict[str, dict[str, Build]] = {
    OURS: {_EACH: _each_ours, _HALF: _half_ours, _CAPTURE: partial(_capture, None)},
    "lifted": {_EACH: _each_lifted},
    "loop": {_EACH: _each_in_a_loop},
    "all-heads": {_HALF: _half_all},
    "rows": {_CAPTURE: partial(_capture, _ROWS)},
    "plain": {_CAPTURE: partial(_capture, 0)},
}
BUILDERS = tuple(_PARTS)
