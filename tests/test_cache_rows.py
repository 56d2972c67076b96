"""The cache of one attention: x [R, M, D] in rows that may be at different places, all kept or the last few."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numbers, random_params
from tiers import tiered

from mhajax import attention, cache, interventions, masks, positions, scores

pytestmark = pytest.mark.usefixtures("quick_compiles")

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6)

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
