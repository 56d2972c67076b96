"""Intervals that cover as often as they say, by simulation; worked examples. Trials are cells of one call."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from mhajax import statistics
from mhajax.statistics import Tally, difference, estimate, select_and_report

TRIALS = 1000
NOISE = 3 * np.sqrt(0.05 * 0.95 / TRIALS)  # 2 %: three standard errors of a coverage of 95 %


def coverage(measure, truth):
    return np.mean((measure.low <= truth) & (truth <= measure.high))


def percentile(total, count, expanded):
    """The plain bootstrap over the first axis, and Hesterberg's correction of it: what `estimate` has to beat."""
    n = len(total)
    drawn = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=2000)
    tail = float(stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))) if expanded else 0.025
    low, high = np.quantile((drawn @ total) / (drawn @ count), [tail, 1 - tail], axis=0)
    return statistics.Measure(low, low, high, low)


def test_five_seeds_are_covered_where_percentiles_are_not():
    x = np.random.default_rng(0).normal(3, 1, size=(5, TRIALS))
    one = np.ones_like(x)
    plain, expanded = coverage(percentile(x, one, False), 3), coverage(percentile(x, one, True), 3)
    honest = coverage(estimate(Tally(x, one, one)), 3)
    assert plain < 0.87 and 0.88 < expanded < 0.935
    assert abs(honest - 0.95) < NOISE


@pytest.mark.parametrize("shared", [True, False], ids=["same sentences", "other sentences"])
@pytest.mark.parametrize("of_seeds, of_sentences", [(1.0, 0.0), (0.2, 3.0), (0.0, 3.0)])
def test_nested_intervals_cover(shared, of_seeds, of_sentences):
    """Seeds differ, sentences differ (for all seeds alike, or not), and both together; 5 seeds, 41 sentences."""
    random = np.random.default_rng(2)
    seeds, sentences = 5, 41
    count = random.integers(1, 5, size=(1, sentences, TRIALS)).astype(float)
    value = (
        10
        + of_seeds * random.normal(size=(seeds, 1, TRIALS))
        + of_sentences * random.normal(size=(1 if shared else seeds, sentences, TRIALS))
        + random.normal(size=(seeds, sentences, TRIALS))
    )
    covered = coverage(estimate(Tally(value * count, count, count), axis=(0, 1), resamples=500), 10)
    assert 0.95 - 1.5 * NOISE < covered < 0.99


def test_two_seeds_are_covered():
    """Alone (a bootstrap of 2 shortens Student's interval), and with sentences (Satterthwaite's is too short)."""
    random = np.random.default_rng(12)
    x, one = random.normal(3, 1, size=(2, TRIALS)), np.array(1)
    assert abs(coverage(estimate(Tally(x, one, one), resamples=200), 3) - 0.95) < NOISE
    seeds, sentences = random.normal(size=(2, 1, TRIALS)), 3 * random.normal(size=(1, 41, TRIALS))
    value = 10 + seeds + sentences + random.normal(size=(2, 41, TRIALS))
    assert coverage(estimate(Tally(value, one, one), axis=(0, 1), resamples=200), 10) > 0.95 - NOISE


def test_two_seeds_of_a_share_are_covered():
    of_seed = np.random.default_rng(13).beta(8, 2, size=(2, 1, TRIALS))
    total = np.random.default_rng(14).binomial(3, np.broadcast_to(of_seed, (2, 53, TRIALS)))
    assert coverage(estimate(Tally(total, np.array(3), np.array(1)), axis=(0, 1)), 0.8) > 0.95 - NOISE


@pytest.mark.parametrize("sentences, least", [(5, 0.89), (10, 0.91), (20, 0.925)])
def test_an_exponential_measure_is_covered_as_often_as_the_docstring_says(sentences, least):
    x = np.random.default_rng(15).exponential(1, size=(sentences, TRIALS))
    assert coverage(estimate(Tally(x, np.array(1), np.array(1)), resamples=500), 1) > least


def test_a_head_whose_losses_happen_to_lie_between_0_and_1_is_no_share():
    x = np.array([[0.2, 1.2], [0.9, 3.0], [0.6, -1.0]])
    found = estimate(Tally(x, np.array(1), np.array(1)))
    assert found.high[0] > 1.2  # Student's t: 0.567 + 4.30 · 0.203


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
@pytest.mark.parametrize("sentences", [11, 101])
def test_intervals_of_shares_cover(share, sentences):
    """Also small ones, of which a sample often shows none; questions of one sentence are answered alike."""
    random = np.random.default_rng(3)
    count = random.integers(1, 4, size=(sentences, TRIALS))
    alike = random.random(count.shape) < 0.3
    total = np.where(
        alike, count * (random.random(count.shape) < share), random.binomial(count, share)
    )  # either all of a sentence or each for itself
    assert coverage(estimate(Tally(total, count, count)), share) > 0.95 - NOISE


def test_intervals_of_shares_cover_over_seeds():
    random = np.random.default_rng(4)
    of_seed = random.beta(8, 2, size=(5, 1, TRIALS))
    total = random.binomial(3, np.broadcast_to(of_seed, (5, 53, TRIALS)))
    assert 0.95 - NOISE < coverage(estimate(Tally(total, np.array(3), np.array(1)), axis=(0, 1)), 0.8) <= 0.995


def test_differences_cover_and_are_narrower_than_their_parts():
    random = np.random.default_rng(5)
    hard = random.random((101, TRIALS))
    total, baseline = ((random.random(hard.shape) < hard * easy).astype(float) for easy in (0.8, 0.6))
    baseline = np.where(random.random(hard.shape) < 0.8, np.minimum(total, random.random(hard.shape) < 0.75), baseline)
    truth = 0.4 - (0.8 * 0.75 * 0.4 + 0.2 * 0.3)
    tally = Tally(total, np.array(1), baseline)
    off, value = difference(tally), estimate(tally)
    assert abs(coverage(off, truth) - 0.95) < NOISE
    assert np.mean(off.high - off.low) < np.mean(value.high - value.low)
    np.testing.assert_allclose(off.value, value.value - value.baseline)
    assert (off.baseline == 0).all()


def test_a_skewed_measure_reaches_further_on_the_side_of_its_tail():
    x = np.random.default_rng(6).gamma(1, 1, size=(31, TRIALS)) * 50
    found = estimate(Tally(x, np.array(1), np.array(1)))
    longer = np.median((found.high - found.value) / (found.value - found.low))
    assert 1.1 < longer < 2
    assert coverage(found, 50) > 0.91


@pytest.mark.parametrize("axis", [0, (1, 0)])
def test_shares_of_0_and_100_percent_have_the_width_that_the_sentences_allow(axis):
    hits = np.broadcast_to([0.0, 4.0], (200, 5, 2))
    count = np.full((200, 1, 1), 4.0)
    found = estimate(Tally(hits, count, np.array(1.0)), axis=axis)
    width = 1 - 0.025 ** (1 / 200)  # Clopper and Pearson for 0 of 200
    np.testing.assert_allclose(found.high[..., 0], width)
    np.testing.assert_allclose(found.low[..., 1], 1 - width)
    assert (found.low[..., 0] == 0).all() and (found.high[..., 1] == 1).all()
    same = difference(Tally(hits, count, hits), axis=axis)
    np.testing.assert_allclose(same.high - same.low, 2 * width)


def test_binary_answers_give_clopper_and_pearson():
    x = np.repeat([1.0, 0.0], [30, 970])
    found, exact = estimate(Tally(x, np.array(1), np.array(0))), stats.binomtest(30, 1000).proportion_ci()
    np.testing.assert_allclose([found.low, found.high], [exact.low, exact.high], rtol=0.02)


def test_values_are_ratios_of_sums_and_axes_are_kept():
    random = np.random.default_rng(7)
    total, count = random.normal(size=(2, 3, 7, 5)), random.integers(1, 9, size=(3, 7, 1))
    found = estimate(Tally(total, count, 2 * total), axis=(1, 2))
    by_hand = (total.sum(2) / count.sum(1)).mean(1)
    np.testing.assert_allclose(found.value, by_hand)
    np.testing.assert_allclose(found.baseline, 2 * by_hand)
    assert all(part.shape == (2, 5) for part in found)
    one = estimate(Tally(total[:, 1], count[1], 2 * total[:, 1]), axis=-2)
    np.testing.assert_allclose(one.value, total[:, 1].sum(1) / count[1].sum(0))


def test_the_level_and_the_seed_of_the_bootstrap():
    x = np.random.default_rng(8).normal(5, 1, size=(23, 2))
    tally = Tally(x, np.array(1), np.array(1))
    narrow, wide = estimate(tally, level=0.5), estimate(tally, level=0.99)
    assert (wide.low < narrow.low).all() and (narrow.high < wide.high).all()
    np.testing.assert_array_equal(estimate(tally).low, estimate(tally).low)


def test_sentences_that_count_nothing_change_nothing_and_nothing_is_nan():
    hits, count = np.array([[1.0, 0], [2, 0], [0, 0], [1, 0]]), np.array([[2.0, 0], [2, 0], [3, 0], [3, 0]])
    found = estimate(Tally(hits, count, hits))
    more = estimate(Tally(*(np.concatenate([part, np.zeros((3, 2))]) for part in (hits, count, hits))))
    np.testing.assert_allclose(found, more, equal_nan=True)
    assert np.isnan(np.stack(found)[:, 1]).all() and not np.isnan(np.stack(found)[:, 0]).any()
    assert np.isnan(np.stack(difference(Tally(hits, count, hits)))[:, 1]).all()


def test_a_seed_that_counts_nothing_is_left_out():
    random = np.random.default_rng(9)
    total, count = random.random((4, 11, 1)) * 3, np.full((4, 11, 1), 3.0)
    total[3] = count[3] = 0
    found = estimate(Tally(total, count, total), axis=(0, 1))
    np.testing.assert_allclose(found, estimate(Tally(total[:3], count[:3], total[:3]), axis=(0, 1)))


def test_one_sentence_gives_a_value_and_no_interval():
    found = estimate(Tally(np.array([1.0, 0]), np.array([2.0, 0]), np.array([1.0, 0])))
    assert found.value == 0.5 and np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("axis, words", [(3, "2 axes (3, 1)"), ((0, 0), "got (0, 0)"), (1, "at least 2 along axis 1")])
def test_errors_name_the_axis(axis, words):
    with pytest.raises(ValueError) as caught:
        estimate(Tally(np.ones((3, 1)), np.array(1), np.array(1)), axis=axis)
    assert "statistics.estimate" in str(caught.value) and words in str(caught.value)


def test_the_best_of_useless_heads_is_not_reported_as_useful():
    """Every head guesses right half of the time; the best on its own sentences looks better, not on the others."""
    random = np.random.default_rng(10)
    hits = (random.random((5, 3, 40, 7)) < 0.5).astype(float)  # [seeds, layers, sentences, heads]
    offsets = (random.random((1, 1, 40, 21)) < 0.5).astype(float)
    tally, one = Tally(hits, np.array(1), np.array(0.5)), np.array(1)
    naive = hits.mean(2).max((1, 2)).mean()
    report = select_and_report(tally, axis=(0, 2), heads=(1, 3), alternatives=Tally(offsets, one, one))
    assert naive > 0.6 > report.best.value and report.best.low < 0.5 < report.best.high
    assert report.difference.low < 0 < report.difference.high
    assert report.chosen.shape == (2, 5) and report.chosen_baseline is not None
    assert report.chosen_baseline.shape == (2, 1)


def test_a_planted_head_is_chosen_in_every_seed_and_beats_the_best_offset():
    random = np.random.default_rng(11)
    hits = (random.random((5, 60, 2, 3, 2)) < 0.3).astype(float)  # [seeds, sentences, layers, heads, relations]
    planted = [4, 0, 2, 5, 1]
    for seed, head in enumerate(planted):
        hits[seed, :, head // 3, head % 3, 0] = random.random(60) < 0.9
    offsets = np.zeros((1, 60, 1, 17, 2))
    offsets[..., 3, :] = random.random((1, 60, 1, 2)) < 0.6
    one = np.array(1.0)
    report = select_and_report(
        Tally(hits, one, one), axis=(0, 1), heads=(2, 3), alternatives=Tally(offsets, one, one * 0)
    )
    assert report.chosen[..., 0].tolist() == [planted, planted]
    assert report.chosen_baseline is not None and (report.chosen_baseline == 3).all()
    by_hand = np.mean([hits[seed, :, head // 3, head % 3, 0] for seed, head in enumerate(planted)])
    np.testing.assert_allclose(report.best.value[0], by_hand)
    np.testing.assert_allclose(report.best.baseline, offsets[0, :, 0, 3].mean(0))
    np.testing.assert_allclose(report.difference.value[0], by_hand - offsets[0, :, 0, 3, 0].mean())
    assert report.difference.low[0] > 0.1 and report.difference.high[1] < 0


def test_a_sentence_is_answered_by_the_head_that_the_other_half_chose():
    first, second = np.array_split(np.random.default_rng(0).permutation(6), 2)
    hits = np.zeros((6, 2))
    hits[first, 0] = hits[second, 1] = 1  # each head is right on one half only
    report = select_and_report(Tally(hits, np.array(1), hits), heads=1)
    assert report.best.value == 0 and report.chosen.tolist() == [0, 1]


def test_axes_to_choose_from_are_not_the_sentences():
    with pytest.raises(ValueError, match="select_and_report: axis and heads must be different"):
        select_and_report(Tally(np.ones((3, 2)), np.array(1), np.array(1)), axis=0, heads=0)


@pytest.mark.parametrize("level", [95, 0, 1.0, 1.5, float("nan")])
def test_a_level_is_a_share(level):
    tally = Tally(np.ones((4, 3)), np.ones((4, 3)), np.zeros((4, 3)))
    for do in (estimate, difference, partial(select_and_report, heads=1)):
        with pytest.raises(ValueError, match=r"statistics\..*: level must be in \(0, 1\), such as 0.95, got"):
            do(tally, level=level)


def test_parts_of_a_tally_belong_together():
    with pytest.raises(ValueError, match=r"must broadcast to one shape, got \(4, 3\), \(4, 2\), \(4, 3\)"):
        estimate(Tally(np.ones((4, 3)), np.ones((4, 2)), np.zeros((4, 3))))


def test_a_head_that_was_not_measured_is_not_chosen():
    hits = np.array([[1.0, 0, np.nan], [0, 1, np.nan], [0, 1, np.nan]] * 2)
    whole, found = (select_and_report(Tally(a, np.array(1), np.array(0.5)), heads=1) for a in (hits[:, :2], hits))
    np.testing.assert_array_equal(found.chosen, whole.chosen)
    np.testing.assert_array_equal(found.best.value, whole.best.value)
