"""What the report says of heads, against models whose heads do what is known, and gold counted by hand."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.data import corpora, vocabulary
from experiments.heads import costs, findings, gold, measure, numbers, of_pairs, of_text, report, roles, table
from experiments.tables import Windows
from mhajax import language_model, translator
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
def model(corpus, words, shape):
    """A translator of two heads, on the grammar's sentences; all of them are one batch."""
    return of_pairs.of_translator(shape, corpus.tests["test"][:SENTENCES], words, 50, corpus.gold["test"])


@pytest.fixture(scope="module")
def trained(shape):
    return [translator.init_params(jax.random.key(seed), shape) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def found(model, trained):
    return findings.examine(model, trained, trained[::-1], Console(quiet=True))


@pytest.fixture(scope="module")
def worth(model, trained):
    return costs.costs(model)(trained[0])


def planted(model, links):
    """The model with other heads: the first of each kind looks where `links` says, the second at the first key."""
    (batch,) = model.batches
    seen = {}
    for kind, visible in model.visible(batch).items():
        weights = np.zeros((1, len(visible), 2, *visible.shape[1:]), np.float32)
        weights[..., 0] = 1
        right = links(kind, batch)
        asked = right.any(-1)
        weights[0, :, 0][asked] = np.eye(right.shape[-1])[right.argmax(-1)][asked]
        seen[kind] = {"weights": weights, "heads": np.ones((*weights.shape[:-1], 4), np.float32)}
    return model._replace(capture=lambda params, batch, names: params), seen


@pytest.mark.slow
def test_heads_that_follow_gold_are_found(model):
    right = model.right(model.batches[0])
    chosen = {"encoder": SUBJECT.key, "decoder": "decoder: verb read → its subject", "cross": gold.ALIGNED.key}
    fake, seen = planted(model, lambda kind, batch: right[chosen[kind]])
    looks = measure.looks(fake)(seen)
    for key in chosen.values():
        tally = looks.relations[key, ""]
        assert tally.total.shape == (SENTENCES, 1, 2) and tally.count.sum() > 0
        np.testing.assert_array_equal(tally.total[..., 0], tally.count[..., 0])
    aligned = looks.relations[gold.ALIGNED.key, ""]
    assert np.all(aligned.total[..., 1] < aligned.count[..., 1])
    # A word that translates two is linked to one of them, so a perfect head does not quite reach 1.
    written, read = (looks.agreement[reading, "diagonal"] for reading in measure.READINGS)
    rate = lambda tally: tally.total.sum(0) / tally.count.sum(0)  # noqa: E731
    assert 0.9 < rate(written)[0, 0] <= 1 and rate(read)[0, 0] < 0.5 and rate(written)[0, 1] < 0.5

    rows = findings.of_one(fake, seen)
    assert rows["encoder"][SUBJECT.name].value.tolist()[0][0] == 1
    printed = io.StringIO()
    table.show(Console(file=printed, width=120), fake.kinds, rows, "word")
    assert "100" in printed.getvalue() and "best rule" in printed.getvalue()
    assert "distance: words between" in printed.getvalue()


def test_the_best_rule_is_counted_as_by_hand(model, corpus):
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
    rules = measure.guesses(model)[SUBJECT.key, ""]
    assert {rule: int(tally.total.sum()) for rule, tally in rules.items()} == {
        f"offset {offset:+d}": count for offset, count in by_hand.items()
    }
    assert all(tally.count.sum() == asked for tally in rules.values())


def test_nouns_are_guessed_and_distances_add_up(model, corpus):
    far = next(relation for relation in gold.RELATIONS if relation.kind == "encoder" and relation.parts)
    rules = measure.guesses(model)
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
def test_what_is_lost_is_the_loss_with_the_gate_shut(model, trained, worth):
    (batch,) = model.batches
    predicted = model.predicted(batch)
    losses = jax.jit(lambda gates: model.losses(trained[0], batch, gates))
    full = losses(model.gates)
    shut = {**model.gates, "cross": model.gates["cross"].at[0, 1].set(0)}
    order = model.index(batch)
    real = order >= 0
    assert list(worth.lost) == list(model.categories)
    for c, category in enumerate(model.categories):
        by_hand = ((losses(shut) - full) * predicted[..., c]).sum(-1)[real]
        tally = worth.lost[category]["cross"]
        np.testing.assert_allclose(tally.total[:, 0, 1], by_hand, atol=2e-4)
        np.testing.assert_array_equal(np.squeeze(tally.count), predicted[..., c].sum(1)[real])


@pytest.mark.slow
def test_pruning_goes_from_all_heads_to_none(model, trained, worth):
    (batch,) = model.batches
    heads = sum(kind.layers * kind.heads for kind in model.kinds)
    sums = lambda gates: (model.losses(trained[0], batch, gates) * model.predicted(batch)[..., 0]).sum(-1)  # noqa: E731
    real = model.index(batch) >= 0
    for tally in worth.pruned.values():
        assert tally.total.shape == (heads + 1, SENTENCES)
        np.testing.assert_allclose(tally.total[0], sums(model.gates)[real], rtol=1e-4)
        none = jax.tree.map(jnp.zeros_like, model.gates)
        np.testing.assert_allclose(tally.total[-1], sums(none)[real], rtol=1e-4)
    assert sorted(worth.order) == sorted(
        (kind.name, layer, head) for kind in model.kinds for layer in range(kind.layers) for head in range(kind.heads)
    )


@pytest.mark.slow
def test_findings_have_intervals_and_baselines(found, model):
    for of_kind in found.heads.values():
        for one in of_kind.values():
            assert one.value.shape == (SEEDS, 1, 2)
            there = ~np.isnan(one.value)
            assert np.all(one.low[there] <= one.value[there]) and np.all(one.value[there] <= one.high[there])
            assert not np.isnan(one.baseline[there]).any()
    assert {answer.kind for answer in found.relations} == {"encoder", "decoder", "cross"}
    for answer in found.relations:
        assert answer.asked > 0 and answer.rule and 0 <= answer.seeds <= SEEDS
    assert set(found.stability) == {"encoder", "decoder", "cross"}
    assert found.similarity["cross"].shape == (SEEDS, SEEDS, 2, 2)
    assert set(found.alignment) == set(measure.READINGS)


@pytest.mark.slow
def test_a_head_has_the_role_that_it_does_most(found, model):
    sure = lambda value: np.full((SEEDS, 1, 2), value)  # noqa: E731
    previous = Measure(value=sure(0.9), low=sure(0.8), high=sure(0.95), baseline=sure(0.1))
    changed = found._replace(heads={**found.heads, "encoder": {**found.heads["encoder"], "previous token": previous}})
    assert roles.roles(model, changed, 0)["encoder", 0, 1].word == "previous"
    assert "90% [80%, 95%], baseline 10%" in roles.roles(model, changed, 0)["encoder", 0, 1].note
    weak = previous._replace(low=sure(0.2))
    changed = found._replace(heads={**found.heads, "encoder": {"previous token": weak}}, relations=[])
    assert roles.roles(model, changed, 0)["encoder", 0, 1] == roles.Role("", "")


@pytest.mark.slow
def test_the_page_and_its_numbers(found, model, trained):
    page, drawings = report.make(model, found, trained, "<run>", 2)
    text = page.html()
    for heading in ("Which heads follow the grammar", "How far heads reach", "aligns words", "Near and far",
                    "What is lost", "can be removed", "other seeds", "Do heads differ", "See every head"):  # fmt: skip
        assert heading in text
    assert f"{SENTENCES} test sentences, neither trained on" in text
    assert "&lt;run&gt;" in text and "<run>" not in text and "http://" not in text
    assert {"relations", "pruning", "lost_cross", "matched_encoder"} <= set(drawings)
    written = json.loads(json.dumps(numbers.as_json(model, found, SEEDS), allow_nan=False))
    assert len(written["heads"]) == SEEDS * 6 and written["sentences"] == SENTENCES
    answer = next(row for row in written["relations"] if row["relation"] == SUBJECT.name)
    assert set(answer["best_head"]) == {"value", "low", "high", "baseline"}


@pytest.mark.slow
def test_a_language_model_of_one_seed_has_a_report_too():
    text = "the cat sat on the mat and the dog sat on the log. " * 8
    words = vocabulary.train([text], vocabulary.Config(kind="characters"))
    shape = language_model.Config(d_model=8, num_heads=2, d_ff=8, num_layers=2, vocab_size=words.size)
    model = of_text.of_text(language_model, shape, of_text.held_out(text, words, Windows(size=4, length=12), 7))
    assert [model.rows(batch) for batch in model.batches] == [[0, 1, 2, 3], [0, 1, 2]]
    params = [language_model.init_params(jax.random.key(0), shape)]
    found = findings.examine(model, params, params, Console(quiet=True))
    assert found.relations == [] and found.stability == {} and found.alignment == {}
    assert found.heads["self"]["after the same word"].value.shape == (1, 2, 2)
    page, drawings = report.make(model, found, params, "text", 2)
    assert "whose loss chose the best parameters" in page.html()
    assert "follow the grammar" not in page.html() and "lost_self" in drawings
    assert json.dumps(numbers.as_json(model, found, 1), allow_nan=False)
