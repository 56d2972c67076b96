"""Real layers of other libraries: how they are made and run, and how a fresh one takes parameters back."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from reference import numbers

from mhajax import convert
from mhajax.attention import Config, Params

B, T, S, D, N, K, H, HV = 2, 11, 17, 13, 6, 3, 5, 7
X = numbers(1, B, T, D, dtype=np.float64)
MEMORY = numbers(2, B, S, D, dtype=np.float64)
SHAPE: dict[str, Any] = dict(d_model=D, num_heads=N, head_dim=H)
grouped_nnx = (
    "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters
)  # newer than the oldest supported


def filled(tree: Any, seed: int = 3) -> Any:
    """The tree with normal numbers in its arrays, in float64."""
    random = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape) / np.sqrt(D))  # noqa: E731
    return jax.tree.map(lambda leaf: draw(leaf) if hasattr(leaf, "shape") else leaf, tree)


class Layer(NamedTuple):
    """A real layer: what holds its parameters, how to run that, how a fresh one takes parameters back."""

    source: Any
    run: Callable[[Any, Any, Any], Any]
    put: Callable[[Any], Any]
    config: Config
    there: Callable[..., tuple[Params, Config]]
    back: Callable[..., Any]
    tolerance: float = 1e-12


def linen(use_bias: bool) -> Layer:
    layer = nn.MultiHeadDotProductAttention(num_heads=N, qkv_features=N * H, use_bias=use_bias)
    tree = filled(jax.eval_shape(layer.init, jax.random.key(0), X, MEMORY)["params"])
    run = jax.jit(lambda tree, x, memory: layer.apply({"params": tree}, x, memory))
    config = Config(**SHAPE, use_bias=use_bias)
    return Layer(tree, run, lambda tree: tree, config, convert.from_linen, convert.to_linen)


def nnx_module(**options: Any) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(N, D, N * H, decode=False, rngs=nnx.Rngs(0), **options)


def nnx_(use_bias: bool, **groups: int) -> Layer:
    if groups and not grouped_nnx:
        pytest.skip("this version of Flax NNX has no num_kv_heads")
    make = partial(nnx_module, use_bias=use_bias, **groups)
    source = nnx.state(make(), nnx.Param)
    nnx.replace_by_pure_dict(source, filled(nnx.to_pure_dict(source)))

    @jax.jit
    def run(state, x, memory):
        module = make()
        nnx.update(module, state)
        return module(x, memory)

    def put(tree):
        state = nnx.state(make(), nnx.Param)
        nnx.replace_by_pure_dict(state, tree)
        return state

    config = Config(**SHAPE, **groups, use_bias=use_bias)
    # NNX computes logits and softmax in float32, also for float64.
    return Layer(source, run, put, config, convert.from_nnx, convert.to_nnx, tolerance=1e-6)


def haiku(use_bias: bool) -> Layer:
    hk = pytest.importorskip("haiku")

    def model(x, memory):  # the layer beside something else
        make = partial(hk.MultiHeadAttention, N, H, value_size=HV, model_size=D, w_init=jnp.zeros)
        return make(with_bias=use_bias, name="cross")(x, memory, memory) + 0 * hk.Linear(1)(x)

    layer = hk.without_apply_rng(hk.transform(model))
    source = filled(jax.eval_shape(layer.init, jax.random.key(0), X, MEMORY))
    config = Config(**SHAPE, value_dim=HV, use_bias=use_bias)
    there = partial(convert.from_haiku, num_heads=N, name="cross")
    back = partial(convert.to_haiku, name="cross")
    return Layer(source, jax.jit(layer.apply), lambda tree: {**source, **tree}, config, there, back)


def equinox_module(*biased: str, **options: Any) -> Any:
    biases = {f"use_{name}_bias": True for name in biased}
    module = pytest.importorskip("equinox").nn.MultiheadAttention
    return module(N, D, qk_size=H, vo_size=HV, key=jax.random.key(0), **biases, **options)


def equinox(*biased: str) -> Layer:
    eqx = pytest.importorskip("equinox")
    source = filled(equinox_module(*biased))

    @eqx.filter_jit
    def run(module, x, memory):
        return jax.vmap(lambda x, memory: module(x, memory, memory))(x, memory)

    def put(tree):
        module = equinox_module(*biased)
        for name, new in tree.items():
            where = lambda m: (getattr(m, name).weight, getattr(m, name).bias)  # noqa: B023, E731
            new = (new["weight"], new.get("bias"))
            module = eqx.tree_at(where, module, new, is_leaf=lambda leaf: leaf is None)
        return module

    config = Config(**SHAPE, value_dim=HV, use_bias=bool(biased))
    return Layer(source, run, put, config, convert.from_equinox, convert.to_equinox)


def torch_module(**options: Any) -> Any:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(N * H, N, batch_first=True, dtype=torch.float64, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=(N * H) ** -0.5)
    return module


def torch_(use_bias: bool) -> Layer:
    torch = pytest.importorskip("torch")

    def run(module, x, memory):
        with torch.no_grad():
            memory = torch.tensor(memory)
            return module(torch.tensor(x), memory, memory, need_weights=False)[0].numpy()

    def put(tree):
        module = torch_module(bias=use_bias)
        module.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in tree.items()})
        return module

    config = Config(d_model=N * H, num_heads=N, use_bias=use_bias)
    return Layer(torch_module(bias=use_bias), run, put, config, convert.from_torch, convert.to_torch)


LAYERS: dict[str, Callable[[], Layer]] = {
    "linen": partial(linen, True),
    "linen without biases": partial(linen, False),
    "nnx": partial(nnx_, True),
    "nnx with groups, without biases": partial(nnx_, False, num_kv_heads=K),
    "haiku": partial(haiku, True),
    "haiku without biases": partial(haiku, False),
    "equinox": partial(equinox, "query", "key", "value", "output"),
    "equinox without biases": equinox,
    "torch": partial(torch_, True),
    "torch without biases": partial(torch_, False),
}


def torch_state(width: int = N * H, prefix: str = "") -> dict[str, Any]:
    shapes = {
        "in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,),
        "out_proj.weight": (width, width), "out_proj.bias": (width,),
    }  # fmt: skip
    scale = width**-0.5
    return {prefix + name: scale * numbers(i, *shapes[name], dtype=np.float64) for i, name in enumerate(shapes)}


SQUARE = Config(d_model=N * H, num_heads=N, use_bias=True)
