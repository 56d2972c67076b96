"""The cache of whole models: the same numbers as without it, token by token and in chunks."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numbers, random_params
from tiers import tiered

from mhajax import attention, cache, language_model, masks, transformer, translator
from mhajax.attentions import PerAttention

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, S, V = 2, 7, 5, 11
SHAPE: Any = {
    "d_model": 12,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 4,
    "value_dim": 5,
    "d_ff": 13,
    "vocab_size": V,
}
LM = language_model.Config(**SHAPE, num_layers=2)
MT = translator.Config(**SHAPE, encoder_layers=1, decoder_layers=2)
TOKENS: Any = np.random.default_rng(0).integers(0, V, (B, T))
SOURCE: Any = np.random.default_rng(1).integers(0, V, (B, S))
LENGTHS: Any = np.array([5, 3])
CHUNKS = {"token by token": [1] * T, "in chunks": [1, 2, 3, 1], "a prompt, then tokens": [5, 1, 1], "at once": [T]}

apply_lm = jax.jit(partial(language_model.apply, config=LM))
extend_lm = jax.jit(language_model.extend, static_argnames="config")
extend_mt = jax.jit(translator.extend, static_argnames="config")
apply_mt = jax.jit(partial(translator.apply, config=MT))
begin_mt = jax.jit(partial(translator.begin, capacity=9, config=MT))
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6)


@pytest.fixture(scope="module")
def lm():
    return random_params(language_model.init_params, LM)


@pytest.fixture(scope="module")
def mt():
    return random_params(translator.init_params, MT)


def in_chunks(extend, state, sizes):
    """Logits of all tokens, given in pieces of these sizes, and the last state."""
    pieces = np.split(TOKENS, np.cumsum(sizes)[:-1], axis=1)
    logits = []
    for piece in pieces:
        out, state = extend(piece, state)
        logits.append(out)
    return jnp.concatenate(logits, axis=1), state


@pytest.mark.parametrize("sizes", tiered(CHUNKS.values(), CHUNKS["in chunks"]), ids=CHUNKS)
def test_a_language_model_extends_to_what_it_gives_at_once(lm, sizes):
    expected = apply_lm(lm, TOKENS)
    got, state = in_chunks(lambda t, s: extend_lm(lm, t, s, config=LM), language_model.init_cache((B,), 9, LM), sizes)
    close(got, expected)
    assert state[1].length == T and state[1].k.shape == (B, 3, 9, 4) and state[1].v.shape == (B, 3, 9, 5)
    assert np.all(np.asarray(state[1].k)[..., T:, :] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", tiered([[1] * T, [3, 3, 1]], [3, 3, 1]), ids=["token by token", "in chunks"])
def test_a_translator_extends_to_what_it_gives_at_once(mt, sizes):
    expected = apply_mt(mt, SOURCE, TOKENS, source_lengths=LENGTHS)
    state = begin_mt(mt, SOURCE, source_lengths=LENGTHS)
    got, state = in_chunks(lambda t, s: extend_mt(mt, t, s, config=MT), state, sizes)
    close(got, expected)
    assert [one.length for one in state.written] == [T, T]


@pytest.mark.slow
def test_gates_and_masks_are_those_of_the_whole_text(lm):
    """A mask looks up a token of the cache by its index in the text, not in the chunk."""
    gates = PerAttention(attention=numbers(3, 2, 6))
    mask = masks.segments(np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]]))
    expected = apply_lm(lm, TOKENS, gates=gates, mask=mask)
    got, _ = in_chunks(
        lambda t, s: extend_lm(lm, t, s, config=LM, gates=gates, mask=mask),
        language_model.init_cache((B,), T, LM),
        [4, 1, 2],
    )
    close(got, expected)


@pytest.mark.slow
def test_extending_works_in_a_scan(lm):
    def one(state, token):
        logits, state = language_model.extend(lm, token[:, None], state, LM)
        return state, logits[:, 0]

    _, got = jax.jit(partial(jax.lax.scan, one))(language_model.init_cache((B,), T, LM), jnp.asarray(TOKENS.T))
    expected = apply_lm(lm, TOKENS)
    close(jnp.swapaxes(got, 0, 1), expected)


@pytest.mark.slow
def test_other_leading_axes(lm):
    expected = apply_lm(lm, TOKENS)[0]
    got, _ = extend_lm(lm, TOKENS[0], language_model.init_cache((), T, LM), config=LM)
    close(got, expected)


def test_an_overflow_is_an_error_where_it_can_be_seen(lm):
    state = language_model.init_cache((B,), 5, LM)
    with pytest.raises(ValueError, match="6 more tokens must fit, got a cache of capacity 5 that holds 0"):
        jax.eval_shape(lambda tokens: language_model.extend(lm, tokens, state, LM), TOKENS[:, :6])
    state = tuple(cache.Cache(one.k, one.v, jnp.int32(4), one.rolling) for one in state)  # as after four tokens
    with pytest.raises(ValueError, match="2 more tokens must fit, got a cache of capacity 5 that holds 4"):
        jax.eval_shape(lambda tokens: language_model.extend(lm, tokens, state, LM), TOKENS[:, :2])
    with pytest.raises(ValueError, match="6 more tokens must fit"):  # more than could ever fit, compiled or not
        extend_lm(lm, TOKENS[:, :6], state, config=LM)


@pytest.mark.slow
def test_an_overflow_is_nan_where_it_cannot(lm):
    state = language_model.init_cache((B,), 5, LM)
    logits, state = extend_lm(lm, TOKENS[:, :5], state, config=LM)  # full to the brim
    assert np.all(np.isfinite(logits))
    logits, state = extend_lm(lm, TOKENS[:, :1], state, config=LM)
    assert np.all(np.isnan(logits))
    logits, _ = extend_lm(lm, TOKENS[:, :1], state, config=LM)  # and stays so
    assert np.all(np.isnan(logits))


@pytest.mark.slow
def test_appending_itself_checks_its_room():
    config = attention.Config(d_model=6, num_heads=3, num_kv_heads=1, value_dim=5)
    new = attention.KeysValues(jnp.ones((B, 1, 3, 2)), jnp.full((B, 1, 3, 5), 2.0))
    state = cache.append(cache.init((B,), 4, config), new)
    assert state.length == 3 and state.capacity == 4
    np.testing.assert_array_equal(state.k[0, 0, :, 0], [1, 1, 1, 0])
    np.testing.assert_array_equal(state.v[0, 0, :, 0], [2, 2, 2, 0])
    with pytest.raises(
        ValueError, match="3 more tokens must fit, got a cache of capacity 4 that holds 3; make it larger"
    ):
        cache.append(state, new)
    over = jax.jit(cache.append)(state, new)
    assert np.all(np.isnan(over.k[..., 1:, :])) and over.length == 6


@pytest.mark.slow
def test_half_precision_extends_too(lm):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), lm)
    expected = apply_lm(half, TOKENS)
    got, _ = in_chunks(lambda t, s: extend_lm(half, t, s, config=LM), language_model.init_cache((B,), T, LM), [T])
    exact = apply_lm(lm, TOKENS)
    assert np.max(np.abs(got - exact)) <= 2 * np.max(np.abs(expected - exact))


@pytest.mark.slow
def test_rows_can_be_selected(mt):
    rows = jnp.array([1, 1])
    state = begin_mt(mt, SOURCE, source_lengths=LENGTHS)
    _, state = extend_mt(mt, TOKENS[:, :3], state, config=MT)
    expected, _ = extend_mt(mt, TOKENS[:, 3:4], state, config=MT)
    got, _ = extend_mt(mt, TOKENS[rows, 3:4], translator.select(state, rows), config=MT)
    close(got, expected[rows])
    assert [one.length for one in transformer.select(state.written, rows)] == [3, 3]


def test_the_positions_are_the_caches(lm):
    empty = language_model.init_cache((B,), T, LM)
    with pytest.raises(ValueError, match="got positions and a cache"):
        language_model.run(lm, TOKENS, LM, cache=empty, positions=jnp.arange(T))
    with pytest.raises(TypeError, match="language_model.extend: .*'positions'; .* the cache knows them"):
        language_model.extend(lm, TOKENS, empty, LM, positions=jnp.arange(T))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="got real without a cache"):
        language_model.run(lm, TOKENS, LM, real=jnp.ones((B, T), bool))


@pytest.mark.slow
def test_prompts_padded_left_and_right(lm, mt):
    """Row 0 has 7 tokens, row 1 has 4: padded on either side, then one token more for both."""
    short = TOKENS[1, :4]
    expected = apply_lm(lm, TOKENS)
    for real in ([False] * 3 + [True] * 4, [True] * 4 + [False] * 3):
        prompts, real = TOKENS.copy(), np.array([[True] * T, real])
        prompts[1, real[1]] = short
        logits, state = extend_lm(lm, prompts, language_model.init_cache((B,), 9, LM), config=LM, real=real)
        close(logits[0], expected[0])
        close(logits[1, real[1]], expected[1, :4])
        logits, state = extend_lm(lm, TOKENS[:, 4:5], state, config=LM)
        close(logits[1, 0], expected[1, 4])
        assert state[0].length.tolist() == [8, 5]
    written = begin_mt(mt, SOURCE, source_lengths=LENGTHS)
    logits, written = extend_mt(mt, prompts, written, config=MT, real=real)
    logits, _ = extend_mt(mt, TOKENS[:, 4:5], written, config=MT)
    close(logits[1, 0], apply_mt(mt, SOURCE, TOKENS, source_lengths=LENGTHS)[1, 4])


@pytest.mark.slow
def test_a_rolling_language_model(lm):
    expected = apply_lm(lm, TOKENS, mask=masks.window(2))
    got, state = in_chunks(
        lambda t, s: extend_lm(lm, t, s, config=LM), language_model.init_cache((B,), 3, LM, rolling=True), [1, 1, 5]
    )
    close(got, expected)
    assert state[1].k.shape == (B, 3, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "rows", "rolling"), tiered([(1, False, False), (3, True, True)], (1, False, False)))
def test_a_token_is_written_in_place(full_compiles, batch, rows, rolling):
    """Donated, or carried by a loop: no copy of the cache, in no layer."""
    # Keys are much more than their logits, and have as many heads as queries: for grouped ones, alone in a batch, XLA's
    # library transposes the keys of the layer that it is at, which is a copy for the product and not for the cache.
    config = dataclasses.replace(LM, head_dim=64, value_dim=64, num_kv_heads=None)
    state = language_model.init_cache((batch,), 2048, config, rolling=rolling)
    if rows:
        state = tuple(dataclasses.replace(one, length=jnp.zeros(batch, jnp.int32)) for one in state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    params = jax.eval_shape(partial(language_model.init_params, config=config), jax.random.key(0))

    def loop(params, tokens, state):
        step = lambda state, _: (language_model.extend(params, tokens, state, config)[1], None)  # noqa: E731
        return jax.lax.scan(step, state, None, length=3)[0]

    for function in (partial(language_model.extend, config=config), loop):
        compiled = full_compiles(function, donate_argnums=2).lower(params, jnp.zeros((batch, 1), int), state).compile()
        memory: Any = compiled.memory_analysis()
        one_layers_keys = size / 4
        assert memory.temp_size_in_bytes < one_layers_keys / 2 and memory.alias_size_in_bytes >= size


def test_layers_by_themselves_are_the_same_model(lm):
    apart = language_model.unstack(lm)
    assert isinstance(apart.stack.layers, tuple) and len(apart.stack.layers) == LM.num_layers
    chex.assert_trees_all_equal(language_model.unstack(apart), apart)
    close(apply_lm(apart, TOKENS), apply_lm(lm, TOKENS))
    state = language_model.init_cache((B,), T, LM)
    (expected, _), (got, _) = (extend_lm(params, TOKENS[:, :3], state, config=LM) for params in (lm, apart))
    close(got, expected)


@pytest.mark.slow
def test_layers_of_a_translator_by_themselves_are_the_same_model(mt):
    apart = translator.unstack(mt)
    begun = begin_mt(apart, SOURCE, source_lengths=LENGTHS)
    expected, _ = extend_mt(mt, TOKENS[:, :3], begin_mt(mt, SOURCE, source_lengths=LENGTHS), config=MT)
    got, _ = extend_mt(apart, TOKENS[:, :3], begun, config=MT)
    close(got, expected)


def test_layers_of_another_number_are_refused(lm):
    apart = language_model.unstack(lm)
    short = apart._replace(stack=apart.stack._replace(layers=apart.stack.layers[:-1]))
    with pytest.raises(ValueError, match=f"num_layers={LM.num_layers}, got .* layers; params and config do not belong"):
        language_model.extend(short, TOKENS[:, :3], language_model.init_cache((B,), T, LM), LM)


def test_a_cache_of_other_leading_axes_is_refused():
    config = attention.Config(d_model=4, num_heads=2)
    params = attention.init_params(jax.random.key(0), config)
    for leading in ((3,), (1,), (2, 1), ()):
        with pytest.raises(ValueError, match="leading axes of the new tokens must be those of the cache") as caught:
            state = cache.init(leading, 5, config)
            jax.eval_shape(lambda x, state=state: cache.extend(params, x, state, config), jnp.ones((2, 1, 4)))
        assert f"{leading} with K=2, got (2,) with K=2" in str(caught.value)
    with pytest.raises(TypeError, match=r"leading must be a tuple of sizes, got 2; write \(2,\)"):
        cache.init(2, 5, config)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="a size of leading must be an integer, got 2.0; write 2"):
        cache.init((2.0,), 5, config)  # pyright: ignore[reportArgumentType]
