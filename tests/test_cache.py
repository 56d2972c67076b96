"""The cache: the same numbers as without it, token by token and in chunks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numbers, random_params

from mhajax import attention, block, cache, language_model, masks, transformer, translator

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


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_a_language_model_extends_to_what_it_gives_at_once(lm, sizes):
    expected = apply_lm(lm, TOKENS)
    got, state = in_chunks(lambda t, s: extend_lm(lm, t, s, config=LM), language_model.init_cache((B,), 9, LM), sizes)
    close(got, expected)
    assert state.length.tolist() == [T, T] and state.k.shape == (2, B, 3, 9, 4) and state.v.shape == (2, B, 3, 9, 5)
    assert np.all(np.asarray(state.k)[..., T:, :] == 0)


@pytest.mark.parametrize("sizes", [[1] * T, [3, 3, 1]], ids=["token by token", "in chunks"])
def test_a_translator_extends_to_what_it_gives_at_once(mt, sizes):
    expected = apply_mt(mt, SOURCE, TOKENS, source_lengths=LENGTHS)
    state = begin_mt(mt, SOURCE, source_lengths=LENGTHS)
    got, state = in_chunks(lambda t, s: extend_mt(mt, t, s, config=MT), state, sizes)
    close(got, expected)
    assert state.written.length.tolist() == [T, T]


def test_gates_and_masks_are_those_of_the_whole_text(lm):
    """A mask looks up a token of the cache by its index in the text, not in the chunk."""
    gates = block.Gates(numbers(3, 2, 6))
    mask = masks.segments(np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]]))
    expected = apply_lm(lm, TOKENS, gates=gates, mask=mask)
    got, _ = in_chunks(
        lambda t, s: extend_lm(lm, t, s, config=LM, gates=gates, mask=mask),
        language_model.init_cache((B,), T, LM),
        [4, 1, 2],
    )
    close(got, expected)


def test_extending_works_in_a_scan(lm):
    def one(state, token):
        logits, state = language_model.extend(lm, token[:, None], state, LM)
        return state, logits[:, 0]

    _, got = jax.jit(partial(jax.lax.scan, one))(language_model.init_cache((B,), T, LM), jnp.asarray(TOKENS.T))
    expected = apply_lm(lm, TOKENS)
    close(jnp.swapaxes(got, 0, 1), expected)


def test_other_leading_axes(lm):
    expected = apply_lm(lm, TOKENS)[0]
    got, _ = extend_lm(lm, TOKENS[0], language_model.init_cache((), T, LM), config=LM)
    close(got, expected)


def test_an_overflow_is_an_error_where_it_can_be_seen(lm):
    state = language_model.init_cache((B,), 5, LM)
    with pytest.raises(ValueError, match="6 more tokens must fit, got a cache of capacity 5 that holds 0"):
        language_model.extend(lm, TOKENS[:, :6], state, LM)
    _, state = extend_lm(lm, TOKENS[:, :4], state, config=LM)
    with pytest.raises(ValueError, match="2 more tokens must fit, got a cache of capacity 5 that holds 4"):
        language_model.extend(lm, TOKENS[:, :2], state, LM)
    with pytest.raises(ValueError, match="6 more tokens must fit"):  # more than could ever fit, compiled or not
        extend_lm(lm, TOKENS[:, :6], state, config=LM)


def test_an_overflow_is_nan_where_it_cannot(lm):
    state = language_model.init_cache((B,), 5, LM)
    logits, state = extend_lm(lm, TOKENS[:, :5], state, config=LM)  # full to the brim
    assert np.all(np.isfinite(logits))
    logits, state = extend_lm(lm, TOKENS[:, :1], state, config=LM)
    assert np.all(np.isnan(logits))
    logits, _ = extend_lm(lm, TOKENS[:, :1], state, config=LM)  # and stays so
    assert np.all(np.isnan(logits))


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


def test_half_precision_extends_too(lm):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), lm)
    expected = apply_lm(half, TOKENS)
    got, _ = in_chunks(lambda t, s: extend_lm(half, t, s, config=LM), language_model.init_cache((B,), T, LM), [T])
    exact = apply_lm(lm, TOKENS)
    assert np.max(np.abs(got - exact)) <= 2 * np.max(np.abs(expected - exact))


def test_rows_can_be_selected(mt):
    rows = jnp.array([1, 1])
    state = begin_mt(mt, SOURCE, source_lengths=LENGTHS)
    _, state = extend_mt(mt, TOKENS[:, :3], state, config=MT)
    expected, _ = extend_mt(mt, TOKENS[:, 3:4], state, config=MT)
    got, _ = extend_mt(mt, TOKENS[rows, 3:4], translator.select(state, rows), config=MT)
    close(got, expected[rows])
    assert transformer.select(state.written, rows).length.tolist() == [3, 3]
