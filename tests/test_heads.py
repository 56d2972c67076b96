"""Measures of heads against closed forms and worked examples."""

import numpy as np
import pytest

from experiments import heads_table
from experiments.data import corpora, grammar, vocabulary
from mhajax import translator
from mhajax.heads import patterns, statistics


def test_distance_of_uniform_attention_has_a_closed_form():
    t = 11
    distance = patterns.mean_distance(np.full((t, t), 1 / t), np.arange(t), np.arange(t))
    np.testing.assert_allclose(np.mean(distance), (t * t - 1) / (3 * t), rtol=1e-6)


def test_distance_of_a_head_that_looks_back_by_two():
    weights = np.eye(7)[np.maximum(np.arange(7) - 2, 0)]
    np.testing.assert_allclose(patterns.mean_distance(weights, np.arange(7), np.arange(7)), [0, 1, 2, 2, 2, 2, 2])


def test_entropy_is_0_for_one_key_and_1_for_all_visible_keys_alike():
    causal = np.tril(np.ones((5, 5)))
    np.testing.assert_allclose(
        patterns.entropy(causal / causal.sum(-1, keepdims=True), np.arange(5) + 1), [0, 1, 1, 1, 1], rtol=1e-6
    )
    np.testing.assert_allclose(patterns.entropy(np.eye(5), np.full(5, 5)), np.zeros(5), atol=1e-7)
    assert not np.isnan(patterns.entropy(np.zeros((2, 3)), np.zeros(2))).any()


def test_hits_look_at_the_strongest_key():
    weights = np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    gold = np.array([[False, True, True], [False, False, True]])
    assert patterns.hits(weights, gold).tolist() == [True, False]
    assert patterns.hits(np.stack([weights, weights[::-1]]), gold).tolist() == [[True, False], [False, False]]


def test_ratio_of_equal_sentences_has_no_spread():
    estimate = statistics.ratio(np.full((9, 2), 3.0), np.full((9, 1), 4.0))
    assert estimate.value.tolist() == estimate.low.tolist() == estimate.high.tolist() == [0.75, 0.75]


def test_ratio_without_questions_is_not_a_number():
    assert np.isnan(statistics.ratio(np.zeros((4, 1)), np.zeros((4, 1))).value).all()


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        counts = rng.integers(1, 5, size=80)
        estimate = statistics.ratio(rng.binomial(counts, 0.3)[:, None], counts[:, None], resamples=300, seed=trial)
        covered += bool(estimate.low[0] <= 0.3 <= estimate.high[0])
    assert 0.89 <= covered / 200 <= 0.99  # 95 % but for the noise of 200 trials and of small samples


@pytest.fixture(scope="module")
def sentences():
    corpus = corpora.parallel(corpora.Grammar(train=20, validation=1, test=30, generalisation=0))
    pairs = corpus.tests["test"]
    words = vocabulary.train([text for pair in pairs for text in pair], vocabulary.Config("words"))
    ids = [(words.encode(source), words.encode(target)) for source, target in pairs]
    return corpus.gold["test"], ids


def _heads(gold, link):
    """A fake model whose only head of each attention puts all its weight where `link` says."""

    def capture(batch):
        shape = (1, len(batch.index), 1)
        source, target = batch.source.shape[1], batch.target.shape[1] - 1
        sizes = {"encoder": (source, source), "decoder": (target, target), "cross": (target, source)}
        weights = {name: np.zeros((*shape, *size)) for name, size in sizes.items()}
        for name, array in weights.items():
            array[..., 0] = 1  # looks at the first key, where gold says nothing
            for row, number in enumerate(batch.index):
                for query, key in link(name, gold[number]) if number >= 0 else ():
                    array[0, row, 0, query] = np.eye(array.shape[-1])[key]
        return translator.Seen(*({"weights": weights[name]} for name in ("encoder", "decoder", "cross")))

    return capture


def test_heads_that_follow_gold_are_found(sentences):
    gold, ids = sentences

    def link(attention, pair: grammar.Pair):
        question = next(q for q in heads_table.QUESTIONS if q.attention == attention)
        return question.gold(pair)

    rows, baseline = heads_table.measure(_heads(gold, link), ids, gold, (32, 64))
    found = {row.attention: row.measures for row in rows}
    assert found["encoder"]["verb → subject"].value == 1
    assert found["decoder"]["verb → subject"].value == 1
    assert found["cross"]["aligned, written"].value > 0.9  # a word aligned to two can look at one of them only
    assert found["cross"]["aligned, read"].value < 0.5
    assert all(0 < share < 1 for share in baseline.values())


def test_the_baseline_is_the_best_fixed_offset(sentences):
    gold, ids = sentences
    back = lambda attention, pair: [(i, i - 1) for i in range(1, len(pair.source.words))]  # noqa: E731
    rows, baseline = heads_table.measure(_heads(gold, back), ids, gold, (32, 64))
    by_hand = [
        sum(
            subject == verb + offset
            for pair in gold
            for verb, subject in enumerate(pair.source.subjects)
            if subject >= 0
        )
        for offset in range(-8, 9)
    ]
    asked = sum(subject >= 0 for pair in gold for subject in pair.source.subjects)
    assert baseline["encoder", "verb → subject"] == pytest.approx(max(by_hand) / asked)
    encoder = next(row for row in rows if row.attention == "encoder")
    assert encoder.measures["verb → subject"].value == pytest.approx(by_hand[7] / asked)


def test_without_gold_only_distance_and_entropy_are_measured(sentences):
    gold, ids = sentences
    rows, baseline = heads_table.measure(_heads(gold, lambda *_: []), ids, None, (32, 64))
    assert baseline == {} and all(set(row.measures) == {"distance", "entropy"} for row in rows)
