"""Blocks, stacks, language model and translator: shapes, causality, padding, depth, gates, captures."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import multi_head_attention, numbers, random_params
from tiers import tiered

from mhajax import attention, block, language_model, masks, mlp, norm, transformer, translator
from mhajax.attentions import PerAttention

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, S, V, L, N, D = 2, 5, 7, 11, 3, 6, 10
SHAPE: Any = {
    "d_model": D,
    "num_heads": N,
    "num_kv_heads": 3,
    "head_dim": 4,
    "value_dim": 9,
    "d_ff": 13,
    "vocab_size": V,
}
LM = language_model.Config(**SHAPE, num_layers=L)
MT = translator.Config(**SHAPE, encoder_layers=2, decoder_layers=L)
TOKENS: Any = np.random.default_rng(0).integers(0, V, (B, T))
SOURCE: Any = np.random.default_rng(1).integers(0, V, (B, S))
LENGTHS: Any = np.array([7, 4])

apply_lm = jax.jit(language_model.apply, static_argnames="config")
apply_mt = jax.jit(translator.apply, static_argnames="config")
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6)


@pytest.fixture(scope="module")
def lm():
    return random_params(language_model.init_params, LM)


@pytest.fixture(scope="module")
def mt():
    return random_params(translator.init_params, MT)


def by_hand(layers, x, config, memory=None, causal=False):
    """A stack of layers in float64 NumPy: norm, attention, feed-forward."""

    def rms(params, x):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * params.scale

    for i in range(config.num_layers):
        layer = jax.tree.map(lambda w, i=i: np.asarray(w[i], np.float64), layers.layers)
        x = x + multi_head_attention(layer.attention, rms(layer.attention_norm, x), causal=causal)
        if memory is not None:
            x = x + multi_head_attention(layer.cross, rms(layer.cross_norm, x), memory)
        hidden = np.maximum(rms(layer.mlp_norm, x) @ layer.mlp.w_in + layer.mlp.b_in, 0)
        x = x + hidden @ layer.mlp.w_out + layer.mlp.b_out
    return rms(jax.tree.map(np.float64, layers.norm), x)


@pytest.mark.slow
def test_models_are_what_their_parts_say():
    """The whole of both models, without positions, against NumPy."""
    plain = {"activation": "relu", "positions": "none"}
    config = dataclasses.replace(LM, **plain)
    params = random_params(language_model.init_params, config)
    table = np.asarray(params.embedding.tokens, np.float64)
    x = by_hand(params.stack, table[TOKENS] * np.sqrt(D), config, causal=True)
    close(apply_lm(params, TOKENS, config), x @ table.T, atol=2e-5)

    config = dataclasses.replace(MT, **plain)
    params = random_params(translator.init_params, config)
    table = np.asarray(params.embedding.tokens, np.float64)
    memory = by_hand(params.encoder, table[SOURCE] * np.sqrt(D), config.encoder)
    x = by_hand(params.decoder, table[TOKENS] * np.sqrt(D), config.decoder, memory, causal=True)
    close(apply_mt(params, SOURCE, TOKENS, config), x @ table.T, atol=2e-5)


@pytest.mark.slow
def test_shapes_and_dtypes():
    shape = lambda config, module, *inputs: jax.eval_shape(  # noqa: E731
        lambda key: module.apply(module.init_params(key, config), *inputs, config), jax.random.key(0)
    )
    for leading in ((), (2,), (2, 3)):
        tokens, source = jnp.zeros((*leading, T), int), jnp.zeros((*leading, S), int)
        logits = (shape(LM, language_model, tokens), shape(MT, translator, source, tokens))
        assert all(out.shape == (*leading, T, V) and out.dtype == jnp.float32 for out in logits)
    params = jax.eval_shape(partial(language_model.init_params, config=LM), jax.random.key(0))
    assert all(leaf.shape[0] == L for leaf in jax.tree.leaves(params.stack.layers))


@pytest.mark.slow
def test_a_language_model_is_causal_by_gradient(lm):
    config = dataclasses.replace(LM, positions="sinusoidal")

    def out(x):  # the embeddings are what there is to differentiate
        return transformer.apply(lm.stack, x, config, mask=masks.causal())

    x = numbers(3, T, D)
    jacobian = np.abs(jax.jit(jax.jacrev(out))(x)).max(axis=(1, 3))
    future = np.triu(np.ones((T, T), bool), 1)
    assert np.all(jacobian[future] == 0) and np.all(jacobian[~future] > 1e-5)


@pytest.mark.parametrize("positions", tiered(["rotary", "sinusoidal", "none"], "rotary"))
def test_later_tokens_change_no_earlier_logits(lm, positions):
    config = dataclasses.replace(LM, positions=positions)
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % V
    before, after = apply_lm(lm, TOKENS, config), apply_lm(lm, changed, config)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_positions_matter_and_rotary_ones_only_by_difference(lm, positions):
    config = dataclasses.replace(LM, positions=positions)
    still = apply_lm(lm, TOKENS, config)
    moved = apply_lm(lm, TOKENS, config, positions=jnp.arange(T) + 9)
    spread = apply_lm(lm, TOKENS, config, positions=2 * jnp.arange(T))
    assert np.max(np.abs(still - spread)) > 1e-2
    if positions == "rotary":
        close(still, moved, atol=1e-4)
    else:
        assert np.max(np.abs(still - moved)) > 1e-2


@pytest.mark.slow
def test_packed_texts_do_not_see_each_other(lm):
    mask = masks.segments(np.array([0, 0, 0, 1, 1]))
    places = np.array([0, 1, 2, 0, 1])
    packed = apply_lm(lm, TOKENS, LM, mask=mask, positions=places)
    close(packed[:, :3], apply_lm(lm, TOKENS[:, :3], LM))
    close(packed[:, 3:], apply_lm(lm, TOKENS[:, 3:], LM))


@pytest.mark.slow
def test_padding_of_the_source_changes_nothing(mt):
    out = apply_mt(mt, SOURCE, TOKENS, MT, source_lengths=LENGTHS)
    rubbish = np.where(np.arange(S) < LENGTHS[:, None], SOURCE, 3)
    np.testing.assert_array_equal(apply_mt(mt, rubbish, TOKENS, MT, source_lengths=LENGTHS), out)
    longer = np.pad(rubbish, ((0, 0), (0, 4)), constant_values=5)
    close(apply_mt(mt, longer, TOKENS, MT, source_lengths=LENGTHS), out)
    close(apply_mt(mt, SOURCE, TOKENS, MT)[0], out[0])  # no padding at all


@pytest.mark.slow
def test_an_empty_source_is_finite_with_finite_gradients(mt):
    def loss(params):
        return jnp.sum(translator.apply(params, SOURCE, TOKENS, MT, source_lengths=np.array([0, 3])) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(mt)
    assert np.isfinite(value) and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_unrolling_changes_no_number(lm):
    unrolled = dataclasses.replace(LM, unroll=L)
    close(apply_lm(lm, TOKENS, unrolled), apply_lm(lm, TOKENS, LM))
    more = dataclasses.replace(LM, unroll=17)  # more than there are layers
    close(apply_lm(lm, TOKENS, more), apply_lm(lm, TOKENS, LM))


@pytest.mark.slow
def test_the_program_is_as_long_for_six_layers_as_for_two():
    def size(num_layers, **options):
        config = dataclasses.replace(LM, num_layers=num_layers, **options)
        params = jax.eval_shape(partial(language_model.init_params, config=config), jax.random.key(0))
        loss = lambda params: jnp.sum(language_model.apply(params, TOKENS, config))  # noqa: E731
        return len(jax.jit(jax.grad(loss)).lower(params).as_text())

    assert abs(size(6) / size(2) - 1) < 0.01
    assert size(6, unroll=6) > 1.4 * size(6)  # so that the line above says something


@pytest.mark.slow
def test_gates_are_those_of_each_layer_and_head(lm, mt):
    ones = PerAttention(attention=jnp.ones((L, N)))
    out = apply_lm(lm, TOKENS, LM)
    close(apply_lm(lm, TOKENS, LM, gates=ones), out)
    one_off = jnp.ones((L, N)).at[1, 4].set(0)
    w_o = lm.stack.layers.attention.w_o.copy()
    w_o[1, 4] = 0  # the same head, silenced by its parameters
    layers = lm.stack.layers._replace(attention=lm.stack.layers.attention._replace(w_o=w_o))
    silenced = lm._replace(stack=lm.stack._replace(layers=layers))
    gated = apply_lm(lm, TOKENS, LM, gates=PerAttention(attention=one_off))
    close(gated, apply_lm(silenced, TOKENS, LM))
    assert np.max(np.abs(gated - out)) > 1e-2
    per_example = jnp.stack([jnp.ones((L, N)), one_off], axis=1)  # [L, B, N]
    close(apply_lm(lm, TOKENS, LM, gates=PerAttention(attention=per_example)), np.stack([out[0], gated[1]]))

    full = apply_mt(mt, SOURCE, TOKENS, MT)
    ones = PerAttention(encoder=jnp.ones((2, N)), decoder=jnp.ones((L, N)), cross=jnp.ones((L, N)))
    close(apply_mt(mt, SOURCE, TOKENS, MT, gates=ones), full)
    for name, part in (("encoder", mt.encoder), ("decoder", mt.decoder), ("cross", mt.decoder)):
        off = getattr(ones, name).at[0, 1].set(0)
        changed = apply_mt(mt, SOURCE, TOKENS, MT, gates=PerAttention(**{**ones, name: off}))
        assert np.max(np.abs(changed - full)) > 1e-3, name
        kind = "cross" if name == "cross" else "attention"
        params = getattr(part.layers, kind)
        params = params._replace(w_o=jnp.asarray(params.w_o).at[0, 1].set(0))
        silenced = part._replace(layers=part.layers._replace(**{kind: params}))
        stack = "encoder" if name == "encoder" else "decoder"
        close(changed, apply_mt(mt._replace(**{stack: silenced}), SOURCE, TOKENS, MT))


@pytest.mark.slow
def test_looking_into_a_language_model(lm):
    look = jax.jit(language_model.apply_captured, static_argnames=("config", "capture"))
    out, seen = look(lm, TOKENS, LM, capture=attention.CAPTURES)
    np.testing.assert_array_equal(out, apply_lm(lm, TOKENS, LM))
    shapes = {name: array.shape for name, array in seen.attention.items()}
    assert shapes == {
        "queries": (L, B, N, T, 4), "keys": (L, B, 3, T, 4), "values": (L, B, 3, T, 9), "logits": (L, B, N, T, T),
        "weights": (L, B, N, T, T), "log_sum_exp": (L, B, N, T), "entropy": (L, B, N, T),
        "column_sums": (L, B, N, T), "heads": (L, B, N, T, 9),
        "contributions": (L, B, N, T, D),
    }  # fmt: skip
    assert list(seen) == ["attention"]
    np.testing.assert_allclose(np.sum(seen.attention["weights"], -1), 1, rtol=1e-5)
    assert np.all(np.asarray(seen.attention["weights"])[..., *np.triu_indices(T, 1)] == 0)


@pytest.mark.slow
def test_looking_into_a_translator(mt):
    look = jax.jit(translator.apply_captured, static_argnames=("config", "capture"))
    out, seen = look(mt, SOURCE, TOKENS, MT, source_lengths=LENGTHS, capture=("weights", "heads"))
    np.testing.assert_array_equal(out, apply_mt(mt, SOURCE, TOKENS, MT, source_lengths=LENGTHS))
    assert seen.encoder["weights"].shape == (2, B, N, S, S)
    assert seen.decoder["weights"].shape == (L, B, N, T, T)
    assert seen.cross["weights"].shape == (L, B, N, T, S)
    assert seen.cross["heads"].shape == (L, B, N, T, 9)
    assert np.all(np.asarray(seen.cross["weights"])[:, 1, ..., 4:] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("rate", tiered(["dropout", "attention_dropout"], "dropout"))
def test_dropout_follows_its_key(lm, rate):
    config = dataclasses.replace(LM, **{rate: 0.3})
    out = apply_lm(lm, TOKENS, LM)
    np.testing.assert_array_equal(apply_lm(lm, TOKENS, config), out)  # no key: evaluation
    first, again, other = (apply_lm(lm, TOKENS, config, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 1e-2 and np.max(np.abs(first - out)) > 1e-2


@pytest.mark.slow
def test_dropout_differs_between_layers_and_parts(mt):
    """No two masks of a forward pass are equal: the same key for two parts would correlate them."""
    config = dataclasses.replace(LM, attention_dropout=0.5, num_layers=2)
    layer = random_params(block.init_params, config)
    same = transformer.Params(jax.tree.map(lambda w: np.stack([w, w]), layer._replace(
        mlp=jax.tree.map(np.zeros_like, layer.mlp),
        attention=layer.attention._replace(w_o=np.zeros_like(layer.attention.w_o)),  # the layers do nothing to x
    )), norm.Params(jnp.ones(D), None))  # fmt: skip
    x = numbers(0, B, T, D)
    _, _, seen = transformer.run(same, x, config, dropout_key=jax.random.key(0), capture=("heads",))
    heads = np.asarray(seen.attention["heads"])
    assert np.max(np.abs(heads[0] - heads[1])) > 1e-2
    _, _, seen = transformer.run(same, x, config, capture=("heads",))
    close(seen.attention["heads"][0], seen.attention["heads"][1])


def test_no_dropout_leaves_no_trace():
    def lowered(config, **options):
        params = jax.eval_shape(partial(language_model.init_params, config=config), jax.random.key(0))

        def function(params):
            return language_model.apply(params, TOKENS, config, **options)

        return jax.jit(function).lower(params).as_text()

    assert lowered(dataclasses.replace(LM, dropout=0.3, attention_dropout=0.3)) == lowered(LM)
    assert lowered(LM, gates=PerAttention()) == lowered(LM)


@pytest.mark.slow
def test_one_table_embeds_and_gives_the_logits(lm):
    features = jax.jit(language_model.features, static_argnames="config")(lm, TOKENS, LM)
    close(apply_lm(lm, TOKENS, LM), features @ lm.embedding.tokens.T)
    unused = np.setdiff1d(np.arange(V), TOKENS)[0]
    with_table = lambda table: lm._replace(embedding=lm.embedding._replace(tokens=table))  # noqa: E731
    loss = lambda table: jnp.sum(language_model.apply(with_table(table), TOKENS, LM)[..., 0])  # noqa: E731
    gradient = np.abs(jax.jit(jax.grad(loss))(lm.embedding.tokens)).max(-1)
    assert np.all(gradient[np.unique(TOKENS)] > 0) and gradient[0] > 0
    assert unused == 0 or gradient[unused] == 0


@pytest.mark.slow
def test_half_precision_is_finite_and_near(lm, mt):
    half = lambda params: jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), params)  # noqa: E731
    lengths = {"source_lengths": LENGTHS}
    for out, exact in (
        (apply_lm(half(lm), TOKENS, LM), apply_lm(lm, TOKENS, LM)),
        (apply_mt(half(mt), SOURCE, TOKENS, MT, **lengths), apply_mt(mt, SOURCE, TOKENS, MT, **lengths)),
    ):
        assert out.dtype == jnp.float32 and np.all(np.isfinite(out))
        assert np.max(np.abs(out - exact)) < 0.1 * np.max(np.abs(exact))


def lm_shapes(config=LM):
    return jax.eval_shape(partial(language_model.init_params, config=config), jax.random.key(0))


def run_block(cross, memory):
    config = block.Config(d_model=6, num_heads=3)
    return jax.eval_shape(
        lambda key, x: block.apply(block.init_params(key, config, cross=cross), x, config, memory=memory),
        jax.random.key(0),
        jax.ShapeDtypeStruct((B, T, 6), jnp.float32),
    )


# what is done: (kind of error, what its message must hold)
ERRORS = {
    "vocabulary of a language model": (
        lambda: lm_shapes(dataclasses.replace(LM, vocab_size=None)),
        ValueError,
        ("language_model.init_params: config.vocab_size must be a number, got None",),
    ),
    "vocabulary of a translator": (
        lambda: translator.init_params(jax.random.key(0), dataclasses.replace(MT, vocab_size=None)),
        ValueError,
        ("translator.init_params: config.vocab_size must be a number, got None",),
    ),
    "memory is missing": (
        lambda: run_block(True, None),
        ValueError,
        ("block.apply: memory is missing, but params have cross attention",),
    ),
    "memory is too much": (
        lambda: run_block(False, jnp.ones((B, S, 6))),
        ValueError,
        ("block.apply: memory is given, but params have no cross attention", "cross=True"),
    ),
    "leading axes": (
        lambda: jax.eval_shape(
            lambda key: translator.apply(translator.init_params(key, MT), SOURCE[:1], TOKENS, MT), jax.random.key(0)
        ),
        ValueError,
        ("source [..., S] and target [..., T] must have the same leading axes", "(1, 7) and (2, 5)"),
    ),
    "tokens that are numbers": (
        lambda: jax.eval_shape(lambda params: language_model.apply(params, jnp.ones((B, T)), LM), lm_shapes()),
        TypeError,
        ("tokens must be integers [..., T]", "float32", "(2, 5)"),
    ),
    "layers": (
        lambda: dataclasses.replace(LM, num_layers=0),
        ValueError,
        ("num_layers must be at least 1, got 0",),
    ),
    "encoder layers": (
        lambda: dataclasses.replace(MT, encoder_layers=0),
        ValueError,
        ("encoder_layers must be at least 1, got 0",),
    ),
    "unroll": (lambda: dataclasses.replace(LM, unroll=0), ValueError, ("unroll must be at least 1, got 0",)),
    "hidden": (lambda: dataclasses.replace(LM, d_ff=0), ValueError, ("d_ff must be at least 1, got 0",)),
    "activation": (
        lambda: mlp.Config(d_model=6, activation="tanh"),  # pyright: ignore[reportArgumentType]
        ValueError,
        ("activation must be one of relu, gelu, gelu_tanh, silu, reglu, geglu, geglu_tanh, swiglu, got 'tanh'",),
    ),
    "dropout that float32 rounds to 1": (
        lambda: dataclasses.replace(LM, dropout=1 - 1e-12),
        ValueError,
        ("dropout must be in [0, 1), got 0.999999999999",),
    ),
    "dropout": (lambda: dataclasses.replace(LM, dropout=1.0), ValueError, ("dropout must be in [0, 1), got 1.0",)),
    "dropout of weights": (
        lambda: dataclasses.replace(MT, attention_dropout=-0.5),
        ValueError,
        ("attention_dropout must be in [0, 1), got -0.5",),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, kind, parts = ERRORS[name]
    with pytest.raises(kind) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []
