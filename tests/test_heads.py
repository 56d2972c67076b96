"""What the report says of heads, against models whose heads do what is known, and gold counted by hand."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.data import corpora, vocabulary
from experiments.errors import DataError
from experiments.heads import gold, held_out, of_pairs, table
from experiments.tables import Windows
from mhajax import language_model, translator
from mhajax.report import importance, numbers, patterns, render, results, roles, text
from mhajax.statistics import Measure

pytestmark = pytest.mark.usefixtures("quick_compiles")
SENTENCES, SEEDS = 24, 3
SUBJECT = next(relation for relation in gold.RELATIONS if relation.name == "verb → its subject")


@pytest.fixture(scope="module")
def corpus():
    return corpora.parallel(corpora.Grammar(train=20, validation=1, test=30, generalisation=0))


@pytest.fixture(scope="module")
def words(corpus):
    return vocabulary.train([text for pair in corpus.tests["test"] for text in pair], vocabulary.Config("words"))


@pytest.fixture(scope="module")
def shape(words):
    return translator.Config(
        d_model=8, num_heads=2, d_ff=8, encoder_layers=1, decoder_layers=1, vocab_size=words.size
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject(corpus, words, shape):
    """A translator of two heads, on the grammar's sentences; all of them are one batch."""
    return of_pairs.make_subject(shape, corpus.tests["test"][:SENTENCES], words, 50, corpus.gold["test"])


@pytest.fixture(scope="module")
def trained(shape):
    return [translator.init_params(jax.random.key(seed), shape) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def found(subject, trained):
    return results.examine(subject, trained, trained[::-1])


@pytest.fixture(scope="module")
def worth(subject, trained):
    return importance.make_measure(subject)(trained[0])


def planted(subject, links):
    """The subject with other heads: the first of each kind looks where `links` says, the second at the first key."""
    (batch,) = subject.batches
    seen = {}
    for kind, visible in subject.visible(batch).items():
        weights = np.zeros((1, len(visible), 2, *visible.shape[1:]), np.float32)
        weights[..., 0] = 1
        right = links(kind, batch)
        asked = right.any(-1)
        weights[0, :, 0][asked] = np.eye(right.shape[-1])[right.argmax(-1)][asked]
        seen[kind] = {"weights": weights, "heads": np.ones((*weights.shape[:-1], 4), np.float32)}
    return subject._replace(capture=lambda params, batch, names: params), seen


@pytest.mark.slow
def test_heads_that_follow_gold_are_found(subject):
    right = subject.gold(subject.batches[0])
    chosen = {"encoder": SUBJECT.key, "decoder": "decoder: verb read → its subject", "cross": gold.ALIGNED.key}
    fake, seen = planted(subject, lambda kind, batch: right[chosen[kind]])
    looks = patterns.make_measure(fake)(seen)
    for key in chosen.values():
        tally = looks.relations[key, ""]
        assert tally.total.shape == (SENTENCES, 1, 2) and tally.count.sum() > 0
        np.testing.assert_array_equal(tally.total[..., 0], tally.count[..., 0])
    aligned = looks.relations[gold.ALIGNED.key, ""]
    assert np.all(aligned.total[..., 1] < aligned.count[..., 1])
    # A word that translates two is linked to one of them, so a perfect head does not quite reach 1.
    written, read = (looks.agreement[reading, "diagonal"] for reading in patterns.READINGS)
    rate = lambda tally: tally.total.sum(0) / tally.count.sum(0)  # noqa: E731
    assert 0.9 < rate(written)[0, 0] <= 1 and rate(read)[0, 0] < 0.5 and rate(written)[0, 1] < 0.5

    rows = results.examine_briefly(fake, seen)
    assert rows["encoder"][SUBJECT.name].value.tolist()[0][0] == 1
    printed = io.StringIO()
    table.show(Console(file=printed, width=120), fake.kinds, rows, "word")
    assert "100" in printed.getvalue() and "baseline" in printed.getvalue()
    assert "distance: words between" in printed.getvalue()


def test_the_positional_baseline_is_counted_as_by_hand(subject, corpus):
    pairs = corpus.gold["test"][:SENTENCES]
    by_hand = {
        offset: sum(
            subject == verb + offset
            for pair in pairs
            for verb, subject in enumerate(pair.source.subjects)
            if subject >= 0
        )
        for offset in gold.OFFSETS
    }
    asked = sum(subject >= 0 for pair in pairs for subject in pair.source.subjects)
    rules = patterns.measure_baselines(subject)[SUBJECT.key, ""]
    assert {rule: int(tally.total.sum()) for rule, tally in rules.items()} == {
        f"offset {offset:+d}": count for offset, count in by_hand.items()
    }
    assert all(tally.count.sum() == asked for tally in rules.values())


def test_nouns_are_guessed_and_distances_add_up(subject, corpus):
    far = next(relation for relation in gold.RELATIONS if relation.kind == "encoder" and relation.parts)
    rules = patterns.measure_baselines(subject)
    nearest = 0
    for pair in corpus.gold["test"][:SENTENCES]:
        side = pair.source
        for place, noun in enumerate(side.antecedents):
            if noun >= 0 and side.tags[place] == "PRON":
                nearest += noun == max(i for i in range(place) if side.tags[i] == "NOUN")
    assert rules[far.key, ""]["nearest noun before"].total.sum() == nearest
    whole = rules[far.key, ""]["offset -1"].count
    np.testing.assert_array_equal(sum(rules[far.key, part]["offset -1"].count for part in far.parts), whole)


@pytest.mark.slow
def test_the_ablation_effect_is_the_loss_with_the_gate_shut(subject, trained, worth):
    (batch,) = subject.batches
    predicted = subject.predicted(batch)
    losses = jax.jit(lambda gates: subject.losses(trained[0], batch, gates))
    full = losses(subject.gates)
    shut = {**subject.gates, "cross": subject.gates["cross"].at[0, 1].set(0)}
    order = subject.index(batch)
    real = order >= 0
    assert list(worth.ablation) == list(subject.categories)
    for c, category in enumerate(subject.categories):
        by_hand = ((losses(shut) - full) * predicted[..., c]).sum(-1)[real]
        tally = worth.ablation[category]["cross"]
        np.testing.assert_allclose(tally.total[:, 0, 1], by_hand, atol=2e-4)
        np.testing.assert_array_equal(np.squeeze(tally.count), predicted[..., c].sum(1)[real])


@pytest.mark.slow
def test_pruning_goes_from_all_heads_to_none(subject, trained, worth):
    (batch,) = subject.batches
    heads = subject.num_heads
    sums = lambda gates: (subject.losses(trained[0], batch, gates) * subject.predicted(batch)[..., 0]).sum(-1)  # noqa: E731
    real = subject.index(batch) >= 0
    for tally in worth.pruned.values():
        assert tally.total.shape == (heads + 1, SENTENCES)
        np.testing.assert_allclose(tally.total[0], sums(subject.gates)[real], rtol=1e-4)
        none = jax.tree.map(jnp.zeros_like, subject.gates)
        np.testing.assert_allclose(tally.total[-1], sums(none)[real], rtol=1e-4)
    assert sorted(worth.order) == sorted(
        (kind.name, layer, head) for kind in subject.kinds for layer in range(kind.layers) for head in range(kind.heads)
    )


@pytest.mark.slow
def test_results_have_intervals_and_baselines(found, subject):
    for of_kind in found.heads.values():
        for one in of_kind.values():
            assert one.value.shape == (SEEDS, 1, 2)
            there = ~np.isnan(one.value)
            assert np.all(one.low[there] <= one.value[there]) and np.all(one.value[there] <= one.high[there])
            assert not np.isnan(one.baseline[there]).any()
    assert {answer.kind for answer in found.relations} == {"encoder", "decoder", "cross"}
    for answer in found.relations:
        assert answer.asked > 0 and answer.baseline and 0 <= answer.seeds <= SEEDS
    assert set(found.stability) == {"encoder", "decoder", "cross"}
    assert found.similarity["cross"].shape == (SEEDS, SEEDS, 2, 2)
    assert set(found.alignment) == set(patterns.READINGS)


@pytest.mark.slow
def test_a_head_has_the_role_that_it_does_most(found, subject):
    sure = lambda value: np.full((SEEDS, 1, 2), value)  # noqa: E731
    previous = Measure(value=sure(0.9), low=sure(0.8), high=sure(0.95), baseline=sure(0.1))
    changed = found._replace(heads={**found.heads, "encoder": {**found.heads["encoder"], "previous token": previous}})
    assert roles.roles(subject, changed, 0)["encoder", 0, 1].word == "previous"
    assert "90% [80%, 95%], baseline 10%" in roles.roles(subject, changed, 0)["encoder", 0, 1].note
    weak = previous._replace(low=sure(0.2))
    changed = found._replace(heads={**found.heads, "encoder": {"previous token": weak}}, relations=[])
    assert roles.roles(subject, changed, 0)["encoder", 0, 1] == roles.Role("", "")


@pytest.mark.slow
def test_the_page_and_its_numbers(found, subject, trained):
    page, drawings = render.render(subject, found, trained, "<run>", 2)
    text = page.html()
    for heading in ("Which heads follow which relation", "How far heads reach", "aligns words", "Near and far",
                    "Ablation effect", "can be removed", "other seeds", "Do heads differ", "every head"):  # fmt: skip
        assert heading in text
    assert f"{SENTENCES} test sentences, neither trained on" in text
    assert "&lt;run&gt;" in text and "<run>" not in text and "http://" not in text
    assert {"relations", "pruning", "lost_cross", "matched_encoder"} <= set(drawings)
    written = json.loads(json.dumps(numbers.as_json(subject, found, SEEDS), allow_nan=False))
    assert len(written["heads"]) == SEEDS * 6 and written["sentences"] == SENTENCES
    answer = next(row for row in written["relations"] if row["relation"] == SUBJECT.name)
    assert set(answer["best_head"]) == {"value", "low", "high", "baseline"}


@pytest.mark.slow
def test_a_language_model_of_one_seed_has_a_report_too():
    sentences = "the cat sat on the mat and the dog sat on the log. " * 8
    words = vocabulary.train([sentences], vocabulary.Config(kind="characters"))
    shape = language_model.Config(d_model=8, num_heads=2, d_ff=8, num_layers=2, vocab_size=words.size)
    windows = held_out.windows(sentences, words, Windows(size=4, length=12), 7)
    subject = text.make_subject(language_model, shape, windows)
    assert [subject.rows(batch) for batch in subject.batches] == [[0, 1, 2, 3], [0, 1, 2]]
    params = [language_model.init_params(jax.random.key(0), shape)]
    found = results.examine(subject, params, params)
    assert found.relations == [] and found.stability == {} and found.alignment == {}
    assert found.heads["self"]["after the same word"].value.shape == (1, 2, 2)
    page, drawings = render.render(subject, found, params, "text", 2)
    assert "whose loss chose the best parameters" in page.html()
    assert "follow which relation" not in page.html() and "lost_self" in drawings
    assert json.dumps(numbers.as_json(subject, found, 1), allow_nan=False)


def test_too_short_a_text_is_refused():
    with pytest.raises(DataError, match=r"more than 37 tokens, got 37; .*batches\.length"):
        held_out.check_room(37, 12)
    held_out.check_room(38, 12)
