# pyright: reportMissingImports=false
"""A whole layer: projections to queries, keys and values, attention, projection of the heads, all without biases.

Everybody gets the same weights in its own layout. The backward pass is the gradient with respect to the weights and
the input for a fixed random cotangent. "jax.nn" and the "tokamax" ones are a layer written by hand around that
function, with the weights of Flax; "torch" is one around `scaled_dot_product_attention` with one matrix for q, k and v;
"torch-mha" is `nn.MultiheadAttention`; "vmap" is one head written down in four lines and lifted over heads and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.bench import attention, flops, machine
from experiments.bench.case import OURS, Build, Case, Ready, Row, Settings
from experiments.bench.measure import jax_ready, measure

BATCHES = {128: 32, 512: 8, 2048: 1}
LENGTHS = tuple(BATCHES)
D_MODEL, HEADS = 512, 8


def cases(lengths: Sequence[int]) -> list[Case]:
    """Forward and forward+backward, full and causal, for every length; short ones in batches."""
    return [layer_case("layer", BATCHES.get(t, max(1, 4096 // t)), t, causal, backward)
            for t in lengths for causal in (False, True) for backward in (False, True)]  # fmt: skip


def rows(case: Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """A row for each of the implementations."""
    return measure(case, {name: BUILDERS[name] for name in names}, settings.seconds)


def layer_case(
    name: str, batch: int, length: int, causal: bool, backward: bool, *, d_model: int = D_MODEL, heads: int = HEADS
) -> Case:
    """Self-attention of `length` tokens."""
    width = d_model // heads
    core = flops.attention(batch, heads, length, length, width, causal=causal, backward=backward)
    return Case(
        name=name, backward=backward, causal=causal, batch=batch, length=length, keys=length,
        heads=heads, width=width, d_model=d_model,
        flops=core + 4 * flops.linear(batch * length, d_model, d_model, backward=backward),
    )  # fmt: skip


def weights(case: Case) -> dict[str, np.ndarray]:
    """w_q, w_k, w_v [N, D, H] and w_o [N, H, D], the same for everybody."""
    random, n, d, h = np.random.default_rng(1), case.heads, case.d_model, case.width
    draw = lambda *shape: random.standard_normal(shape, np.float32) * np.float32(d**-0.5)  # noqa: E731
    return {"w_q": draw(n, d, h), "w_k": draw(n, d, h), "w_v": draw(n, d, h), "w_o": draw(n, h, d)}


def streams(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The input and the cotangent of the output, [B, T, D]."""
    x, cotangent = np.random.default_rng(2).standard_normal((2, case.batch, case.length, case.d_model), np.float32)
    return x, cotangent


def back(convert: Callable[[dict], Any], case: Case, gradient: Any) -> list[np.ndarray]:
    """A gradient in a peer's layout as one in ours: layouts are linear maps, so their transpose does it."""
    import jax

    (ours,) = jax.vjp(convert, weights(case))[1](gradient)
    return [np.asarray(ours[name]) for name in sorted(ours)]


def prepared(apply: Callable[[Any, Any], Any], convert: Callable[[dict], Any], case: Case) -> Ready:
    """An implementation in JAX from its function of (params, x) and its layout of the weights."""
    import jax
    import jax.numpy as jnp

    params = jax.jit(convert)(weights(case))
    x, cotangent = (jnp.array(a) for a in streams(case))
    if not case.backward:
        return jax_ready(apply, (params, x), lambda out: [np.asarray(out)])
    loss = lambda params, x, cotangent: jnp.sum(apply(params, x) * cotangent)  # noqa: E731

    def answer(out):
        d_params, d_x = out[1]
        return [np.asarray(d_x), *back(convert, case, d_params)]

    return jax_ready(jax.value_and_grad(loss, argnums=(0, 1)), (params, x, cotangent), answer)


def _of_jax(make: Callable[[Case], tuple[Callable, Callable]], case: Case) -> Ready:
    return prepared(*make(case), case)


def ours(case: Case) -> tuple[Callable, Callable]:
    from mhajax import attention, masks

    config = attention.Config(d_model=case.d_model, num_heads=case.heads)
    mask = masks.causal() if case.causal else None
    return partial(_apply_ours, config=config, mask=mask), lambda w: attention.Params(**w)


def _apply_ours(params: Any, x: Any, *, config: Any, mask: Any) -> Any:
    from mhajax import attention

    return attention.apply(params, x, config, mask=mask)


def _by_hand(core: Callable[[Case], Callable], case: Case) -> tuple[Callable, Callable]:
    """A layer around a function of q, k, v [B, T, N, H]."""
    import jax.numpy as jnp

    attend = core(case)

    def apply(params, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, params[name]) for name in ("w_q", "w_k", "w_v"))
        return jnp.einsum("btnh,nhd->btd", attend(q, k, v), params["w_o"])

    convert = lambda w: {name: a if name == "w_o" else a.transpose(1, 0, 2) for name, a in w.items()}  # noqa: E731
    return apply, convert


def flax_kernels(w: dict) -> dict[str, Any]:
    """The weights under the names of Flax."""
    names = {"w_q": "query", "w_k": "key", "w_v": "value"}
    return {
        **{flax: {"kernel": w[name].transpose(1, 0, 2)} for name, flax in names.items()},  # [D, N, H]
        "out": {"kernel": w["w_o"]},  # [N, H, D]
    }


def linen(case: Case) -> tuple[Callable, Callable]:
    from flax import linen

    layer = linen.MultiHeadDotProductAttention(
        num_heads=case.heads, qkv_features=case.d_model, use_bias=False, deterministic=True
    )
    apply = lambda params, x: layer.apply({"params": params}, x, mask=attention.visible(case))  # noqa: E731
    return apply, flax_kernels


def nnx(case: Case) -> tuple[Callable, Callable]:
    from flax import nnx

    layer = nnx.MultiHeadAttention(
        case.heads, case.d_model, use_bias=False, deterministic=True, decode=False, rngs=nnx.Rngs(0)
    )
    graph, state, rest = nnx.split(layer, nnx.Param, ...)
    apply = lambda params, x: nnx.merge(graph, params, rest)(x, mask=attention.visible(case))  # noqa: E731
    return apply, partial(nnx_state, state)


def nnx_state(like: Any, w: dict) -> Any:
    """The weights as an NNX state of the same structure, whatever a version of Flax makes of its leaves."""
    import jax

    kernels = flax_kernels(w)
    places, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [kernels[path[0].key]["kernel"] for path, _ in places])


def equinox(case: Case) -> tuple[Callable, Callable]:
    import equinox as library
    import jax

    layer = library.nn.MultiheadAttention(case.heads, case.d_model, key=jax.random.key(0))
    arrays, rest = library.partition(layer, library.is_array)

    def apply(params, x):
        whole = library.combine(params, rest)
        return jax.vmap(lambda x: whole(x, x, x, attention.visible(case)))(x)

    where = lambda l: (l.query_proj.weight, l.key_proj.weight, l.value_proj.weight, l.output_proj.weight)  # noqa: E731, E741
    flat = lambda w: tuple(w[name].transpose(0, 2, 1).reshape(-1, case.d_model) for name in ("w_q", "w_k", "w_v"))  # noqa: E731
    convert = lambda w: library.tree_at(where, arrays, (*flat(w), w["w_o"].reshape(-1, case.d_model).T))  # noqa: E731
    return apply, convert


def haiku(case: Case) -> tuple[Callable, Callable]:
    import haiku as library  # type: ignore

    def layer(x):
        make = library.initializers.Constant(0.0)
        attend = library.MultiHeadAttention(
            case.heads, case.width, w_init=make, with_bias=False, model_size=case.d_model
        )
        mask = attention.visible(case)
        return attend(x, x, x, None if mask is None else mask[None, None])

    names = {"w_q": "query", "w_k": "key", "w_v": "value", "w_o": "linear"}

    def convert(w):
        flat = {name: a.transpose(1, 0, 2).reshape(case.d_model, -1) for name, a in w.items() if name != "w_o"}
        flat["w_o"] = w["w_o"].reshape(-1, case.d_model)
        return {f"multi_head_attention/{names[name]}": {"w": a} for name, a in flat.items()}

    transformed = library.without_apply_rng(library.transform(layer))
    return transformed.apply, convert


def _vmap(case: Case) -> tuple[Callable, Callable]:
    import jax
    import jax.numpy as jnp

    def head(w, x):
        logits = (x @ w["w_q"]) @ (x @ w["w_k"]).T * case.width**-0.5
        if case.causal:
            logits = jnp.where(attention.visible(case), logits, -jnp.inf)
        return jax.nn.softmax(logits) @ (x @ w["w_v"]) @ w["w_o"]

    one = lambda params, x: jnp.sum(jax.vmap(head, in_axes=(0, None))(params, x), axis=0)  # noqa: E731
    return jax.vmap(one, in_axes=(None, 0)), lambda w: w


def torch_rows(w: dict) -> tuple[Any, Any]:
    """in_proj [3D, D] and out_proj [D, N·H] as torch has them, (out, in)."""
    import jax.numpy as jnp

    d_model = w["w_o"].shape[-1]
    rows = [w[name].transpose(0, 2, 1).reshape(-1, d_model) for name in ("w_q", "w_k", "w_v")]
    return jnp.concatenate(rows), w["w_o"].reshape(-1, d_model).T


def _torch(case: Case) -> Ready:
    import torch

    functional = torch.nn.functional

    def apply(weights, x):
        shape = (case.batch, case.length, 3, case.heads, case.width)
        q, k, v = functional.linear(x, weights[0]).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        return functional.linear(heads.transpose(1, 2).reshape(case.batch, case.length, -1), weights[1])

    rows = [torch.tensor(np.array(a)) for a in torch_rows(weights(case))]
    return _of_torch(apply, rows, case)


def _torch_mha(case: Case) -> Ready:
    import torch

    layer = torch.nn.MultiheadAttention(case.d_model, case.heads, bias=False, batch_first=True)
    rows = [layer.in_proj_weight, layer.out_proj.weight]
    with torch.no_grad():
        for parameter, values in zip(rows, torch_rows(weights(case)), strict=True):
            parameter.copy_(torch.tensor(np.array(values)))
    layer.train(case.backward)
    hidden = torch.nn.Transformer.generate_square_subsequent_mask(case.length) if case.causal else None
    apply = lambda _, x: layer(x, x, x, need_weights=False, attn_mask=hidden, is_causal=case.causal)[0]  # noqa: E731
    return _of_torch(apply, rows, case)


def _of_torch(apply: Callable, rows: list, case: Case) -> Ready:
    import torch

    torch.set_num_threads(machine.threads())
    x, cotangent = (torch.from_numpy(a.copy()) for a in streams(case))
    if not case.backward:

        def forward():
            with torch.inference_mode():
                return apply(rows, x)

        return Ready(forward, lambda: [forward().numpy()])

    for array in (x, *rows):
        array.requires_grad_(True)
    call = lambda: torch.autograd.grad(apply(rows, x), (x, *rows), cotangent)  # noqa: E731

    def answer():
        d_x, *d_rows = (g.numpy() for g in call())
        return [d_x, *back(torch_rows, case, tuple(d_rows))]

    return Ready(call, answer)


BUILDERS: dict[str, Build] = {
    OURS: partial(_of_jax, ours),
    "jax.nn": partial(_of_jax, partial(_by_hand, attention.jax_nn)),
    "linen": partial(_of_jax, linen),
    "nnx": partial(_of_jax, nnx),
    "equinox": partial(_of_jax, equinox),
    "haiku": partial(_of_jax, haiku),
    "tokamax-xla": partial(_of_jax, partial(_by_hand, partial(attention.tokamax, "xla"))),
    "tokamax-chunked": partial(_of_jax, partial(_by_hand, partial(attention.tokamax, "xla_chunked"))),
    "vmap": partial(_of_jax, _vmap),
    "torch": _torch,
    "torch-mha": _torch_mha,
}
