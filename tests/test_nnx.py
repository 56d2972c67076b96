"""NNX modules: the functions' numbers, inside anybody's NNX model."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiers import tiered

from mhajax import attention, language_model, masks, translator
from mhajax import nnx as modules
from mhajax.attentions import PerAttention
from mhajax.tree import to_dict

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, S, D, N, K, H, HV, V, F = 2, 5, 7, 10, 6, 3, 4, 9, 11, 13
HEADS: dict[str, Any] = dict(d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, value_dim=HV)
ATTENTION = attention.Config(**HEADS)
LM = language_model.Config(
    **HEADS, d_ff=F, num_layers=2, vocab_size=V, norm="layer", activation="swiglu", use_bias=True
)
MT = translator.Config(**HEADS, d_ff=F, encoder_layers=3, decoder_layers=2, vocab_size=V)

X = jax.random.normal(jax.random.key(1), (B, T, D))
MEMORY = jax.random.normal(jax.random.key(2), (B, S, D))
TARGET = jax.random.randint(jax.random.key(3), (B, T), 0, V)
SOURCE = jax.random.randint(jax.random.key(4), (B, S), 0, V)

CASES: dict[str, Any] = {
    "attention": (modules.MultiHeadAttention, ATTENTION, (X, MEMORY)),
    "language_model": (modules.Model, LM, (TARGET,)),
    "translator": (modules.Model, MT, (SOURCE, TARGET)),
}
FUNCTIONS: dict[type, Any] = {module.Config: module for module in (attention, language_model, translator)}
each = pytest.mark.parametrize("kind, config, inputs", CASES.values(), ids=CASES)


def call(functions, params, inputs, config, **options):
    if functions is attention:
        return attention.apply(params, inputs[0], config, memory=inputs[1], **options)
    return functions.apply(params, *inputs, config, **options)


def program(function, *args):
    """What JAX would compile, as text: equal programs have equal numbers and gradients, bit for bit."""
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


@pytest.fixture
def quick_init(monkeypatch):
    """Models that begin with NumPy's random numbers, which need not be compiled."""

    def draw(init_params, key, config):
        normal = np.random.default_rng(np.asarray(jax.random.key_data(key))).normal
        shapes = jax.eval_shape(lambda: init_params(key, config))
        return jax.tree.map(lambda leaf: jnp.asarray(0.3 * normal(size=leaf.shape), leaf.dtype), shapes)

    for functions in (language_model, translator):
        monkeypatch.setattr(functions, "init_params", partial(draw, functions.init_params))


def shapes(kind, config):
    """The module as a function of its parameters, and the parameters without numbers: all that tracing needs."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    params = jax.eval_shape(lambda: FUNCTIONS[type(config)].init_params(jax.random.key(0), config))
    return lambda params: nnx.merge(graph, nnx.State(to_dict(params))), params


def paths(module):
    return {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


@each
def test_init_makes_the_functions_parameters(kind, config, inputs):
    del inputs

    def made():
        module = kind(config, rngs=nnx.Rngs(3))
        assert all(isinstance(leaf, nnx.Param) for _, leaf in nnx.to_flat_state(nnx.state(module)))
        return modules.functional(module)

    assert type(jax.eval_shape(made)) is FUNCTIONS[type(config)].Params
    assert program(made) == program(lambda: FUNCTIONS[type(config)].init_params(nnx.Rngs(3).params(), config))


@pytest.mark.slow
def test_paths_and_heads():
    assert paths(modules.MultiHeadAttention(ATTENTION, rngs=nnx.Rngs(0))) == {
        "w_q": (N, D, H), "w_k": (K, D, H), "w_v": (K, D, HV), "w_o": (N, HV, D)
    }  # fmt: skip
    found = paths(nnx.eval_shape(lambda: modules.Model(MT, rngs=nnx.Rngs(0))))
    assert found["encoder/layers/attention/w_q"] == (3, N, D, H)
    assert found["decoder/layers/cross/w_o"] == (2, N, HV, D)
    assert found["embedding/tokens"] == (V, D)


@each
def test_same_program(kind, config, inputs):
    bind, params = shapes(kind, config)
    by_function = lambda params: call(FUNCTIONS[type(config)], params, inputs, config)  # noqa: E731
    assert program(lambda params: bind(params)(*inputs), params) == program(by_function, params)


@pytest.mark.usefixtures("quick_init")
@pytest.mark.parametrize("name", tiered(["attention", "language_model"], "attention"))
def test_same_numbers_and_gradients(name):
    kind, config, inputs = CASES[name]
    module = kind(config, rngs=nnx.Rngs(0))
    by_function = lambda params: jnp.sum(jnp.sin(call(FUNCTIONS[type(config)], params, inputs, config)))  # noqa: E731

    @nnx.jit
    def both(module, params):
        by_module = nnx.value_and_grad(lambda module: jnp.sum(jnp.sin(module(*inputs))))
        return by_module(module), jax.value_and_grad(by_function)(params)

    (out, grads), (expected, expected_grads) = both(module, modules.functional(module))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    chex.assert_trees_all_close(nnx.to_pure_dict(grads), to_dict(expected_grads), rtol=1e-5, atol=1e-6)
    assert all(float(jnp.std(grad)) > 1e-7 for grad in jax.tree.leaves(grads))


@pytest.mark.usefixtures("quick_init")
@each
def test_round_trips(kind, config, inputs):
    make = lambda rngs: kind(config, rngs=rngs)  # noqa: E731
    module, other = make(nnx.Rngs(0)), make(nnx.Rngs(1))
    params = modules.functional(module)
    assert not jnp.allclose(jax.tree.leaves(modules.functional(other))[0], jax.tree.leaves(params)[0])
    nnx.update(other, to_dict(params))
    chex.assert_trees_all_equal(modules.functional(other), params)
    chex.assert_trees_all_equal(modules.functional(nnx.merge(*nnx.split(module))), params)
    assert nnx.graphdef(module) == nnx.graphdef(other) and hash(nnx.graphdef(module)) == hash(nnx.graphdef(other))


@pytest.mark.usefixtures("quick_init")
def test_a_part_of_a_model_is_functional_too():
    model = modules.Model(LM, rngs=nnx.Rngs(0))
    part = modules.functional(model.stack.layers.attention)
    assert isinstance(part, attention.Params)
    chex.assert_trees_all_equal(part, modules.functional(model).stack.layers.attention)


@pytest.mark.slow
def test_tied_and_frozen_parameters():
    layer: Any = modules.MultiHeadAttention(attention.Config(d_model=D, num_heads=2), rngs=nnx.Rngs(0))
    layer.w_k = layer.w_q
    layer.w_v = nnx.Variable(layer.w_v[...])  # not an nnx.Param: no optimizer touches it
    grads = nnx.grad(lambda layer: jnp.sum(layer(X) ** 2))(layer)
    assert set(grads) == {"w_q", "w_o"} or set(grads) == {"w_k", "w_o"}
    params = modules.functional(layer)
    np.testing.assert_array_equal(layer(X), attention.apply(params._replace(w_k=params.w_q), X, layer.config))


@pytest.mark.parametrize("name", ["language_model", "translator"])
def test_features(name):
    kind, config, inputs = CASES[name]
    bind, params = shapes(kind, config)
    by_function = lambda params: FUNCTIONS[type(config)].features(params, *inputs, config)  # noqa: E731
    assert program(lambda params: bind(params).features(*inputs), params) == program(by_function, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("attention", {"mask": masks.lengths(jnp.array([2, 4]))}),
        ("attention", {"gates": jnp.arange(N) / 3}),
        ("language_model", {"gates": PerAttention(attention=jnp.zeros((2, N)))}),
        ("language_model", {"mask": masks.lengths(jnp.array([2, 4]))}),
        ("translator", {"source_lengths": jnp.array([2, 6])}),
        ("translator", {"gates": PerAttention(cross=jnp.zeros((2, N)))}),
    ],
)
def test_options_pass_through(name, options):
    kind, config, inputs = CASES[name]
    bind, params = shapes(kind, config)
    with_options = program(lambda params: bind(params)(*inputs, **options), params)
    assert with_options == program(
        lambda params: call(FUNCTIONS[type(config)], params, inputs, config, **options), params
    )
    assert with_options != program(lambda params: bind(params)(*inputs), params)


def test_memory_and_unknown_options():
    layer = modules.MultiHeadAttention(ATTENTION, rngs=nnx.Rngs(0))
    expected = attention.apply(modules.functional(layer), X, ATTENTION, memory=MEMORY)
    np.testing.assert_array_equal(layer(X, MEMORY), expected)
    np.testing.assert_array_equal(layer(X, memory=MEMORY), expected)
    assert not np.allclose(layer(X), expected)
    with pytest.raises(TypeError, match="no_such_option"):
        layer(X, no_such_option=1)


LM_DROPS = replace(LM, dropout=0.5)
LM_DROPS_WEIGHTS = replace(LM, attention_dropout=0.5)
MT_DROPS = replace(MT, dropout=0.5)
DROPS: dict[str, Any] = {
    "attention": (lambda rngs: modules.MultiHeadAttention(ATTENTION, dropout_rate=0.5, rngs=rngs), (X,)),
    "language_model": (lambda rngs: modules.Model(LM_DROPS, rngs=rngs), (TARGET,)),
    "attention of a language_model": (lambda rngs: modules.Model(LM_DROPS_WEIGHTS, rngs=rngs), (TARGET,)),
    "translator": (lambda rngs: modules.Model(MT_DROPS, rngs=rngs), (SOURCE, TARGET)),
}


@pytest.mark.usefixtures("quick_init")
@pytest.mark.parametrize("make, inputs", tiered(DROPS.values(), DROPS["attention"]), ids=DROPS)
def test_dropout_takes_its_stream(make, inputs):
    module, same, other = (make(nnx.Rngs(params=0, dropout=seed)) for seed in (1, 1, 2))
    run = nnx.jit(lambda module: module(*inputs))
    first, second = run(module), run(module)
    np.testing.assert_array_equal(run(same), first)
    assert not np.allclose(first, second) and not np.allclose(run(other), first)

    module.eval()
    one, again = run(module), run(module)
    np.testing.assert_array_equal(one, again)
    plain = call_plain(module, inputs)
    np.testing.assert_allclose(one, plain, rtol=1e-5, atol=1e-5)
    module.train()
    assert not np.allclose(run(module), one)
    with pytest.raises(AttributeError, match="dropout"):
        make(nnx.Rngs(params=0))


def call_plain(module, inputs):
    return jax.jit(lambda params: FUNCTIONS[type(module.config)].apply(params, *inputs, module.config))(
        modules.functional(module)
    )


@pytest.mark.slow
def test_dropout_of_one_call():
    layer = modules.MultiHeadAttention(ATTENTION, dropout_rate=0.5, rngs=nnx.Rngs(0))
    evaluated = attention.apply(modules.functional(layer), X, ATTENTION)
    np.testing.assert_array_equal(layer(X, deterministic=True), evaluated)
    one = layer(X, rngs=nnx.Rngs(dropout=7))
    np.testing.assert_array_equal(one, layer(X, rngs=nnx.Rngs(dropout=7)))
    key = nnx.Rngs(dropout=7).dropout()
    expected = attention.apply(modules.functional(layer), X, ATTENTION, dropout_rate=0.5, dropout_key=key)
    np.testing.assert_array_equal(one, expected)
    layer.eval()
    np.testing.assert_array_equal(layer(X), evaluated)
    assert not np.allclose(layer(X, deterministic=False), evaluated)
    layer.train()
    with pytest.raises(TypeError, match="dropout_rate"):
        layer(X, dropout_rate=0.1)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="nnx.view came with Flax 0.12")
def test_view():
    layer = modules.MultiHeadAttention(ATTENTION, dropout_rate=0.5, rngs=nnx.Rngs(0))
    view = nnx.view(layer, deterministic=True)
    assert view.deterministic and not layer.deterministic
    np.testing.assert_array_equal(view(X), attention.apply(modules.functional(layer), X, ATTENTION))


def test_parameters_of_another_config_are_refused():
    layer = modules.MultiHeadAttention(ATTENTION, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(modules.MultiHeadAttention(replace(ATTENTION, num_heads=3), rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"params\.w_q must be \[N, D, H\]"):
        layer(X)
    layer = modules.MultiHeadAttention(ATTENTION, rngs=nnx.Rngs(0))
    biased = modules.MultiHeadAttention(replace(ATTENTION, use_bias=True), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="b_k"):
        nnx.update(layer, nnx.state(biased))


class Sandwich(nnx.Module):
    """A user's model: dense, attention, dense."""

    def __init__(self, rngs):
        self.before = nnx.Linear(D, D, rngs=rngs)
        self.attention = modules.MultiHeadAttention(ATTENTION, dropout_rate=0.1, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.after = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x):
        x = self.before(x)
        return self.after(self.norm(x + self.attention(x)))


class Classifier(nnx.Module):
    """A user's model around a whole language model."""

    def __init__(self, rngs):
        self.model = modules.Model(LM, rngs=rngs)
        self.after = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.after(self.model.features(tokens))


TRAINED = [(Sandwich, X), (Classifier, TARGET)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, x", tiered(TRAINED, TRAINED[0]), ids=["layer", "model"])
def test_trains_inside_a_users_model_without_recompiling(kind, x):
    model = kind(nnx.Rngs(0))
    labels = jax.random.randint(jax.random.key(5), (B, T), 0, 3)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0] and len(traces) == 1
    if kind is Sandwich:
        model.eval()
        assert model.attention.deterministic
        np.testing.assert_array_equal(model(x), model(x))


@pytest.mark.slow
def test_vmap_over_seeds():
    make = lambda rngs: modules.MultiHeadAttention(ATTENTION, rngs=rngs)  # noqa: E731
    ensemble = nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(0))
    params = modules.functional(ensemble)
    assert params.w_q.shape == (3, N, D, H)
    out = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(ensemble, X)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        np.testing.assert_allclose(out[i], attention.apply(one, X, ATTENTION), rtol=1e-5, atol=1e-6)
    assert not np.allclose(out[0], out[1])
