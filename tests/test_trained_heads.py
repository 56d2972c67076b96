"""Claims about the heads of trained models: each measurement where the answer is known, the rule, the whole study."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import run
from experiments.data.grammar import Pair, Side
from experiments.errors import ConfigError
from experiments.heads import gold
from experiments.studies import trained_heads
from experiments.studies.trained_heads import measurements, report
from experiments.studies.trained_heads.measurements import Found, Question, Seed
from mhajax import attention
from mhajax.report.patterns import Patterns
from mhajax.report.subject import Kind, Pieces, Relation, Sentence, Subject
from mhajax.statistics import Tally

SENTENCES, LAYERS, HEADS = 20, 2, 3
LINK = Relation("verb → its subject", "cross", "subject", {"far": (7, 99)})
ASKED = Question(LINK.key, words="verbs")


def tally(rates, count=4):
    """Every sentence alike."""
    return counted(np.broadcast_to(np.asarray(rates, float), (SENTENCES, LAYERS, HEADS)) * count, count)


def counted(total, count):
    return Tally(np.asarray(total), np.asarray(count), np.zeros(()))


def patterns(rates, distances, bits):
    return Patterns(
        {"cross": {"distance": tally(distances)}}, {(LINK.key, ""): tally(rates), (LINK.key, "far"): tally(rates, 0)},
        {}, {"cross": {"where they look (bits)": counted(np.full((SENTENCES, LAYERS), bits), 1)}}, {},
    )  # fmt: skip


@pytest.fixture
def seed():
    """Head 1·2 follows the relation, and a verb costs half a nat more without it; other heads cost a tenth."""
    subject = Subject(
        kinds=(Kind("cross", "Cross", LAYERS, HEADS, "across", is_self=False),), origin="made", unit="word",
        sequence="sentence", batches=(), index=lambda b: b, capture=lambda *_: {}, visible=lambda b: {},
        tokens=lambda b: {}, sentence=lambda b, row: Sentence({}, Pieces((), ()), ""),
        categories=("all words", "verbs"), relations=(LINK,),
    )  # fmt: skip
    after = patterns([[0.2, 0.1, 0.3], [0.5, 0.4, 0.9]], [[1.0, 2.0, 3.0], [4.0, 9.0, 5.0]], 0.5)
    before = patterns([[0.3, 0.2, 0.2], [0.1, 0.2, 0.1]], [[4.0, 4.5, 5.0], [4.0, 4.0, 4.0]], 0.125)
    guesses = {(LINK.key, ""): {"one back": counted(np.full(SENTENCES, 1.6), 4),
                                "two back": counted(np.full(SENTENCES, 2.0), 4)}}  # fmt: skip

    def losses(params, gates):
        cost = 0.1 + 0.4 * (np.indices((LAYERS, HEADS)).sum(0) == 3)
        off = float(((1 - gates["cross"]) * cost).sum())
        return {"verbs": Tally(np.full(SENTENCES, 2 * (1 + off)), np.full(SENTENCES, 2), np.zeros(SENTENCES))}

    return Seed(subject, None, None, after, before, guesses, losses, lambda params: {})


def test_the_head_that_follows_is_found_and_stands_against_what_needs_no_attention(seed):
    found = measurements.follows(seed, ASKED)
    np.testing.assert_allclose(found.value, 0.9)
    np.testing.assert_allclose(list(found.others.values()), [0.5, 0.3])
    assert list(found.others) == ["the best guess by position", "the best untrained head"]
    assert found.note == "head 1·2; two back"


def test_what_words_cost_without_that_head(seed):
    found = measurements.needed(seed, ASKED)
    np.testing.assert_allclose(found.value, 0.5)
    np.testing.assert_allclose(found.others["another head of its layer"], 0.1)
    assert found.note == "head 1·2"


def test_how_far_and_how_differently(seed):
    found = measurements.reach(seed, Question("cross"))
    assert (found.value, found.others) == (8.0, {"untrained heads": 1.0})
    assert found.note == "1.0 to 9.0 words"
    found = measurements.differ(seed, Question("cross"))
    assert (found.value, found.others) == (0.5, {"untrained heads": 0.125})


def test_subspaces_overlap_wholly_not_at_all_and_by_chance(seed):
    config = attention.Config(d_model=12, num_heads=3)
    random = attention.init_params(jax.random.key(0), config)
    stacked = jax.tree.map(lambda a: a[None], random)
    own = jnp.eye(12).reshape(12, 3, 4).swapaxes(0, 1)[None]  # three heads with 4 channels each of their own

    def overlap(w_q, w_k, w_v):
        params = stacked._replace(w_q=w_q, w_k=w_k, w_v=w_v)
        one = seed._replace(params=params, untrained=stacked, attentions=lambda params: {"cross": params})
        return measurements.apart(one, Question("cross"))

    same = jnp.broadcast_to(own[:, :1], own.shape) * jnp.arange(1, 4)[:, None, None]  # the same, whatever the scale
    assert overlap(own, own, own).value == pytest.approx(0, abs=1e-12)
    assert overlap(same, same, same).value == pytest.approx(1)
    found = overlap(own, own, same)
    assert found.value == pytest.approx(1 / 3) and found.others["random subspaces"] == pytest.approx(4 / 12)
    draws = np.random.default_rng(0).normal(size=(3, 1, 40, 12, 4))
    assert abs(overlap(*draws).value - 4 / 12) < 0.01 and 0 < found.others["untrained heads"] < 1


@pytest.mark.parametrize(
    ("measure", "question", "message"),
    [
        ("follows", Question("cross: nothing"), "of must be one of 'cross: verb → its subject', got 'cross: nothing'"),
        ("follows", Question(LINK.key, part="near"), r"part must be a part of .* \(far\), got 'near'"),
        ("follows", Question(LINK.key, part="far"), "none of the held-out sentences asks"),
        ("needed", Question(LINK.key, words="nouns"), "words must be one of 'all words', 'verbs', got 'nouns'"),
        ("reach", Question("self"), "of must be one of 'cross', got 'self'"),
        ("differ", Question("self"), "of must be one of 'cross', got 'self'"),
        ("apart", Question("self"), "of must be one of none, got 'self'"),
    ],
)
def test_what_is_not_there_to_be_asked_is_said(seed, measure, question, message):
    with pytest.raises(ConfigError, match=message):
        trained_heads.MEASUREMENTS[measure](seed, question)


def claim(**changes):
    return dataclasses.replace(trained_heads.Claim("A head follows it.", "follows", LINK.key), **changes)


BASE = trained_heads.Base("grammar.toml", ("training.steps=3",))


def test_the_verdict_follows_from_the_seeds_by_the_rule(seed):
    claims = (claim(), claim(margin=0.5), claim(better="lower"), claim(claim="It is open."))
    config = trained_heads.Config(question="Do they?", literature="Others did.", base=BASE, claims=claims, seeds=3)
    noise = [0.01, 0.0, -0.02]
    near = [Found(0.9 + e, {"a guess": 0.5, "an untrained head": 0.3 + e}, "head 1·2") for e in noise]
    open_ = [Found(0.9 + 9 * e, {"a guess": 0.88}, "") for e in noise]
    answer = report.make(config, [near, near, near, open_], seed.subject)
    assert [one.word for one in answer.verdicts] == ["supported", "refuted", "refuted", "not resolved"]
    assert answer.verdicts[0].because.startswith("ahead of “a guess” by 0.39")
    html = answer.page.html()
    for shown in ("Do they?", "Others did.", "head 1·2", "Supported", "The head is chosen on one half", "an untrained"):
        assert shown in html
    result = json.loads(json.dumps(answer.numbers, allow_nan=False))
    assert trained_heads.judge(config, result) == answer.verdicts and len(answer.drawings) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: claim(measure="sees"), "measure must be one of apart, differ, follows, needed, reach, got 'sees'"),
        (lambda: claim(margin=-1.0), "margin must be at least 0"),
        (lambda: trained_heads.Config(question="", base=BASE, claims=()), "claims must be one or more"),
        (lambda: trained_heads.Config(question="", base=BASE, claims=(claim(),), seeds=2), "seeds must be at least 3"),
        (lambda: trained_heads.Config(question="", base=BASE, claims=(claim(),), sentences=4), "at least 8"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_words_that_cross_another_stand_in_another_order():
    none = (-1,) * 4
    side = Side(("a", "b", "c", "d"), ("X",) * 4, none, none)
    alignment = ((0, 0), (1, 3), (2, 1), (3, 2))  # (source, target): the second word goes last
    pair = Pair(side, side, alignment, ("",) * 4, none, (), ())
    (relation,) = (one for one in gold.RELATIONS if one.role == "aligns reordered")
    assert sorted(gold.LINKS[relation.key](pair)) == [(1, 2), (2, 3), (3, 1)]


@pytest.mark.slow
def test_a_claim_and_a_measurement_of_ones_own(tmp_path, monkeypatch, capsys):
    """One config and one function: the whole study, on a small model."""
    from experiments.__main__ import main

    def quiet(seed, asked):
        """How seldom every head looks at the first word."""
        total = seed.after.measures[asked.of]["first token"]
        return Found(1 - float(np.sum(total.total) / np.sum(total.count)), {"half": 0.5})

    monkeypatch.setitem(trained_heads.MEASUREMENTS, "quiet", quiet)
    path = tmp_path / "own.toml"
    path.write_text(
        'kind = "trained_heads"\nquestion = "Are heads quiet?"\n[base]\n'
        f'path = "{run.__file__.rsplit("/", 2)[0]}/configs/grammar.toml"\n'
        '[[claims]]\nclaim = "They are."\nmeasure = "quiet"\nof = "encoder"\n'
        '[[claims]]\nclaim = "One follows."\nmeasure = "follows"\nof = "cross: word read → its source"\n'
    )
    assert main([str(path), "--quick", "--runs", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("quick-own-*")
    result = json.loads((folder / "result.json").read_text())
    assert [row["claim"] for row in result["claims"]] == ["They are.", "One follows."]
    assert len(result["claims"][0]["by_seed"]) == 3 and (folder / "figures/claim-2.svg").is_file()
    assert main([str(path), "--quick", "--runs", str(tmp_path)]) == 0  # it has its answer
    assert "How seldom every head looks" in (folder / "report.html").read_text()
    assert capsys.readouterr().out.count("the model ") == 1
