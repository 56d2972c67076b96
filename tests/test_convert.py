"""Parameters of other libraries: their layers and ours give the same outputs, and what went in comes back exactly."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_layers import LAYERS, MEMORY, SQUARE, B, H, K, N, S, T, X, equinox, linen, torch_state
from flax import nnx
from reference import enable_x64, numbers, random_params
from tiers import tiered

from mhajax import attention, convert
from mhajax.attention import Config

pytestmark = pytest.mark.usefixtures("quick_compiles")


def leaves(source: Any) -> list[Any]:
    """The arrays of what holds a layer's parameters."""
    if hasattr(source, "state_dict"):
        return [(name, np.asarray(array)) for name, array in source.state_dict().items()]
    if isinstance(source, nnx.State):
        source = nnx.to_pure_dict(source)
    return [leaf for leaf in jax.tree_util.tree_leaves_with_path(source) if hasattr(leaf[1], "dtype")]


def assert_bits_equal(a: Any, b: Any) -> None:
    assert [path for path, _ in a] == [path for path, _ in b]
    for (_, left), (_, right) in zip(a, b, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, strict=False)


def assert_close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


@pytest.mark.parametrize("name", tiered(LAYERS, "linen", "nnx", "haiku", "torch"))
def test_a_real_layer_and_ours_agree_and_back_comes_what_went_in(name):
    with enable_x64():
        layer = LAYERS[name]()
        x, memory = (numbers(seed, B, n, layer.config.d_model, dtype=np.float64) for seed, n in ((1, T), (2, S)))
        params, config = layer.there(layer.source)
        assert config == layer.config
        expected = layer.run(layer.source, x, memory)
        assert np.std(expected) > 0.01
        got = jax.jit(attention.apply, static_argnames="config")(params, x, config, memory=memory)
        assert_close(got, expected, layer.tolerance)

        fresh = layer.put(layer.back(params, config))
        assert_bits_equal(leaves(fresh), leaves(layer.source))
        np.testing.assert_array_equal(layer.run(fresh, x, memory), expected)


@pytest.mark.slow
def test_equinox_biases_that_are_missing_become_zeros():
    with enable_x64():
        layer = equinox("key", "output")
        params, config = convert.from_equinox(layer.source)
        assert config == layer.config
        assert not np.any(params.b_q) and not np.any(params.b_v)
        expected = layer.run(layer.source, X, MEMORY)
        assert_close(attention.apply(params, jnp.asarray(X), config, memory=jnp.asarray(MEMORY)), expected)
        fresh = equinox("query", "key", "value", "output").put(convert.to_equinox(params, config))
        assert_close(layer.run(fresh, X, MEMORY), expected)


def torch_formula(state: dict[str, Any], x: Any, memory: Any, num_heads: int) -> Any:
    """What torch documents: rows q, k, v in one matrix [3E, E], heads side by side, y = x Wᵀ + b."""
    width = x.shape[-1]
    w_q, w_k, w_v = np.split(state["in_proj_weight"], 3)
    b_q, b_k, b_v = np.split(state["in_proj_bias"], 3)
    q, k, v = x @ w_q.T + b_q, memory @ w_k.T + b_k, memory @ w_v.T + b_v
    heads = []
    for columns in np.split(np.arange(width), num_heads):
        logits = q[..., columns] @ np.swapaxes(k[..., columns], -1, -2) / np.sqrt(len(columns))
        weights = np.exp(logits)
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., columns])
    return np.concatenate(heads, -1) @ state["out_proj.weight"].T + state["out_proj.bias"]


def test_torch_without_torch():
    """A state_dict of NumPy arrays, within that of a model."""
    prefix = "layers.0.self_attn."
    state = torch_state(prefix=prefix)
    params, config = convert.from_torch(state | {"layers.0.norm.weight": np.ones(3)}, num_heads=N, prefix=prefix)
    assert config == Config(d_model=N * H, num_heads=N, use_bias=True)
    x, memory = (numbers(seed, B, n, N * H, dtype=np.float64) for seed, n in ((4, T), (5, S)))
    expected = torch_formula(torch_state(), x, memory, N)
    with enable_x64():
        assert_close(attention.apply(params, jnp.asarray(x), config, memory=jnp.asarray(memory)), expected)
    back = convert.to_torch(params, config, prefix=prefix)
    assert_bits_equal(sorted(back.items()), sorted(state.items()))


# name: (there, back), each for any parameters that the library's layer can hold
PAIRS: dict[str, Any] = {
    "linen": (convert.from_linen, convert.to_linen),
    "nnx": (convert.from_nnx, convert.to_nnx),
    "haiku": (partial(convert.from_haiku, num_heads=N), convert.to_haiku),
    "equinox": (partial(convert.from_equinox, num_heads=N), convert.to_equinox),
    "torch": (partial(convert.from_torch, num_heads=N), convert.to_torch),
}
every_pair = pytest.mark.parametrize("there, back", PAIRS.values(), ids=PAIRS)


@every_pair
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_numpy_keeps_its_dtype_and_its_own_memory(there, back, dtype):
    params = random_params(attention.init_params, SQUARE, dtype=dtype)
    tree = back(params, SQUARE)
    again, config = there(tree)
    assert config == SQUARE
    expected = jax.tree.map(np.array, params)
    for array in jax.tree.leaves((params, tree)):
        assert type(array) is np.ndarray and array.dtype == dtype
        array[...] = 0
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), again, expected)


@every_pair
def test_layers_that_are_stacked_convert_under_vmap(there, back):
    layers = [random_params(attention.init_params, SQUARE, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    trees = jax.vmap(lambda params: back(params, SQUARE))(stacked)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[1], trees), back(layers[1], SQUARE))
    chex.assert_trees_all_equal(jax.vmap(lambda tree: there(tree)[0])(trees), stacked)


@pytest.mark.slow
def test_gradients_convert_as_parameters_do():
    with enable_x64():
        layer = linen(True)
        params, config = convert.from_linen(layer.source)
        theirs = jax.jit(jax.grad(lambda tree: jnp.sum(jnp.sin(layer.run(tree, X, MEMORY)))))(layer.source)
        attend = partial(attention.apply, x=jnp.asarray(X), config=config, memory=jnp.asarray(MEMORY))
        ours = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(attend(params)))))(params)
        chex.assert_trees_all_close(convert.from_linen(theirs)[0], ours, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "back", tiered([convert.to_linen, convert.to_haiku, convert.to_equinox, convert.to_torch], convert.to_torch)
)
def test_groups_are_refused_with_what_to_do_and_that_helps(back):
    config = Config(d_model=N * H, num_heads=N, num_kv_heads=K, use_bias=True)
    params = random_params(attention.init_params, config)
    with pytest.raises(ValueError, match=rf"{back.__name__}.*num_heads=6 and num_kv_heads=3; jnp.repeat\(w, 2, axis=0"):
        back(params, config)
    wide = {name: np.repeat(getattr(params, name), 2, axis=0) for name in ("w_k", "w_v", "b_k", "b_v")}
    wide = params._replace(**wide)
    x = jnp.asarray(numbers(6, T, N * H))
    np.testing.assert_allclose(attention.apply(wide, x, SQUARE), attention.apply(params, x, config), rtol=0, atol=1e-6)
    back(wide, SQUARE)
