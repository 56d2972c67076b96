"""Where heads look: against closed forms, heads built by hand, and worked examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhajax.heads import patterns
from mhajax.statistics import Tally

L, B, N, T, S = 2, 3, 5, 7, 11
FULL, CAUSAL = np.ones((T, T), bool), np.tril(np.ones((T, T), bool))


def uniform(visible):
    visible = np.asarray(visible, float)
    return visible / np.maximum(visible.sum(-1, keepdims=True), 1)


def looking(offset, length=T):
    """A head that puts all its weight `offset` tokens away, at the ends of the sentence on the last token there."""
    return np.eye(length)[np.clip(np.arange(length) + offset, 0, length - 1)]


def value(tally):
    return np.asarray(tally.total) / np.asarray(tally.count)


def baseline(tally):
    return np.asarray(tally.baseline) / np.asarray(tally.count)


@pytest.fixture(scope="module")
def random():
    """Weights [L, B, N, T, S] of sentences of 7, 4 and 0 real queries and 11, 6 and 9 real keys."""
    queries, keys = np.array([7, 4, 0]), np.array([11, 6, 9])
    visible = (np.arange(T) < queries[:, None])[:, :, None] & (np.arange(S) < keys[:, None])[:, None, :]
    visible = visible[None, :, None]  # [1, B, 1, T, S]
    logits = np.random.default_rng(0).normal(size=(L, B, N, T, S))
    return uniform(np.where(visible, np.exp(logits), 0)), visible


MEASURES = {
    "distance": patterns.distance,
    "spread": patterns.spread,
    "variability": lambda w, v: patterns.variability(w, v, length=5),
    "offset_hits": lambda w, v: patterns.offset_hits(w, v, (-2, 0, 3)),
}


def by_hand(name, weights, visible, sentences=None):
    """Sums of one sentence of one head, [T, S], in loops: total, count, baseline."""
    out = np.zeros((3, 3)) if name == "offset_hits" else np.zeros(3)
    for t in range(len(weights)):
        keys = np.flatnonzero(visible[t])
        w = weights[t]
        if len(keys) == 0 or (len(keys) == 1 and name != "distance"):
            continue
        if name == "distance":
            out += sum(w[s] * abs(t - s) for s in keys), 1, sum(abs(t - s) for s in keys) / len(keys)
        elif name == "spread":
            out += -sum(w[s] * np.log(w[s]) for s in keys if w[s] > 0) / np.log(len(keys)), 1, 1
        else:
            for o, offset in enumerate((-2, 0, 3)):
                if t + offset in keys:
                    out[:, o] += max(keys, key=lambda s: w[s]) == t + offset, 1, 1 / len(keys)
    return out


@pytest.mark.parametrize("name", ["distance", "spread", "offset_hits"])
def test_measures_are_what_loops_over_queries_and_keys_say(random, name):
    weights, visible = random
    tally = MEASURES[name](weights, visible)
    seen = np.broadcast_to(visible, weights.shape)
    for where in np.ndindex(L, B, N):
        expected = by_hand(name, weights[where], seen[where])
        for part, want in zip(tally, expected, strict=True):
            np.testing.assert_allclose(np.broadcast_to(part, np.shape(tally.total))[where], want, atol=1e-5)


def test_distance_of_uniform_attention_has_a_closed_form():
    for visible, expected in ((FULL, (T * T - 1) / (3 * T)), (CAUSAL, (T - 1) / 4)):
        tally = patterns.distance(uniform(visible), visible)
        np.testing.assert_allclose([value(tally), baseline(tally)], expected, rtol=1e-6)
        np.testing.assert_allclose(baseline(patterns.distance(looking(-1), visible)), expected, rtol=1e-6)


def test_distance_of_the_head_of_the_previous_token():
    np.testing.assert_allclose(value(patterns.distance(looking(-1), CAUSAL)), (T - 1) / T)
    places = 10 * np.arange(T)
    tally = patterns.distance(looking(-1), CAUSAL, positions=places, memory_positions=places + 3)
    np.testing.assert_allclose(value(tally), (3 + (T - 1) * 7) / T)


def test_the_share_of_the_first_token_is_taken_out():
    resting = 0.75 * np.eye(T)[0] + 0.25 * looking(-1)  # three quarters of it on the first token
    visible = patterns.without_first(CAUSAL)
    tally = patterns.distance(resting, visible)  # of queries 2 … 6; query 1 looks at nothing else
    assert (float(tally.total), int(tally.count)) == (T - 2, T - 2)
    np.testing.assert_allclose(tally.baseline, sum((t - 1) / 2 for t in range(2, T)))
    np.testing.assert_allclose(patterns.distance(resting, CAUSAL).total, 0.75 * 21 + 0.25 * 6)


def test_spread_is_0_for_one_key_and_1_for_all_visible_keys_alike():
    tally = patterns.spread(np.stack([uniform(CAUSAL), looking(0)]), CAUSAL)
    np.testing.assert_allclose(value(tally), [1, 0], atol=1e-6)
    assert tally.count.tolist() == tally.baseline.tolist() == [T - 1, T - 1]  # the first query has no choice


def test_spread_by_hand():
    weights = np.array([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])
    tally = patterns.spread(weights, np.array([[True, True, True], [True, True, True]]))
    np.testing.assert_allclose(tally.total, (1.5 * np.log(2) + np.log(2)) / np.log(3), rtol=1e-6)


@pytest.mark.slow
def test_variability_by_hand():
    """Two sentences, one query: weights (1, 0) and (½, ½), mean (¾, ¼): each deviates by ½ in sum, so ¼ of 1."""
    weights = np.array([[[1.0, 0.0]], [[0.5, 0.5]]])[:, None]  # [B, N, T, S]
    tally = patterns.variability(weights, np.ones((1, 2), bool))
    np.testing.assert_allclose(tally.total, [[0.25], [0.25]])
    np.testing.assert_allclose(value(tally), [[0.25], [0.25]])
    np.testing.assert_allclose(tally.baseline, [[0.5 * 0.5], [0.0]])


@pytest.mark.slow
def test_variability_is_0_for_a_fixed_pattern_and_largest_for_heads_that_never_repeat():
    fixed = np.broadcast_to(looking(-1), (B, N, T, T))
    visible = np.broadcast_to(FULL, (B, 1, T, T))
    tally = patterns.variability(fixed, visible)
    assert np.abs(tally.total).max() < 1e-6
    np.testing.assert_allclose(baseline(tally), (1 - 1 / B) * (1 - 1 / T), rtol=1e-6)
    never = np.stack([np.roll(np.eye(T), shift, axis=-1) for shift in range(B)])[:, None]
    np.testing.assert_allclose(value(patterns.variability(never, visible)), 1 - 1 / B, rtol=1e-6)


@pytest.mark.slow
def test_the_baseline_of_variability_is_a_head_whose_keys_are_drawn_anew():
    drawn = np.eye(4)[np.random.default_rng(1).integers(0, 4, size=(2000, 1, 5))]
    tally = patterns.variability(drawn, np.ones((5, 4), bool))
    np.testing.assert_allclose(
        tally.total.sum() / tally.count.sum(), tally.baseline.sum() / tally.count.sum(), atol=0.02
    )


@pytest.mark.slow
def test_variability_compares_what_sees_the_same_keys():
    """Short causal sentences count as far as they go; others do not, and change nothing."""
    random = np.random.default_rng(2)
    real = np.arange(5) < np.array([5, 5, 3])[:, None]
    causal = (np.tril(np.ones((5, 5), bool)) & real[:, :, None])[:, None]
    weights = uniform(np.where(causal, random.random((3, N, 5, 5)), 0))
    tally = patterns.variability(weights, causal)
    assert tally.count[:, 0].tolist() == [5, 5, 3]
    whole = (real[:, :, None] & real[:, None, :])[:, None]
    weights = uniform(np.where(whole, random.random((3, N, 5, 5)), 0))
    tally, long = patterns.variability(weights, whole), patterns.variability(weights[:2], whole[:2])
    assert tally.count[:, 0].tolist() == [5, 5, 0]
    np.testing.assert_allclose(tally.total[:2], long.total, rtol=1e-6)


@pytest.mark.slow
def test_positional_heads_are_found_and_others_are_not():
    random = np.random.default_rng(3)
    heads = np.stack([looking(-1), looking(2), looking(0)])
    weights = np.concatenate([np.stack([heads] * 40), np.eye(T)[random.integers(0, T, size=(40, 1, T))]], axis=1)
    found = patterns.offset_hits(weights, FULL)  # [B, N, O]
    best, tally = patterns.positional(found)
    assert best[:3].tolist() == [-1, 2, 0]
    share = tally.total.sum(0) / tally.count.sum(0)
    assert (share[:3] == 1).all() and share[3] < 0.5
    assert tally.count.shape == (20, 4) and tally.count[0].tolist()[:3] == [T - 1, T - 2, T]
    np.testing.assert_allclose(tally.baseline, tally.count / T, rtol=1e-6)
    stacked = Tally(*(np.stack([np.broadcast_to(a, found.total.shape)] * L) for a in found))  # [L, B, N, O]
    again, tallies = patterns.positional(stacked)
    assert again.shape == (L, 4) and tallies.total.shape == (L, 20, 4)
    np.testing.assert_array_equal(tallies.total[1], tally.total)


@pytest.mark.slow
def test_the_offset_is_chosen_on_one_half_and_reported_on_the_other():
    turning = np.stack([looking(-1), looking(1)] * 4)[:, None]  # the other half does something else
    best, tally = patterns.positional(patterns.offset_hits(turning, FULL))
    assert best.tolist() == [-1] and tally.total.sum() == 0
    with pytest.raises(
        ValueError, match=r"two sentences or more at axis=-3 and O=17 offsets at its end, got \(1, 1, 17"
    ):
        patterns.positional(patterns.offset_hits(turning[:1], FULL))
    with pytest.raises(ValueError, match=r"O=2 offsets"):
        patterns.positional(patterns.offset_hits(turning, FULL), (0, 1))


@pytest.mark.parametrize("name", MEASURES)
def test_padding_changes_nothing_and_nothing_visible_is_no_nan(random, name):
    weights, visible = random
    measure = jax.jit(MEASURES[name])
    tally = measure(weights, visible)
    assert all(np.isfinite(part).all() for part in tally)
    assert not any(np.asarray(part[:, 2]).any() for part in tally if part.ndim > 2)  # a sentence without queries
    spoilt = np.where(visible, weights, np.nan)  # what others compute for a query that sees nothing
    wider = np.pad(spoilt, [(0, 0)] * 3 + [(0, 2), (0, 3)], constant_values=0.5)
    padded = np.pad(visible, [(0, 0)] * 3 + [(0, 2), (0, 3)])
    for part, again in zip(tally, measure(jnp.asarray(wider), padded), strict=True):
        np.testing.assert_allclose(part, again, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_half_precision_is_summed_in_float32():
    weights = jnp.asarray(np.broadcast_to(uniform(np.ones((3, 300))), (3, 300)), jnp.bfloat16)
    assert patterns.distance(weights, np.ones((3, 300), bool)).total.dtype == jnp.float32
    np.testing.assert_allclose(value(patterns.spread(weights, np.ones((3, 300), bool))), 1, rtol=1e-5)
