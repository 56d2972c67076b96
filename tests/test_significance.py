"""Tests of hypotheses: exact against enumeration and scipy, false alarms as often as they say."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from mhajax.statistics import Tally, benjamini_hochberg, max_statistic, paired, sign_flips


def test_paired_is_scipys_t_test_and_an_enumeration():
    random = np.random.default_rng(0)
    a, b = random.normal(1, 1, size=(6, 2, 3)), random.normal(size=(6, 2, 3))
    found, theirs = paired(a, b), stats.ttest_rel(a, b)
    np.testing.assert_allclose(found.t_test, theirs.pvalue)
    interval = theirs.confidence_interval()
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high])
    off = a - b
    flipped = np.array([(np.array(signs)[:, None, None] * off).mean(0) for signs in product((1, -1), repeat=6)])
    np.testing.assert_allclose(found.sign_flip, (np.abs(flipped) >= np.abs(off.mean(0)) - 1e-12).mean(0))
    np.testing.assert_allclose(found.effect, off.mean(0) / off.std(0, ddof=1))


def test_the_interval_of_the_effect_inverts_the_noncentral_t():
    found = paired([1.0, 3.0, 2.0, 2.5, 0.5, 1.2, 2.2], 0)
    t = found.effect * np.sqrt(7)
    np.testing.assert_allclose(stats.nct.cdf(t, 6, found.effect_low * np.sqrt(7)), 0.975, atol=1e-4)
    np.testing.assert_allclose(stats.nct.cdf(t, 6, found.effect_high * np.sqrt(7)), 0.025, atol=1e-4)


def test_five_seeds_cannot_go_below_a_sixteenth_by_flipping_signs():
    assert paired([5.0, 6, 7, 8, 9], 0).sign_flip == 1 / 16


def test_many_seeds_are_sampled_and_agree_with_the_t_test():
    x = np.random.default_rng(1).normal(0.3, 1, size=(40, 3))
    np.testing.assert_allclose(paired(x, 0).sign_flip, paired(x, 0).t_test, atol=0.015)


def test_paired_wants_the_same_seeds():
    with pytest.raises(ValueError, match=r"statistics.paired: .* got \(3,\) and \(4, 3\)"):
        paired(np.ones(3), np.ones((4, 3)))


def test_benjamini_hochberg_by_hand():
    p = np.array([[0.01, 0.04, np.nan], [0.03, 0.5, 0.005]])
    np.testing.assert_allclose(benjamini_hochberg(p), [[0.025, 0.05, np.nan], [0.05, 0.5, 0.025]])


@pytest.mark.parametrize("kind", ["symmetric", "guesses"])
def test_a_head_that_is_found_by_luck_is_found_as_seldom_as_it_says(kind):
    """300 models whose 13 heads, which depend on each other, are no better than their baselines."""
    random = np.random.default_rng(2)
    alarms = []
    for trial in range(300):
        if kind == "symmetric":
            off = random.normal(size=(60, 13)) + random.normal(size=(60, 1))
        else:  # right one time in four, baseline 1/4: not symmetric
            off = (random.random((60, 13)) < 0.25) - 0.25
        found = max_statistic(*sign_flips(Tally(off, np.array(1), np.array(0)), resamples=399, seed=trial))
        alarms.append(found.any <= 0.05)
    assert np.mean(alarms) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert kind == "guesses" or np.mean(alarms) > 0.015  # a test that never alarms would pass the line above


def test_planted_heads_are_found_and_no_others():
    random = np.random.default_rng(3)
    off = random.normal(size=(2, 80, 5))
    off[0, :, 2] += 1
    off[1, :, 4] += 1
    found = max_statistic(*sign_flips(Tally(off, np.array(1), np.array(0)), axis=1))
    assert np.argwhere(found.heads <= 0.05).tolist() == [[0, 2], [1, 4]]
    assert found.any == found.heads.min() <= 0.001


def test_step_down_by_hand():
    null = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0], [0.0, 1.0, 5.0]])
    found = max_statistic([1.5, 4.0, 0.5], null)
    # 4.0 against all heads: row 3 (5); 1.5 against heads 0 and 2: rows 2, 3; 0.5 against head 2: rows 1, 3.
    np.testing.assert_allclose(found.heads, [3 / 4, 2 / 4, 3 / 4])


def test_the_null_has_the_heads_of_the_values():
    with pytest.raises(ValueError, match=r"same heads \(2,\), got \(9, 3\)"):
        max_statistic(np.ones(2), np.ones((9, 3)))


def test_what_was_not_measured_is_not_the_best_of_all():
    chance = np.random.default_rng(0).normal(size=(999, 3))
    known, found = max_statistic([0.1, 5.0], chance[:, :2]), max_statistic([0.1, 5.0, np.nan], chance)
    assert found.any == known.any == 0.001 and np.isnan(found.heads[2])
    np.testing.assert_array_equal(found.heads[:2], known.heads)
    assert np.isnan(max_statistic([np.nan], chance[:, :1]).any)
    chance[5, 1] = np.nan
    with pytest.raises(ValueError, match=r"null must be numbers where values are, got NaN at \(5, 1\)"):
        max_statistic([0.1, 5.0, 1.0], chance)


@pytest.mark.parametrize(("shape", "axis"), [((0, 3), 0), ((4, 3), 2), ((), 0)])
def test_signs_of_no_sentence_are_refused(shape, axis):
    with pytest.raises(ValueError, match="statistics.sign_flips: axis must be the axis of the sentences, at least 1"):
        sign_flips(Tally(np.zeros(shape), np.ones(shape), np.zeros(shape)), axis=axis)
