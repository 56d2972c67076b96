"""The cache: the same numbers as without it, token by token and in chunks."""

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

from mhajax import (
    attention,
    cache,
    interventions,
    language_model,
    masks,
    positions,
    scores,
    transformer,
    translator,
)  # fmt: skip
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


# One attention: x [R, M, D], rows that may be at different places.
R, M, CAPACITY, WIDTH = 3, 17, 19, 5
ONE = attention.Config(d_model=12, num_heads=6, num_kv_heads=3, head_dim=4, value_dim=7, use_bias=True)
WEIGHTS = jax.tree.map(jnp.asarray, random_params(attention.init_params, ONE))
X = numbers(7, R, M, 12)
CAUSAL: Any = {"mask": masks.causal(), "rotate": positions.rotary, "score": scores.alibi(6)}
ROLLING: Any = CAUSAL | {"mask": masks.causal() & masks.window(WIDTH - 1)}
whole = jax.jit(lambda x: attention.apply(WEIGHTS, x, ONE, **CAUSAL))
whole_window = jax.jit(lambda x: attention.apply(WEIGHTS, x, ONE, **ROLLING))
extend_one = jax.jit(lambda x, state, real=None: cache.extend(WEIGHTS, x, state, ONE, real=real, **CAUSAL)[:2])


def ragged(seed, most):
    """Chunks of at most so many tokens, and which of them are real, until every row has all of its M tokens."""
    random = np.random.default_rng(seed)
    done = np.zeros(R, int)
    while np.any(done < M):
        real = (random.random((R, random.choice([1, most]))) < [[0.9], [0.6], [0.3]]) & (done[:, None] < M)
        real &= done[:, None] + np.cumsum(real, axis=1) <= M
        x = np.full((*real.shape, 12), np.nan, np.float32)  # padding must not matter
        for row in range(R):
            x[row, real[row]] = X[row, done[row] : done[row] + real[row].sum()]
        done += real.sum(axis=1)
        yield x, real


@pytest.mark.parametrize("rolling", tiered([False, True], True), ids=["all", "rolling"])
@pytest.mark.parametrize("seed", tiered(range(3), 0))
def test_rows_at_different_places(rolling, seed):
    state = cache.init((R,), WIDTH if rolling else CAPACITY, ONE, rolling=rolling)
    state = dataclasses.replace(state, length=jnp.zeros(R, jnp.int32))
    rows = [[], [], []]
    for x, real in ragged(seed, most=7 if rolling else 4):
        out, state = extend_one(x, state, real)
        for row in range(R):
            rows[row].append(np.asarray(out)[row, real[row]])
    close(np.stack([np.concatenate(row) for row in rows]), (whole_window if rolling else whole)(X))
    assert state.length.tolist() == [M] * R


@pytest.mark.slow
@pytest.mark.parametrize("rolling", tiered([False, True], True), ids=["all", "rolling"])
@pytest.mark.parametrize(
    "sizes",
    tiered([[1] * M, [1, 4, 1, 7, 4], [M]], [1, 4, 1, 7, 4]),
    ids=["token by token", "in chunks", "at once"],
)
def test_rows_at_the_same_place(rolling, sizes):
    """A rolling cache holds 5 tokens, and still takes 7 or 17 at a time."""
    state = cache.init((R,), WIDTH if rolling else CAPACITY, ONE, rolling=rolling)
    out = []
    for piece in np.split(X, np.cumsum(sizes)[:-1], axis=1):
        y, state = extend_one(piece, state)
        out.append(y)
    close(np.concatenate(out, axis=1), (whole_window if rolling else whole)(X))
    assert state.length.shape == () and state.length == M


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rolling", "name"),
    [(True, "edges one by one"), (True, "edges by position"), (True, "equal weights"), (False, "edges one by one")],
)
def test_interventions_are_those_of_the_whole_text(rolling, name):
    """Edges are looked up by the index in the text, as masks are; the cache keeps what would be there without them."""
    cut = np.random.default_rng(0).random((M, CAPACITY)) < 0.4
    changed = {
        "edges one by one": (interventions.without_edges(cut), interventions.without_edges(cut[:, :M])),
        "edges by position": [interventions.without_edges(masks.window(3) & ~masks.window(1))] * 2,
        "equal weights": [interventions.uniform(np.arange(6) == 2)] * 2,
    }[name]
    options = ROLLING if rolling else CAUSAL
    state = cache.init((R,), WIDTH if rolling else CAPACITY, ONE, rolling=rolling)
    if rolling and name == "edges one by one":
        with pytest.raises(ValueError, match="must compare positions .* no fixed index"):
            cache.extend(WEIGHTS, X, state, ONE, intervention=changed[0], **options)
        return
    extend = jax.jit(lambda x, state: cache.extend(WEIGHTS, x, state, ONE, intervention=changed[0], **options)[:2])
    keys_values = partial(attention.keys_values, config=ONE, positions=np.arange(M), rotate=positions.rotary)
    kept = jax.jit(lambda state: cache.append(state, keys_values(WEIGHTS, X)))(state)
    rows = []
    for piece in np.split(X, [5, 10, 15], axis=1):
        out, state = extend(piece, state)
        rows.append(out)
    expected = jax.jit(lambda x: attention.apply(WEIGHTS, x, ONE, intervention=changed[1], **options))(X)
    close(np.concatenate(rows, axis=1), expected)
    assert np.max(np.abs(expected - (whole_window if rolling else whole)(X))) > 1e-2
    jax.tree.map(close, state, kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiered(["keys", "values", "logits", "weights"], "values"))
def test_a_rolling_cache_has_no_places_for_a_patch(name):
    rolling = cache.init((R,), WIDTH, ONE, rolling=True)
    shape = {"keys": (3, WIDTH, 4), "values": (3, WIDTH, 7)}.get(name, (6, 1, WIDTH))
    patch = interventions.patched(name, np.zeros(shape))
    with pytest.raises(ValueError, match=f"cannot name keys one by one, got intervention.{name} of shape"):
        cache.extend(WEIGHTS, X[:, :1], rolling, ONE, intervention=patch, **ROLLING)
    shared = interventions.patched(name, np.zeros((1, 1)))
    assert cache.extend(WEIGHTS, X[:, :1], rolling, ONE, intervention=shared, **ROLLING)[0].shape == (R, 1, 12)


def test_edges_for_rows_at_different_places_compare_positions():
    state = dataclasses.replace(cache.init((R,), CAPACITY, ONE), length=jnp.zeros(R, jnp.int32))
    with pytest.raises(ValueError, match="looks up queries by index, and needs rows .*, got lengths"):
        cache.extend(WEIGHTS, X, state, ONE, intervention=interventions.without_edges(np.ones((M, CAPACITY), bool)))


def test_positions_of_the_slots():
    state = dataclasses.replace(cache.init((4,), 5, ONE, rolling=True), length=jnp.array([0, 3, 5, 12]))
    nowhere = 2**30
    expected = [[nowhere] * 5, [0, 1, 2, nowhere, nowhere], [0, 1, 2, 3, 4], [10, 11, 7, 8, 9]]
    np.testing.assert_array_equal(state.positions, expected)


@pytest.mark.slow
def test_a_long_chunk_goes_the_way_of_any_attention():
    """33 tokens and more are not held against all keys at once."""
    x = numbers(8, 2, 37, 12)
    state = dataclasses.replace(cache.init((2,), 41, ONE), length=jnp.zeros(2, jnp.int32))
    first, state = extend_one(x[:, :4], state)
    rest, _ = extend_one(x[:, 4:], state)
    close(np.concatenate([first, rest], axis=1), whole(x))


@pytest.mark.slow
def test_a_row_begins_anew():
    _, state = extend_one(X[:, :7], cache.init((R,), CAPACITY, ONE))
    state = dataclasses.replace(state, length=state.length * jnp.array([1, 0, 1]))
    x = np.stack([X[0, 7:11], X[1, :4], X[2, 7:11]])
    out, state = extend_one(x, state)
    expected = whole(X)
    close(out, np.stack([expected[0, 7:11], expected[1, :4], expected[2, 7:11]]))
    assert state.length.tolist() == [11, 4, 11]


@pytest.mark.slow
@pytest.mark.parametrize("rolling", tiered([False, True], True), ids=["all", "rolling"])
def test_loops_and_vmap(rolling):
    """In a while_loop, in a scan, and with one cache for every row under vmap."""
    empty = cache.init((R,), WIDTH if rolling else CAPACITY, ONE, rolling=rolling)
    expected = (whole_window if rolling else whole)(X)
    steps = jnp.asarray(np.swapaxes(X, 0, 1)[:, :, None])

    def one(state, x):
        out, state = extend_one(x, state)
        return state, out[:, 0]

    def unfinished(carry: tuple):
        return carry[0] < M

    def body(carry):
        i, state, out = carry
        state, y = one(state, steps[i])
        return i + 1, state, out.at[:, i].set(y)

    _, scanned = jax.jit(partial(jax.lax.scan, one))(empty, steps)
    close(jnp.swapaxes(scanned, 0, 1), expected)
    loop = jax.jit(partial(jax.lax.while_loop, unfinished, body))
    _, _, looped = loop((jnp.int32(0), empty, jnp.zeros_like(expected)))
    close(looped, expected)
    apart = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (R, *a.shape)), cache.init((), empty.capacity, ONE, rolling=rolling)
    )
    mapped = jax.jit(jax.vmap(extend_one))
    first, apart = mapped(X[:, :7], apart)
    close(np.concatenate([first, mapped(X[:, 7:], apart)[0]], axis=1), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rolling", tiered([False, True], True), ids=["all", "rolling"])
def test_a_token_that_is_not_finite_spoils_those_who_see_it(bad, rolling):
    x = X.copy()
    x[1, 3, 5] = bad
    state = cache.init((R,), WIDTH if rolling else CAPACITY, ONE, rolling=rolling)
    out = []
    for piece in np.split(x, [1, 2, 6, 7], axis=1):
        y, state = extend_one(piece, state)
        out.append(y)
    out, expected = np.concatenate(out, axis=1), np.array((whole_window if rolling else whole)(X))
    spoilt = slice(3, 3 + WIDTH if rolling else M)
    assert np.all(np.isnan(out[1, spoilt]))
    out[1, spoilt] = expected[1, spoilt] = 0
    close(out, expected)
    assert np.all(np.isfinite(state.v))


def test_what_is_not_finite_is_taken_out_when_it_is_written():
    """Per head: a value that overflowed in one head is no matter of the others."""
    values = numbers(2, 3, 2, 7)
    values[1, 0, 6] = np.inf
    new = attention.KeysValues(numbers(1, 3, 2, 4), values)
    state = jax.jit(cache.append)(cache.init((), 2, ONE), new)
    bad = np.array([[False, False], [True, False], [False, False]])[..., None]
    np.testing.assert_array_equal(state.k, np.where(bad, np.nan, new.k))
    np.testing.assert_array_equal(state.v, np.where(bad, 0, new.v))


@pytest.mark.slow
def test_half_precision_in_a_cache():
    state = cache.init((R,), CAPACITY, ONE, jnp.bfloat16)
    out, state = extend_one(X.astype(jnp.bfloat16), state)
    assert out.dtype == jnp.bfloat16 and state.k.dtype == jnp.bfloat16
    exact, naive = whole(X), np.asarray(whole(X.astype(jnp.bfloat16)), np.float32)
    assert np.max(np.abs(np.asarray(out, np.float32) - exact)) <= 2 * np.max(np.abs(naive - exact))


@pytest.mark.slow
def test_an_overflow_of_one_row():
    state = dataclasses.replace(cache.init((R,), 5, ONE), length=jnp.array([0, 4, 2]))
    with pytest.raises(ValueError, match="4 more tokens must fit, got a cache of capacity 5 that holds 4"):
        cache.extend(WEIGHTS, X[:, :4], state, ONE, **CAUSAL)
    out, state = extend_one(X[:, :3], state)
    assert np.isnan(out).all(axis=(1, 2)).tolist() == [False, True, False]
    near = jax.jit(lambda x, state: cache.extend(WEIGHTS, x, state, ONE, mask=masks.window(0))[:2])
    state = dataclasses.replace(state, length=state.length - jnp.array([0, 0, 1]))
    out, state = near(X[:, :1], state)  # it sees nothing of the cache
    assert np.isnan(out).all(axis=(1, 2)).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        cache.init((R,), 0, ONE)


def test_what_cannot_be_looked_up_is_refused():
    extend = lambda state, **options: jax.eval_shape(  # noqa: E731
        lambda x: cache.extend(WEIGHTS, x, state, ONE, **options), X
    )
    rolling = cache.init((R,), WIDTH, ONE, rolling=True)
    with pytest.raises(ValueError, match="must compare positions .* no fixed index"):
        extend(rolling, mask=masks.causal() & ~masks.lengths(3))
    with pytest.raises(ValueError, match=r"got bias \(17, 5\)"):
        extend(rolling, bias=jnp.zeros((M, WIDTH)))
    state, real = cache.init((R,), M, ONE), jnp.ones((R, M), bool)
    with pytest.raises(
        ValueError,
        match=r"dense\(bool\[17,17\]\) looks up queries by index, and needs rows that are at the same place, got real=",
    ):
        extend(state, mask=np.ones((M, M), bool), real=real)
    with pytest.raises(ValueError, match=r"real must be bool \[..., t\] = \(3, 17\), got bool \(17,\)"):
        extend(state, real=real[0])


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
