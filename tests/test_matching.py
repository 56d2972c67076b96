"""Matching finds a permutation that is known, and says how much of it is luck."""

from itertools import permutations

import numpy as np
import pytest

from mhajax.heads import matching

SEEDS, N, TOKENS = 4, 7, 211


def correlation(a, b):
    """[N, tokens] each → [N, N]."""
    return np.corrcoef(a, b)[: len(a), len(a) :]


def runs(noise, seed=0):
    """The same heads in another order in each seed, with noise; and the orders."""
    random = np.random.default_rng(seed)
    heads = random.normal(size=(N, TOKENS))
    orders = [random.permutation(N) for _ in range(SEEDS)]
    return [heads[order] + noise * random.normal(size=heads.shape) for order in orders], orders


def test_a_known_permutation_is_found_through_noise():
    (first, second, *_), (ours, theirs, *_) = runs(noise=0.7)
    found = matching.match(correlation(first, second))
    np.testing.assert_array_equal(theirs[found.order], ours)
    assert found.mean == pytest.approx(1 / (1 + 0.7**2), abs=0.07) and abs(found.baseline) < 0.15
    np.testing.assert_allclose(np.mean(found.similarity), found.mean)


def test_the_matching_is_the_best_of_all_and_the_baseline_their_mean():
    similarity = np.random.default_rng(1).random((5, 5))
    sums = [similarity[np.arange(5), order].mean() for order in permutations(range(5))]
    found = matching.match(similarity)
    assert found.mean == pytest.approx(max(sums)) and found.baseline == pytest.approx(np.mean(sums))


def test_heads_stay_in_their_blocks():
    similarity = np.array([[0.1, 0.2, 0.9], [0.3, 0.1, 0.9], [0.9, 0.9, 0.0]])
    found = matching.match(similarity, blocks=([0, 0, 1], [0, 0, 1]))
    assert found.order.tolist() == [1, 0, 2] and found.mean == pytest.approx(0.5 / 3)
    assert found.baseline == pytest.approx((2 * 0.175 + 0) / 3)
    assert matching.match(similarity).order.tolist() != found.order.tolist()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_numbers_of_heads_may_differ(shape):
    similarity = np.zeros(shape)
    similarity[[0, 2, 1], [2, 0, 1]] = 1
    found = matching.match(similarity)
    assert found.order.tolist() == [2, 1, 0, -1, -1][: shape[0]] and found.mean == 1
    assert np.isnan(found.similarity).tolist() == [False, False, False, True, True][: shape[0]]


def test_stability_of_the_same_heads_is_high_and_of_others_is_what_matching_alone_reaches():
    same = matching.between(correlation, runs(noise=0.5)[0])
    others = matching.between(correlation, [np.random.default_rng(seed).normal(size=(N, TOKENS)) for seed in range(4)])
    found = matching.stability(same, untrained=others)
    assert found.untrained is not None
    assert found.matched.low < 0.8 < found.matched.high and found.matched.low > found.untrained.high
    assert found.untrained.value > found.untrained.baseline + 0.03  # the best of many matchings is better than chance
    np.testing.assert_allclose(found.heads, 0.8, atol=0.1)


def test_a_head_that_only_one_seed_has_stands_out():
    heads, orders = runs(noise=0.3)
    heads[0][5] = np.random.default_rng(9).normal(size=TOKENS)
    found = matching.stability(matching.between(correlation, heads))
    assert np.argmin(found.heads) == 5 and found.heads[5] < 0.3 < np.delete(found.heads, 5).min()


def test_the_interval_over_seeds_covers():
    """One number per seed decides how alike it is to others: similarity of a pair is their mean, 300 times 5 seeds."""
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        quality = random.normal(size=5)
        pairs = (quality[:, None] + quality) / 2
        found = matching.stability(pairs[:, :, None, None] * np.ones((2, 2))).matched
        covered += bool(found.low <= 0 <= found.high)
    assert abs(covered / 300 - 0.95) < 3 * np.sqrt(0.05 * 0.95 / 300)


def test_the_order_applied_to_parameters_gives_the_same_function():
    random = np.random.default_rng(4)
    w_v, w_o, x = random.normal(size=(N, 3, 2)), random.normal(size=(N, 2, 3)), random.normal(size=(11, 3))
    shuffle = random.permutation(N)
    outputs = lambda w: np.einsum("td,ndh->nth", x, w).reshape(N, -1)  # noqa: E731
    order = matching.match(correlation(outputs(w_v), outputs(w_v[shuffle]))).order
    np.testing.assert_array_equal(w_v[shuffle][order], w_v)
    run = lambda v, o: np.einsum("td,ndh,nhe->te", x, v, o)  # noqa: E731
    np.testing.assert_allclose(run(w_v[shuffle][order], w_o[shuffle][order]), run(w_v, w_o))


@pytest.mark.parametrize(
    "do, words",
    [
        (lambda: matching.match(np.ones(3)), "matrix [N, N'] of finite numbers, got (3,)"),
        (lambda: matching.match([[np.nan]]), "finite"),
        (lambda: matching.match(np.ones((2, 3)), blocks=([0, 0], [0, 0])), "(3,), got (2,) and (2,)"),
        (lambda: matching.match([[1.0]], blocks=([0], [1])), "no head"),
        (lambda: matching.stability(np.ones((2, 2, 3, 3))), "at least 3 seeds"),
    ],
)
def test_errors_say_what_was_expected(do, words):
    with pytest.raises(ValueError) as caught:
        do()
    assert words in str(caught.value)
