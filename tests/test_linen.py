"""Linen modules: the functions' numbers, inside anybody's Linen model."""

import re
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.errors import InvalidRngError, ScopeParamShapeError
from tiers import tiered

from mhajax import attention, language_model, linen, masks, translator
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
    "attention": (linen.MultiHeadAttention(ATTENTION), attention, (X, MEMORY)),
    "language_model": (linen.Model(LM), language_model, (TARGET,)),
    "translator": (linen.Model(MT), translator, (SOURCE, TARGET)),
}
each = pytest.mark.parametrize("module, functions, inputs", CASES.values(), ids=CASES)


def call(functions, params, inputs, config, **options):
    if functions is attention:
        return attention.apply(params, inputs[0], config, memory=inputs[1], **options)
    return functions.apply(params, *inputs, config, **options)


def shapes(functions, config):
    """The parameters without numbers, which is all that tracing needs."""
    return jax.eval_shape(lambda: functions.init_params(jax.random.key(0), config))


def numbers(functions, config, seed=0):
    """Parameters with some numbers; quicker than to compile the drawing of good ones."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw(size=leaf.shape), leaf.dtype), shapes(functions, config))


def program(function, *args):
    """What JAX would compile, as text: equal programs have equal numbers and gradients, bit for bit."""
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


@each
def test_init_makes_the_functions_parameters(module, functions, inputs):
    made = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    expected = to_dict(jax.eval_shape(lambda key: functions.init_params(key, module.config), jax.random.key(0)))
    assert set(made) == {"params"}
    chex.assert_trees_all_equal_shapes_and_dtypes(made["params"], expected)


def test_paths_and_heads():
    params = jax.eval_shape(linen.MultiHeadAttention(ATTENTION).init, jax.random.key(0), X)["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "w_q": (N, D, H), "w_k": (K, D, H), "w_v": (K, D, HV), "w_o": (N, HV, D)
    }  # fmt: skip
    params: Any = jax.eval_shape(linen.Model(MT).init, jax.random.key(0), SOURCE, TARGET)["params"]
    assert params["encoder"]["layers"]["attention"]["w_q"].shape == (3, N, D, H)
    assert params["decoder"]["layers"]["cross"]["w_o"].shape == (2, N, HV, D)
    assert params["embedding"]["tokens"].shape == (V, D)


@pytest.mark.slow
def test_init_draws_every_head_anew():
    layer = linen.MultiHeadAttention(attention.Config(d_model=64, num_heads=4))
    params: Any = layer.init(jax.random.key(0), jnp.ones((1, 1, 64)))["params"]
    heads = np.concatenate([params[name].reshape(4, -1) for name in ("w_q", "w_k", "w_v", "w_o")])
    np.testing.assert_allclose(heads.std(axis=1), 64**-0.5, rtol=0.1)
    assert np.abs(np.corrcoef(heads) - np.eye(16)).max() < 0.2


@each
def test_same_program(module, functions, inputs):
    params = shapes(functions, module.config)
    by_module = lambda params: module.apply({"params": to_dict(params)}, *inputs)  # noqa: E731
    by_function = lambda params: call(functions, params, inputs, module.config)  # noqa: E731
    assert program(by_module, params) == program(by_function, params)


@pytest.mark.parametrize("name", tiered(["attention", "language_model"], "attention"))
def test_same_numbers_and_gradients(name):
    module, functions, inputs = CASES[name]
    params = numbers(functions, module.config)

    @jax.jit
    def both(params):
        by_module = lambda params: jnp.sum(jnp.sin(module.apply({"params": params}, *inputs)))  # noqa: E731
        by_function = lambda params: jnp.sum(jnp.sin(call(functions, params, inputs, module.config)))  # noqa: E731
        return jax.value_and_grad(by_module)(to_dict(params)), jax.value_and_grad(by_function)(params)

    (out, grads), (expected, expected_grads) = both(params)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    chex.assert_trees_all_close(grads, to_dict(expected_grads), rtol=1e-5, atol=1e-6)
    assert all(float(jnp.std(grad)) > 1e-7 for grad in jax.tree.leaves(grads))


@each
def test_round_trip(module, functions, inputs):
    params = numbers(functions, module.config)
    for variables in ({"params": to_dict(params)}, to_dict(params), {"params": to_dict(params), "batch_stats": {}}):
        chex.assert_trees_all_equal(linen.functional(module, variables), params)
    assert type(linen.functional(module, to_dict(params))) is functions.Params


@pytest.mark.slow
@pytest.mark.parametrize("name", ["language_model", "translator"])
def test_features(name):
    module, functions, inputs = CASES[name]
    params = shapes(functions, module.config)
    by_module = lambda p: module.apply({"params": to_dict(p)}, *inputs, method="features")  # noqa: E731
    assert program(by_module, params) == program(lambda p: functions.features(p, *inputs, module.config), params)


@pytest.mark.slow
def test_options_pass_through():
    layer: Any = linen.MultiHeadAttention(ATTENTION)
    params = numbers(attention, ATTENTION)
    variables = {"params": to_dict(params)}
    plain = layer.apply(variables, X)
    mask, gates = masks.causal(), jnp.arange(N) / 3
    combinations: Any = ({"mask": mask}, {"gates": gates}, {"mask": mask, "gates": gates})
    for options in combinations:
        got = layer.apply(variables, X, **options)
        np.testing.assert_array_equal(got, attention.apply(params, X, ATTENTION, **options))
        assert not np.allclose(got, plain)
    np.testing.assert_array_equal(layer.apply(variables, X, MEMORY), layer.apply(variables, X, memory=MEMORY))
    assert not np.allclose(layer.apply(variables, X, MEMORY), plain)
    with pytest.raises(TypeError, match="no_such_option"):
        layer.apply(variables, X, no_such_option=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("language_model", {"gates": PerAttention(attention=jnp.zeros((2, N)))}),
        ("language_model", {"mask": masks.lengths(jnp.array([2, 4]))}),
        ("translator", {"source_lengths": jnp.array([2, 6])}),
        ("translator", {"gates": PerAttention(cross=jnp.zeros((2, N)))}),
    ],
)
def test_options_of_the_models_pass_through(name, options):
    module, functions, inputs = CASES[name]
    params = shapes(functions, module.config)
    by_module = lambda p, **options: module.apply({"params": to_dict(p)}, *inputs, **options)  # noqa: E731
    with_options = program(lambda p: by_module(p, **options), params)
    assert with_options == program(lambda p: call(functions, p, inputs, module.config, **options), params)
    assert with_options != program(by_module, params)


DROPS: dict[str, Any] = {
    "attention": (linen.MultiHeadAttention(ATTENTION, dropout_rate=0.5), (X,)),
    "language_model": (linen.Model(replace(LM, dropout=0.5)), (TARGET,)),
    "attention of a language_model": (
        linen.Model(replace(LM, attention_dropout=0.5)), (TARGET,),
    ),
    "translator": (linen.Model(replace(MT, dropout=0.5)), (SOURCE, TARGET)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("module, inputs", tiered(DROPS.values(), DROPS["attention of a language_model"]), ids=DROPS)
def test_dropout_takes_its_rng(module, inputs):
    params = numbers(module.functions, module.config)
    variables = {"params": to_dict(params)}
    train = jax.jit(lambda key: module.apply(variables, *inputs, deterministic=False, rngs={"dropout": key}))
    one, again, other = train(jax.random.key(1)), train(jax.random.key(1)), train(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    evaluate = lambda p: module.apply({"params": to_dict(p)}, *inputs)  # noqa: E731
    assert program(evaluate, params) == program(lambda p: module.functions.apply(p, *inputs, module.config), params)
    with pytest.raises(InvalidRngError, match="dropout"):
        module.apply(variables, *inputs, deterministic=False)


@pytest.mark.slow
def test_dropout_is_the_functions():
    layer: Any = linen.MultiHeadAttention(ATTENTION, dropout_rate=0.5)
    params = numbers(attention, ATTENTION)
    variables = {"params": to_dict(params)}
    train = lambda key: layer.apply(variables, X, deterministic=False, rngs={"dropout": key})  # noqa: E731
    outputs = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(1), 400))
    expected = attention.apply(params, X, ATTENTION)
    errors = np.abs(np.mean(outputs, axis=0) - expected)
    assert errors.max() < 6 * np.std(outputs, axis=0).max() / 20  # dropped weights are scaled up: right on average
    with pytest.raises(TypeError, match="dropout_rate"):
        layer.apply(variables, X, deterministic=False, dropout_rate=0.1, rngs={"dropout": jax.random.key(0)})


@pytest.mark.slow
def test_without_dropout_no_rng_is_needed():
    for module, _, inputs in CASES.values():
        variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        jax.eval_shape(lambda v, m=module, i=inputs: m.apply(v, *i, deterministic=False), variables)


def test_parameters_of_another_config_are_refused():
    layer: Any = linen.MultiHeadAttention(ATTENTION)
    other = replace(ATTENTION, num_heads=3)
    with pytest.raises(ScopeParamShapeError, match="w_q"):
        layer.apply({"params": to_dict(numbers(attention, other))}, X)
    biased = {"params": to_dict(numbers(attention, replace(ATTENTION, use_bias=True)))}
    with pytest.raises(ValueError, match="b_k.*another config"):
        layer.apply(biased, X)
    with pytest.raises(ValueError, match="b_k.*another config"):
        linen.functional(layer, biased)

    deeper = numbers(language_model, replace(LM, num_layers=3))
    with pytest.raises(ScopeParamShapeError, match="stack"):
        linen.Model(LM).apply({"params": to_dict(deeper)}, TARGET)
    ungated = numbers(language_model, replace(LM, activation="gelu_tanh"))
    with pytest.raises(ValueError, match=r"stack\.layers\.mlp must hold .*w_gate"):
        linen.functional(linen.Model(LM), to_dict(ungated))


class Sandwich(nn.Module):
    """A user's model: dense, attention, dense."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(D)(x)
        x = x + linen.MultiHeadAttention(ATTENTION, dropout_rate=0.1, name="attention")(x, deterministic=not train)
        return nn.Dense(3)(nn.LayerNorm()(x))


class Classifier(nn.Module):
    """A user's model around a whole language model."""

    @nn.compact
    def __call__(self, tokens, train=False):
        x = linen.Model(LM, name="model").features(tokens, deterministic=not train)
        return nn.Dense(3)(x)


TRAINED = [(Sandwich(), X), pytest.param(Classifier(), TARGET, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("model, x", TRAINED, ids=["layer", "model"])
def test_trains_inside_a_users_model_without_recompiling(model, x):
    variables = model.init(jax.random.key(0), x)
    labels = jax.random.randint(jax.random.key(5), (B, T), 0, 3)
    optimizer = optax.adam(1e-2)

    def loss(params, key):
        logits = model.apply({"params": params}, x, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    traces = []

    @jax.jit
    def step(params, state, key):
        traces.append(1)
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = variables["params"], optimizer.init(variables["params"]), []
    for key in jax.random.split(jax.random.key(6), 40):
        params, state, value = step(params, state, key)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0] and len(traces) == 1


@pytest.mark.slow
def test_vmap_over_seeds():
    layer: Any = linen.MultiHeadAttention(ATTENTION)
    seeds = jax.random.split(jax.random.key(0), 3)
    variables = jax.vmap(layer.init, in_axes=(0, None))(seeds, X)
    assert variables["params"]["w_q"].shape == (3, N, D, H)
    out = jax.vmap(layer.apply, in_axes=(0, None))(variables, X)
    for i, seed in enumerate(seeds):
        np.testing.assert_allclose(out[i], layer.apply(layer.init(seed, X), X), rtol=1e-5, atol=1e-6)
    assert not np.allclose(out[0], out[1])
    assert linen.functional(layer, variables).w_q.shape == (3, N, D, H)
