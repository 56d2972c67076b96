# pyright: reportMissingImports=false
"""One more token: a layer of attention, projections included, that has a cache of the keys and values before it.

The cache is full but for the last place, to which the token goes, so every implementation reads `length` keys. In JAX
the cache is donated, and its index is set anew at every call; otherwise an update would copy it. Torch writes into its
tensors in place. Equinox and Haiku have no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.bench import flops, layer, machine
from experiments.bench.case import OURS, Build, Cannot, Case, Ready, Row, Settings
from experiments.bench.measure import compiled, measure

LENGTHS = (1024,)
BATCHES = (1, 8)


def cases(lengths: Sequence[int]) -> list[Case]:
    """One token after length - 1 others, alone and in a batch of eight."""
    d, n = layer.D_MODEL, layer.HEADS
    return [
        Case(
            name="decode", what="one token", backward=False, causal=True,
            batch=b, length=1, keys=s, heads=n, width=d // n, d_model=d,
            flops=flops.attention(b, n, 1, s, d // n) + 4 * flops.linear(b, d, d),
        )
        for s in lengths
        for b in BATCHES
    ]  # fmt: skip


def rows(case: Case, names: Sequence[str], settings: Settings) -> list[Row]:
    """A row for each of the implementations."""
    return measure(case, {name: BUILDERS[name] for name in names}, settings.seconds)


def seen(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the tokens before, [B, N, S, H]; what is in the last place must not matter."""
    shape = (2, case.batch, case.heads, case.keys, case.width)
    k, v = np.random.default_rng(3).standard_normal(shape, np.float32)
    return k, v


def _of_jax(make: Callable[[Case], tuple[Callable, Any, Any]], case: Case) -> Ready:
    """An implementation in JAX: `make` gives (params, x, cache, index) → (out, cache), its params and its cache."""
    import jax
    import jax.numpy as jnp

    step, params, cache = make(case)
    params, cache = jax.tree.map(jnp.array, (params, cache))
    x = jnp.array(layer.streams(case)[0])
    index = jnp.int32(case.keys - 1)
    program, temporary = compiled(step, params, x, cache, index, donate=(2,))
    state = [cache]

    def call():
        out, state[0] = program(params, x, state[0], index)
        return out.block_until_ready()

    return Ready(call, lambda: [np.asarray(call())], temporary)


def _ours(case: Case) -> tuple[Callable, Any, Any]:
    from mhajax import attention

    config = attention.Config(d_model=case.d_model, num_heads=case.heads)
    params = layer.ours(case)[1](layer.weights(case))
    return partial(_extend_ours, config=config), params, seen(case)


def _extend_ours(params: Any, x: Any, arrays: tuple[Any, Any], length: Any, *, config: Any) -> tuple[Any, Any]:
    """The only place that knows how our cache is used."""
    from mhajax import cache, masks

    out, after, _ = cache.extend(params, x, cache.Cache(*arrays, length), config, mask=masks.causal())
    return out, (after.k, after.v)


def _flax_cache(case: Case) -> tuple[np.ndarray, ...]:
    """Keys and values as Flax has them, [B, S, N, H]."""
    return tuple(np.ascontiguousarray(a.swapaxes(1, 2)) for a in seen(case))


def _linen(case: Case) -> tuple[Callable, Any, Any]:
    from flax import linen

    attend = linen.MultiHeadDotProductAttention(
        num_heads=case.heads, qkv_features=case.d_model, use_bias=False, deterministic=True, decode=True
    )
    k, v = _flax_cache(case)

    def step(params, x, cache, index):
        cache = {**cache, "cache_index": index}
        out, changed = attend.apply({"params": params, "cache": cache}, x, mutable=["cache"])
        return out, changed["cache"]

    cache = {"cached_key": k, "cached_value": v, "cache_index": np.int32(case.keys - 1)}
    return step, layer.flax_kernels(layer.weights(case)), cache


def _nnx(case: Case) -> tuple[Callable, Any, Any]:
    import jax
    from flax import nnx

    attend = nnx.MultiHeadAttention(
        case.heads, case.d_model, use_bias=False, deterministic=True, decode=True, rngs=nnx.Rngs(0)
    )
    attend.init_cache((case.batch, case.keys, case.d_model))
    graph, params, cache, rest = nnx.split(attend, nnx.Param, nnx.Cache, ...)
    k, v = _flax_cache(case)
    start = {"cached_key": k, "cached_value": v, "cache_index": np.int32(case.keys - 1)}
    places, structure = jax.tree_util.tree_flatten_with_path(cache)
    names = [path[0].key for path, _ in places]

    def step(params, x, leaves, index):
        leaves = [index if name == "cache_index" else a for name, a in zip(names, leaves, strict=True)]
        module = nnx.merge(graph, params, jax.tree.unflatten(structure, leaves), rest)
        out = module(x)
        return out, jax.tree.leaves(nnx.state(module, nnx.Cache))

    return step, layer.nnx_state(params, layer.weights(case)), [start[name] for name in names]


def _no_cache(package: str, case: Case) -> Ready:
    __import__(package)
    raise Cannot("has no cache")


def _torch(case: Case) -> Ready:
    import torch

    torch.set_num_threads(machine.threads())
    functional = torch.nn.functional
    into, out_of = (torch.tensor(np.array(a)) for a in layer.torch_rows(layer.weights(case)))
    x = torch.from_numpy(layer.streams(case)[0].copy())
    keys, values = (torch.from_numpy(a.copy()) for a in seen(case))
    last = case.keys - 1

    def call():
        with torch.inference_mode():
            q, k, v = functional.linear(x, into).view(case.batch, 3, case.heads, 1, case.width).unbind(1)
            keys[:, :, last : last + 1] = k
            values[:, :, last : last + 1] = v
            heads = functional.scaled_dot_product_attention(q, keys[:, :, : last + 1], values[:, :, : last + 1])
            return functional.linear(heads.transpose(1, 2).reshape(case.batch, 1, -1), out_of)

    return Ready(call, lambda: [call().numpy()])


BUILDERS: dict[str, Build] = {
    OURS: partial(_of_jax, _ours),
    "linen": partial(_of_jax, _linen),
    "nnx": partial(_of_jax, _nnx),
    "equinox": partial(_no_cache, "equinox"),
    "haiku": partial(_no_cache, "haiku"),
    "torch": _torch,
}
