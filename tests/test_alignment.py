"""From attention to links between words: worked examples and loops."""

from functools import partial

import jax
import numpy as np
import pytest

from mhajax import attention, statistics
from mhajax.heads import alignment
from tests.reference import numbers, random_params

L, B, N, T, S = 3, 2, 6, 5, 7


def softmax(x):
    weights = np.exp(x)
    return weights / weights.sum(-1, keepdims=True)


def pairs(shape, *links):
    found = np.zeros(shape, bool)
    for target, source in links:
        found[target, source] = True
    return found


def test_rollout_is_the_product_of_the_layers():
    weights = softmax(numbers(0, L, B, N, T, T))
    found = jax.jit(alignment.rollout)(weights)
    mixed = 0.5 * weights.mean(2) + 0.5 * np.eye(T)
    expected = [mixed[0], mixed[1] @ mixed[0], mixed[2] @ mixed[1] @ mixed[0]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(np.sum(found, -1), np.ones((L, B, T)), rtol=1e-5)


def test_rollout_of_a_head_that_looks_back_is_a_binomial():
    """Back by one or not at all, four layers: place 4 holds 1, 4, 6, 4, 1 of 16."""
    weights = np.broadcast_to(np.eye(6)[np.maximum(np.arange(6) - 1, 0)], (4, 1, 6, 6))
    np.testing.assert_allclose(alignment.rollout(weights)[-1, 4], np.array([1, 4, 6, 4, 1, 0]) / 16, rtol=1e-6)


@pytest.mark.slow
def test_padding_stays_out_of_a_rollout():
    weights = softmax(numbers(1, L, N, T, T))
    padded = alignment.rollout(np.pad(weights, ((0, 0), (0, 0), (0, 2), (0, 2))))
    np.testing.assert_allclose(padded[:, :T, :T], alignment.rollout(weights), rtol=1e-6)
    np.testing.assert_array_equal(padded[:, T:], np.broadcast_to(np.eye(T + 2)[T:], (L, 2, T + 2)))
    np.testing.assert_allclose(alignment.rollout(weights, residual=0.0)[0], weights[0].mean(0), rtol=1e-6)


@pytest.fixture(scope="module")
def attended():
    config = attention.Config(d_model=11, num_heads=N, num_kv_heads=3, head_dim=2, value_dim=5, use_bias=True)
    params = random_params(attention.init_params, config)
    run = jax.jit(partial(attention.apply_captured, config=config, capture=("weights", "values", "contributions")))
    return params, *run(params, numbers(0, B, T, 11), memory=numbers(1, B, S, 11))


def test_norm_weighted_attention(attended):
    params, _, seen = attended
    weights, values = np.asarray(seen["weights"]), np.asarray(seen["values"])
    found = alignment.norm_weighted(weights, values, params.w_o)
    together = jax.jit(alignment.norm_weighted_sum)(weights, values, params.w_o)
    written = np.zeros((B, N, T, S, 11))
    for b, n, t, s in np.ndindex(B, N, T, S):
        written[b, n, t, s] = weights[b, n, t, s] * (values[b, n // 2, s] @ params.w_o[n])
    np.testing.assert_allclose(found, np.linalg.norm(written, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(together, np.linalg.norm(written.sum(1), axis=-1), rtol=1e-4)
    np.testing.assert_allclose(written.sum(3), seen["contributions"], rtol=1e-4, atol=1e-5)  # it is what heads add


def test_norm_weighted_attention_of_a_stack(attended):
    params, _, seen = attended
    weights, values = np.asarray(seen["weights"]), np.asarray(seen["values"])
    stack = alignment.norm_weighted(np.stack([weights] * 2), np.stack([values, 2 * values]), np.stack([params.w_o] * 2)[:, None])  # fmt: skip # noqa: E501
    np.testing.assert_allclose(stack[1], 2 * stack[0], rtol=1e-5)
    np.testing.assert_allclose(stack[0], alignment.norm_weighted(weights, values, params.w_o), rtol=1e-5)


def test_a_key_without_a_value_weighs_nothing():
    values = np.ones((1, 2, 3), np.float32)
    values[0, 0] = 0
    found = alignment.norm_weighted(np.full((1, 1, 2), 0.5, np.float32), values, np.eye(3, dtype=np.float32)[None])
    np.testing.assert_allclose(found[0, 0], [0, 0.5 * 3**0.5], rtol=1e-6)


def test_read_at_input_and_at_output():
    """Row t reads word t - 1 and writes word t; the last row writes the end."""
    weights = np.eye(4, dtype=np.float32)[[3, 0, 1, 2]]  # what is read is aligned with the key of its number
    seen = np.ones((3, 4), bool)
    np.testing.assert_array_equal(alignment.links(alignment.at_input(weights), seen), np.eye(4, dtype=bool)[:3])
    np.testing.assert_array_equal(alignment.links(alignment.at_output(weights), seen), np.eye(4, dtype=bool)[[3, 0, 1]])


def test_attention_of_split_words():
    """Queries: a word of one token, one of two; keys: the beginning, a word of two, one of one."""
    weights = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.2, 0.2], [0.3, 0.3, 0.0, 0.4]])
    words = alignment.to_words(weights, [0, 1, 1], [-1, 0, 0, 1], num_queries=3, num_keys=2)
    np.testing.assert_allclose(words, [[0.5, 0.4], [0.3, 0.3], [0, 0]], rtol=1e-6)
    by_sentence = alignment.to_words(
        np.stack([weights, weights])[:, None],
        np.array([[0, 1, 1], [0, 1, 2]])[:, None],
        np.array([[-1, 0, 0, 1], [0, 0, 1, 1]])[:, None],
        num_queries=3,
        num_keys=2,
    )
    np.testing.assert_allclose(by_sentence[0, 0], words, rtol=1e-6)
    np.testing.assert_allclose(by_sentence[1, 0], [[0.3, 0.7], [0.6, 0.4], [0.6, 0.4]], rtol=1e-6)


def test_links():
    weights = np.array([[0.1, 0.6, 0.3], [0.45, 0.45, 0.1], [0.2, 0.2, 0.6]])
    visible = np.array([[True, True, True], [True, True, True], [False] * 3])
    np.testing.assert_array_equal(alignment.links(weights, visible), pairs((3, 3), (0, 1), (1, 0)))
    np.testing.assert_array_equal(
        alignment.links_above(weights, visible, 0.25), pairs((3, 3), (0, 1), (0, 2), (1, 0), (1, 1))
    )
    assert not alignment.links(weights, visible & [True, False, True])[0, 1]


def test_the_error_rate_by_hand():
    """Four target words; A has 4 links, S 3, P 5 with the sure ones.

    |A ∩ S| = 2 and |A ∩ P| = 3, so the rate is 1 - (2 + 3) / (4 + 3) = 2/7.
    """
    sure = pairs((4, 5), (0, 0), (1, 2), (2, 1))
    possible = pairs((4, 5), (2, 4), (3, 3))
    found = pairs((4, 5), (0, 0), (1, 2), (2, 4), (3, 0))
    everywhere = np.ones((4, 5), bool)
    tally = alignment.error_rate(found, sure, possible, visible=everywhere)
    assert (int(tally.total), int(tally.count)) == (2, 7)
    # The diagonal of 4 by 5 words is (0, 0), (1, 1), (2, 3), (3, 4): 1 - (1 + 1) / 7.
    np.testing.assert_array_equal(alignment.diagonal(everywhere), pairs((4, 5), (0, 0), (1, 1), (2, 3), (3, 4)))
    assert float(tally.baseline) == pytest.approx(5)
    all_wrong = alignment.error_rate(~(sure | possible), sure, possible, visible=everywhere)
    assert all_wrong.total == all_wrong.count
    assert alignment.error_rate(sure, sure, possible, visible=everywhere).total == 0
    assert alignment.error_rate(sure | possible, sure, possible, visible=everywhere).total == 0
    without = alignment.error_rate(found, sure, visible=everywhere)  # possible links are wrong then
    assert (int(without.total), int(without.count)) == (3, 7)


def test_the_rate_of_a_corpus_is_a_ratio_of_sums():
    random = np.random.default_rng(0)
    lengths = [(5, 7), (3, 2), (4, 6), (1, 1), (5, 3)]
    visible = np.stack([np.outer(np.arange(T) < t, np.arange(S) < s) for t, s in lengths])[:, None]
    weights = random.random((len(lengths), N, T, S)).astype(np.float32)
    sure = random.random((len(lengths), 1, T, S)) < 0.3
    possible = random.random((len(lengths), 1, T, S)) < 0.3
    other = alignment.shuffled(weights, visible, axis=0)
    tally = jax.jit(lambda *a: alignment.error_rate(a[0], a[1], a[2], visible=a[3], baseline=a[4]))(
        alignment.links(weights, visible), sure, possible, visible, other
    )
    for n in range(N):
        hits = links = other_hits = 0
        for b, (t, s) in enumerate(lengths):
            p = sure[b, 0, :t, :s] | possible[b, 0, :t, :s]
            links += t + sure[b, 0, :t, :s].sum()
            for i in range(t):
                j = weights[b, n, i, :s].argmax()
                hits += int(sure[b, 0, i, j]) + int(p[i, j])
                j = weights[b - 1, n, i, :s].argmax()
                other_hits += int(sure[b, 0, i, j]) + int(p[i, j])
        sums = [np.asarray(np.broadcast_to(a, (len(lengths), N)))[:, n].sum() for a in tally]
        assert sums[0] / sums[1] == pytest.approx(1 - hits / links)
        assert sums[2] / sums[1] == pytest.approx(1 - other_hits / links)
    measure = statistics.estimate(statistics.Tally(*map(np.asarray, tally)))
    np.testing.assert_allclose(measure.value, np.sum(tally.total, 0) / np.sum(tally.count, 0), rtol=1e-6)
    assert (measure.low <= measure.value).all() and (measure.value <= measure.high).all()


@pytest.mark.slow
def test_padding_changes_nothing():
    weights = softmax(numbers(2, B, N, T, S))
    sure, visible = np.random.default_rng(1).random((B, 1, T, S)) < 0.3, np.ones((B, 1, T, S), bool)
    wide = ((0, 0), (0, 0), (0, 2), (0, 3))
    more, seen = np.pad(weights, wide, constant_values=0.9), np.pad(visible, wide)
    one = alignment.error_rate(alignment.links(weights, visible), sure, visible=visible)
    gold = np.pad(sure, wide, constant_values=True)
    other = alignment.error_rate(alignment.links(more, seen), gold, visible=seen)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b)
    np.testing.assert_array_equal(alignment.links_above(more, seen, 0.2)[..., :T, :S], weights > 0.2)
    np.testing.assert_array_equal(alignment.diagonal(seen)[..., :T, :S], alignment.diagonal(visible))


def test_the_diagonal_after_padding_on_the_left_and_of_short_sources():
    visible = np.zeros((5, 6), bool)
    visible[1:, 3:] = True  # 4 targets, 3 sources
    np.testing.assert_array_equal(alignment.diagonal(visible), pairs((5, 6), (1, 3), (2, 4), (3, 4), (4, 5)))
    assert not np.any(alignment.diagonal(np.zeros((5, 6), bool)))


ERRORS = {
    "integers": (partial(alignment.rollout, np.ones((2, 3, 4, 4), int)), ValueError, ("alignment.rollout", "int")),
    "cross attention": (
        partial(alignment.rollout, np.ones((2, 3, 4, 5))),
        ValueError,
        ("alignment.rollout", "to itself", "(2, 3, 4, 5)"),
    ),
    "values of another memory": (
        partial(alignment.norm_weighted, np.ones((2, 3, 5)), np.ones((2, 4, 3)), np.ones((2, 3, 7))),
        ValueError,
        ("alignment.norm_weighted", "(2, 3, 5)", "(2, 4, 3)"),
    ),
    "words of another text": (
        lambda: alignment.to_words(np.ones((2, 3)), [0, 1], [0, 1], num_queries=2, num_keys=2),
        ValueError,
        ("key_words", "3 tokens", "(2,)"),
    ),
    "weights as links": (
        lambda: alignment.error_rate(np.ones((2, 3)), np.ones((2, 3), bool), visible=np.ones((2, 3), bool)),
        TypeError,
        ("alignment.error_rate", "predicted", "float"),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, kind, parts = ERRORS[name]
    with pytest.raises(kind) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []
