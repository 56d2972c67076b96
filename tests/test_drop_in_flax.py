"""Our attention in Flax's layers, of Linen and NNX, which keep all but their kernel."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in_cases import LENGTHS, B, D, S, T, arrays, near
from flax import linen as nn
from flax import nnx
from reference import numbers
from tiers import tiered

from mhajax import linen
from mhajax import nnx as our_nnx

pytestmark = pytest.mark.usefixtures("quick_compiles")

X, MEMORY = numbers(11, B, T, D), numbers(12, B, S, D)
PADDING = nn.make_attention_mask(np.ones((B, T)), np.arange(S) < LENGTHS[:, None])  # Flax's masks are float32
CAUSAL = nn.make_causal_mask(np.ones((B, T)))
LAYER: dict[str, Any] = dict(num_heads=3, qkv_features=15, out_features=8, bias_init=nn.initializers.normal())
# name: (more options of the layer, inputs, mask)
LAYERS: dict[str, tuple[dict[str, Any], tuple[Any, ...], Any]] = {
    "self": ({}, (X,), None),
    "causal": ({}, (X,), CAUSAL),
    "cross, padding": ({}, (X, MEMORY), PADDING),
    "values of another stream": ({}, (X, MEMORY, MEMORY[..., ::-1]), PADDING != 0),
    "normalised queries and keys": ({"normalize_qk": True}, (X,), CAUSAL),
    "more leading axes": ({}, (numbers(13, 2, B, T, D),), CAUSAL[None]),
    "no batch": ({}, (X[0],), CAUSAL[0]),
    "products of precision": ({"precision": jax.lax.Precision.HIGHEST}, (X,), CAUSAL),
}


def linen_layer(**options: Any) -> Any:
    return nn.MultiHeadDotProductAttention(**LAYER, **options)


def drawn(shapes: Any) -> Any:
    """Arrays of these shapes; no initialiser is compiled."""
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [0.3 * numbers(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


VARIABLES = drawn(jax.eval_shape(linen_layer().init, jax.random.key(0), np.ones((B, T, D), np.float32)))


@pytest.mark.parametrize(
    "name",
    tiered(LAYERS, "causal"),
)
def test_a_linen_layer_with_our_kernel(name):
    options, inputs, mask = LAYERS[name]
    theirs = linen_layer(**options)
    ours = theirs.clone(attention_fn=linen.attention_fn)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), *inputs)
    assert jax.eval_shape(ours.init, jax.random.key(0), *inputs) == shapes
    variables = drawn(shapes)

    def run(layer, variables, inputs):
        out, back = jax.vjp(lambda *a: layer.apply(a[0], *a[1], mask=mask), variables, inputs)
        return out, back(jnp.asarray(numbers(14, *out.shape)))

    near(*jax.jit(lambda *a: (run(ours, *a), run(theirs, *a)))(variables, inputs), tolerance=5e-6)


@pytest.mark.slow
def test_a_linen_layer_in_half_precision():
    """Flax's own softmax is in bfloat16; ours errs at most as much."""
    exact = linen_layer()
    theirs = exact.clone(dtype=jnp.bfloat16)
    ours = theirs.clone(attention_fn=linen.attention_fn)
    run = jax.jit(lambda variables: [layer.apply(variables, X, mask=CAUSAL) for layer in (ours, theirs, exact)])
    mine, other, truth = run(VARIABLES)
    assert mine.dtype == jnp.bfloat16
    error, allowed = (np.abs(a.astype(jnp.float32) - truth).max() for a in (mine, other))
    assert error <= 2 * allowed + 1e-5


def test_a_linen_layer_shows_its_weights_and_stays_as_it_is():
    layer = linen_layer()
    ours = layer.clone(attention_fn=linen.attention_fn)
    sow: Any = dict(mask=CAUSAL, sow_weights=True, mutable=["intermediates"])
    show = jax.jit(lambda variables: [a.apply(variables, X, **sow) for a in (ours, layer)])
    (out, shown), (_, expected) = show(VARIABLES)
    near(shown["intermediates"]["attention_weights"], expected["intermediates"]["attention_weights"])
    np.testing.assert_array_equal(out, jax.jit(ours.apply)(VARIABLES, X, mask=CAUSAL))
    half = ours.clone(dtype=jnp.bfloat16)
    for forced, dtype in ((False, jnp.bfloat16), (True, jnp.float32)):
        forced = partial(half.clone(force_fp32_for_softmax=forced).apply, **sow)
        shown = jax.eval_shape(forced, VARIABLES, X)[1]["intermediates"]
        assert shown["attention_weights"][0].dtype == dtype


def test_a_linen_layer_decodes_from_its_own_cache():
    """Token by token: Flax's cache, our kernel, equal to Flax's layer on the whole text."""
    whole = linen_layer()
    step = whole.clone(decode=True, attention_fn=linen.attention_fn)
    shapes = jax.eval_shape(step.init, jax.random.key(0), X)["cache"]

    def one(cache, token):
        out, changed = step.apply({**VARIABLES, "cache": cache}, token[:, None], mutable=["cache"])
        return changed["cache"], out[:, 0]

    @jax.jit
    def both(tokens):
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(one, empty, tokens)[1], whole.apply(VARIABLES, X, mask=CAUSAL)

    out, expected = both(np.swapaxes(X, 0, 1))
    near(jnp.swapaxes(out, 0, 1), expected, tolerance=5e-6)


@pytest.mark.slow
def test_a_linen_layer_needs_memory_that_grows_with_its_length():
    long = jax.ShapeDtypeStruct((1, 4096, D), jnp.float32)

    def needed(layer):
        loss = jax.grad(lambda variables, x: layer.apply(variables, x).sum())
        return jax.jit(loss).lower(VARIABLES, long).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * LAYER["num_heads"] * 4096**2
    assert needed(linen_layer(attention_fn=linen.attention_fn)) < logits / 4 < logits <= needed(linen_layer())


def test_no_gradient_from_the_future():
    layer = linen_layer(attention_fn=linen.attention_fn)
    reached = jax.jit(jax.jacobian(lambda x: layer.apply(VARIABLES, x, mask=CAUSAL[:1]).sum(-1)))(X[:1])[0, :, 0]
    np.testing.assert_array_equal(np.any(reached != 0, axis=-1), np.tril(np.ones((T, T), bool)))


RATE, WIDE = 0.3, 61


@pytest.mark.parametrize("attention", tiered([linen.attention_fn, our_nnx.attention_fn], linen.attention_fn))
def test_dropout_drops_its_share_and_keeps_the_mean(attention):
    """With the unit vectors as values the output is the weights: here all 1/S, dropped or divided by what is kept."""
    q, k = np.zeros((2, WIDE, 2, 1)), np.zeros((2, WIDE, 2, 1))
    v = np.broadcast_to(np.eye(WIDE)[None, :, None], (2, WIDE, 2, WIDE)).astype(np.float32)

    @partial(jax.jit, static_argnames="deterministic")
    def draw(key, deterministic=False):
        return attention(q, k, v, dropout_rng=key, dropout_rate=RATE, deterministic=deterministic)

    weights = np.asarray(draw(jax.random.key(1)))
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 1 / WIDE / (1 - RATE), rtol=1e-5)
    assert abs(kept.mean() - (1 - RATE)) < 5 * np.sqrt(RATE * (1 - RATE) / kept.size)
    assert np.any(kept[0] != kept[1]) and np.any(kept[:, :, 0] != kept[:, :, 1])  # every weight draws for itself
    np.testing.assert_array_equal(weights, draw(jax.random.key(1)))
    assert np.any(weights != draw(jax.random.key(2)))
    np.testing.assert_allclose(draw(None, deterministic=True), 1 / WIDE, rtol=1e-5)
    with pytest.raises(ValueError, match="dropout_rng"):
        draw(None)


@pytest.mark.slow
def test_a_linen_layer_drops_while_it_trains():
    """Linen leaves out arguments that an attention_fn does not name, so a layer could lose its dropout in silence."""
    layer = linen_layer(dropout_rate=0.5, attention_fn=linen.attention_fn)
    still = layer.apply(VARIABLES, X, deterministic=True)
    near(still, layer.clone(dropout_rate=0.0).apply(VARIABLES, X))
    train = jax.jit(lambda key: layer.apply(VARIABLES, X, deterministic=False, rngs={"dropout": key}))
    np.testing.assert_array_equal(train(jax.random.key(1)), train(jax.random.key(1)))
    draws = np.asarray(jax.vmap(train)(jax.random.split(jax.random.key(2), 400)))
    spread = draws.std(axis=0)
    assert spread.min() > 0
    assert np.all(np.abs(draws.mean(axis=0) - still) < 6 * spread / np.sqrt(len(draws)))


GROUPED = {"num_kv_heads": 1} if "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention).parameters else {}
CALLED_CAUSAL = (
    {"is_causal": True} if "is_causal" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters else {}
)
# name: (more options of the layer, inputs, options of the call)
NNX_LAYERS: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "self": ({}, (X,), {}),
    "mask": ({}, (X,), {"mask": CAUSAL}),
    "cross, padding": ({}, (X, MEMORY), {"mask": PADDING}),
    "grouped heads": (GROUPED, (X,), {"mask": CAUSAL}),
    "causal, grouped": (GROUPED, (X,), CALLED_CAUSAL),
    "normalised queries and keys": ({"normalize_qk": True}, (X,), {}),
    "products of precision": ({"precision": "highest"}, (X,), {}),
}


def nnx_layer(**options: Any) -> nnx.MultiHeadAttention:
    shape = LAYER | {"in_features": D, "decode": False, "rngs": nnx.Rngs(params=0, dropout=1)}
    return nnx.MultiHeadAttention(**(shape | options))


@pytest.mark.slow
@pytest.mark.parametrize("name", tiered(NNX_LAYERS, "causal, grouped"))
def test_an_nnx_layer_with_our_kernel(name):
    options, inputs, call = NNX_LAYERS[name]
    layer, ours = nnx_layer(**options), nnx_layer(**options, attention_fn=our_nnx.attention_fn)
    theirs, params = nnx.split(layer)
    ours, same = nnx.split(ours)
    jax.tree.map(np.testing.assert_array_equal, params, same)

    def run(graph, params, inputs):
        out, back = jax.vjp(lambda *a: nnx.merge(graph, a[0])(*a[1], **call), params, inputs)
        return out, back(jnp.asarray(numbers(14, *out.shape)))

    both = jax.jit(lambda *a: (run(ours, *a), run(theirs, *a)))
    (out, grads), (expected, expected_grads) = both(params, inputs)
    near(out, expected, tolerance=5e-6)
    near(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), tolerance=5e-6)


@pytest.mark.slow
@pytest.mark.skipif(not CALLED_CAUSAL, reason="this Flax has no is_causal")
def test_flax_decodes_with_is_causal_as_without_or_is_refused():
    """In older Flax the layer hands is_causal on when it decodes, and sees key 0 alone, whatever it has seen."""

    def second(**options: Any) -> Any:
        layer = nnx_layer(attention_fn=our_nnx.attention_fn, decode=True)
        layer.init_cache((X.shape[0], 3, D))
        layer(X[:, :1])
        return layer(X[:, 1:2], **options)

    try:
        found = second(**CALLED_CAUSAL)
    except ValueError as error:
        assert "is_causal with one query and 3 keys" in str(error)
    else:
        np.testing.assert_array_equal(found, second())


@pytest.mark.slow
def test_an_nnx_layer_shows_its_weights_and_stays_as_it_is():
    layer, ours = nnx_layer(), nnx_layer(attention_fn=our_nnx.attention_fn)
    out = ours(X, mask=CAUSAL)
    np.testing.assert_array_equal(ours(X, mask=CAUSAL, sow_weights=True), out)
    layer(X, mask=CAUSAL, sow_weights=True)
    shown, expected = (jax.tree.leaves(nnx.pop(a, nnx.Intermediate)) for a in (ours, layer))
    near(shown, expected)
    assert shown[0].shape == (B, LAYER["num_heads"], T, T)


@pytest.mark.slow
def test_an_nnx_layer_decodes_from_its_own_cache():
    whole, step = nnx_layer(**GROUPED), nnx_layer(**GROUPED, attention_fn=our_nnx.attention_fn, decode=True)
    step.init_cache(X.shape)
    one = nnx.jit(lambda step, token: step(token))
    out = np.concatenate([one(step, X[:, t : t + 1]) for t in range(T)], axis=1)
    near(out, whole(X, mask=CAUSAL), tolerance=5e-6)


@pytest.mark.slow
def test_an_nnx_layer_drops_while_it_trains():
    layer = nnx_layer(attention_fn=our_nnx.attention_fn, dropout_rate=0.5)
    still = layer(X, deterministic=True)
    near(still, nnx_layer()(X))
    first, second = layer(X, deterministic=False), layer(X, deterministic=False)
    assert np.any(first != still) and np.any(first != second)


@pytest.mark.parametrize("attention", [linen.attention_fn, our_nnx.attention_fn])
def test_a_precision_that_was_asked_for_is_in_every_product(attention, monkeypatch):
    """On an accelerator, also in those of the gradient."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, k, v = arrays()
    loss = lambda *a: attention(*a, precision=jax.lax.Precision.HIGHEST).sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST") > 2
