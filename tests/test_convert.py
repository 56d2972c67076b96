"""Parameters of other libraries: their layers and ours give the same outputs, and what went in comes back exactly."""

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from reference import numbers, random_params
from tiers import tiered

from mhajax import attention, convert
from mhajax.attention import Config, Params

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, S, D, N, K, H, HV = 2, 11, 17, 13, 6, 3, 5, 7
X = numbers(1, B, T, D, dtype=np.float64)
MEMORY = numbers(2, B, S, D, dtype=np.float64)
SHAPE: dict[str, Any] = dict(d_model=D, num_heads=N, head_dim=H)
grouped_nnx = (
    "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters
)  # newer than the oldest supported


def enable_x64() -> Any:
    """A context with 64-bit arrays; newer versions of JAX have another name for it."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()  # pyright: ignore


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
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


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


def torch_state(width: int = N * H, prefix: str = "") -> dict[str, Any]:
    shapes = {
        "in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,),
        "out_proj.weight": (width, width), "out_proj.bias": (width,),
    }  # fmt: skip
    scale = width**-0.5
    return {prefix + name: scale * numbers(i, *shapes[name], dtype=np.float64) for i, name in enumerate(shapes)}


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
SQUARE = Config(d_model=N * H, num_heads=N, use_bias=True)
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


def linen_tree(**changes: Any) -> Any:
    config = Config(**SHAPE, use_bias=True)
    return {**convert.to_linen(random_params(attention.init_params, config), config), **changes}


def real_linen(**options: Any) -> Any:
    layer = nn.MultiHeadDotProductAttention(N, qkv_features=N * H, **options)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X, MEMORY)["params"]
    return jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes)


def without(tree: Any, *names: str) -> Any:
    return {name: leaf for name, leaf in tree.items() if name not in names}


def of_config(back: Callable[..., Any], **sizes: Any) -> Any:
    config = Config(**{**SHAPE, **sizes})
    return back(random_params(attention.init_params, config), config)


def other_config() -> Any:
    return convert.to_linen(random_params(attention.init_params, SQUARE), Config(**SHAPE, use_bias=True))


def stacked_params() -> Any:
    params = random_params(attention.init_params, SQUARE)
    return convert.to_linen(params._replace(w_q=params.w_q[None]), SQUARE)


def matrices(**changes: Any) -> dict[str, Any]:
    shapes = {"query_proj": (N * H, D), "key_proj": (N * H, D), "value_proj": (N * HV, D), "output_proj": (D, N * HV)}
    return {name: {"weight": np.ones(shape)} for name, shape in shapes.items()} | changes


HAIKU = {f"net/attention/{name}": {"w": np.ones((N, N))} for name in ("query", "key", "value", "linear")}
BIAS = {"kernel": np.ones((D, N, H)), "bias": np.ones((N, H))}
BOX = {**BIAS, "kernel": nn.Partitioned(np.ones((D, N, H)), ("embed", "heads", None))}
HAIKU_NORM = {"net/attention/norm": {"scale": np.ones(3)}}
BIAS_OF_7 = {"weight": np.ones((N * H, D)), "bias": np.ones(7)}
TWO_ROWS = {"in_proj_weight": np.ones((2 * N, N)), "out_proj.weight": np.ones((N, N))}

# what is done: (the deed, kind of error, what its message must hold)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a projection is missing": (
        lambda: convert.from_linen(without(linen_tree(), "key")),
        ValueError,
        ("convert.from_linen", "query.kernel, key.kernel", "missing: key.bias, key.kernel;", "unknown: none"),
    ),
    "a name is unknown": (
        lambda: convert.from_linen({"attention": linen_tree()}),
        ValueError,
        ("missing: key.kernel, out.kernel", "unknown: attention.key.bias"),
    ),
    "one bias of four": (
        lambda: convert.from_linen({**of_config(convert.to_linen), "query": BIAS}),
        ValueError,
        ("all or none of query.bias, key.bias", "missing: key.bias, out.bias, value.bias;"),
    ),
    "nothing": (lambda: convert.from_linen({}), ValueError, ("got nothing",)),
    "linen normalises queries and keys": (
        lambda: convert.from_linen(real_linen(normalize_qk=True)),
        ValueError,
        ("key_ln.scale, query_ln.scale", "normalize_qk", "not part of attention.Params", "normalises queries and keys"),
    ),
    "nnx normalises queries and keys": (
        lambda: convert.from_nnx(nnx.state(nnx_module(normalize_qk=True), nnx.Param)),
        ValueError,
        ("convert.from_nnx", "key_ln.scale, query_ln.scale"),
    ),
    "nnx with more than parameters": (
        lambda: convert.from_nnx(nnx.state(nnx_module(dropout_rate=0.5))),
        ValueError,
        ("unknown: rngs.",),
    ),
    "another width comes out of linen": (
        lambda: convert.from_linen(real_linen(out_features=19)),
        ValueError,
        ("w_o must be [N, Hv, D] = (6, 5, 13)", "got (6, 5, 19)", "one width D"),
    ),
    "memory of another width in nnx": (
        lambda: convert.from_nnx(nnx.state(nnx_module(in_kv_features=19), nnx.Param)),
        ValueError,
        ("w_k must be [K, D, H] = (6, 13, 5)", "got (6, 19, 5)"),
    ),
    "memory of another width in equinox": (
        lambda: convert.from_equinox(equinox_module(key_size=19)),
        ValueError,
        ("convert.from_equinox", "w_k must be", "got (6, 19, 5)"),
    ),
    "layers stacked": (
        lambda: convert.from_linen(jax.tree.map(lambda a: a[None], linen_tree())),
        ValueError,
        ("query.kernel must be [D, N, H], got (1, 13, 6, 5)", "jax.vmap"),
    ),
    "params stacked": (stacked_params, ValueError, ("convert.to_linen", "w_q must be [N, D, H]", "jax.vmap")),
    "a box": (
        lambda: convert.from_linen(linen_tree(query=BOX)),
        TypeError,
        ("query.kernel must be an array", "Partitioned", "nn.meta.unbox"),
    ),
    "params of another config": (
        other_config,
        ValueError,
        ("convert.to_linen", "do not belong together", "'d_model': 30", "'d_model': 13"),
    ),
    "values of their own width to linen": (
        lambda: of_config(convert.to_linen, value_dim=HV),
        ValueError,
        ("convert.to_linen", "head_dim=5 and value_dim=7"),
    ),
    "values of their own width to nnx": (
        lambda: of_config(convert.to_nnx, value_dim=HV),
        ValueError,
        ("convert.to_nnx", "head_dim=5 and value_dim=7"),
    ),
    "values of their own width to torch": (
        lambda: of_config(convert.to_torch, d_model=N * H, value_dim=HV),
        ValueError,
        ("convert.to_torch", "head_dim=5 and value_dim=7"),
    ),
    "heads of any width to torch": (
        lambda: of_config(convert.to_torch, head_dim=3, d_model=N * H),
        ValueError,
        ("convert.to_torch", "d_model=30, num_heads=6 and head_dim=3"),
    ),
    "heads that do not divide": (
        lambda: convert.from_equinox(matrices(), num_heads=7),
        ValueError,
        ("num_heads must divide", "num_heads=7 and 30 in the query projection"),
    ),
    "no number of heads": (
        lambda: convert.from_equinox(matrices()),
        ValueError,
        ("convert.from_equinox", "num_heads must be given"),
    ),
    "another number of heads than the module's": (
        lambda: convert.from_torch(SimpleNamespace(num_heads=6, state_dict=torch_state), num_heads=3),
        ValueError,
        ("convert.from_torch", "that of the module, 6, got 3"),
    ),
    "a bias of another width": (
        lambda: convert.from_equinox(matrices(key_proj=BIAS_OF_7), num_heads=N),
        ValueError,
        ("the key projection's bias must be (30,), got (7,)",),
    ),
    "haiku under another name": (
        lambda: convert.from_haiku(HAIKU, num_heads=N),
        ValueError,
        ("convert.from_haiku", "'multi_head_attention/'", "net/attention/query/w"),
    ),
    "more below that name in haiku": (
        lambda: convert.from_haiku(HAIKU | HAIKU_NORM, num_heads=N, name="net/attention"),
        ValueError,
        ("unknown: norm/scale",),
    ),
    "torch rows that are not three": (
        lambda: convert.from_torch(TWO_ROWS, num_heads=N),
        ValueError,
        ("in_proj_weight must be [3·D, D] = (18, 6), got (12, 6)",),
    ),
    "torch bias that is not three": (
        lambda: convert.from_torch({**torch_state(), "in_proj_bias": np.ones(7)}, num_heads=N),
        ValueError,
        ("in_proj_bias must be [3·D] = (90,), got (7,)",),
    ),
    "torch, learned keys": (
        lambda: convert.from_torch({**torch_state(), "bias_k": np.ones(3), "bias_v": np.ones(3)}, num_heads=N),
        ValueError,
        ("bias_k, bias_v (add_bias_kv)", "attention.Params"),
    ),
    "torch, learned keys, real": (
        lambda: convert.from_torch(torch_module(add_bias_kv=True)),
        ValueError,
        ("bias_k, bias_v (add_bias_kv)",),
    ),
    "torch, a key of zeros": (
        lambda: convert.from_torch(torch_module(add_zero_attn=True)),
        ValueError,
        ("convert.from_torch", "add_zero_attn"),
    ),
    "torch, memory of another width": (
        lambda: convert.from_torch(torch_module(kdim=19)),
        ValueError,
        ("k_proj_weight (30, 19)", "kdim or vdim", "D = config.d_model"),
    ),
    "torch, bfloat16": (
        lambda: convert.from_torch(torch_module().bfloat16()),
        TypeError,
        ("convert.from_torch: in_proj_weight", "BFloat16"),
    ),
}


@pytest.mark.parametrize("deed, kind, said", ERRORS.values(), ids=ERRORS)
def test_errors_say_who_what_was_expected_and_what_came(deed, kind, said):
    with pytest.raises(kind) as caught:
        deed()
    assert [part for part in said if part not in str(caught.value)] == []
