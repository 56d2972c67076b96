"""The study of a language model's heads: verdicts follow from their numbers; a tiny model is asked from end to end."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from experiments.studies import models
from experiments.studies.lm_heads import BLIMP, Config, Texts, answer, measures, report, rules
from mhajax import language_model
from mhajax.pretrained import Arrays, Pretrained
from mhajax.statistics import Measure, Report

SHAPE = language_model.Config(d_model=8, num_heads=4, num_kv_heads=2, num_layers=2, d_ff=6, vocab_size=60)


def one(value, low, high, baseline=0.0):
    return Measure(*(np.asarray(part, float) for part in (value, low, high, baseline)))


def found(difference=(0.1, 0.3), sink=(0.6, 0.7), lost=(0.5, 0.6), rise=(0.01, 0.02)) -> Any:
    grid = lambda low, high: one(*(np.full((2, 4), v) for v in ((low + high) / 2, low, high, 0.1)))  # noqa: E731
    best = Report(one(0.5, 0.4, 0.6, 0.2), one(0.2, *difference), np.array([0]), None)
    carried = Report(one(np.mean(lost), *lost), one(np.mean(lost), *lost), np.array([0]), None)
    pruned = measures.Pruned(0.25, one(np.mean(rise), *rise), [one(0.3, 0.2, 0.4)], (3, 2), (5.0, 4.0), (10.0, 12.0))
    roles = dict.fromkeys(measures.ROLES, (grid(0.1, 0.2), best))
    whole = one(4.0, 3.0, 5.0)
    return measures.Found(roles, grid(*sink), {BLIMP[0]: whole}, (grid(*lost), carried), whole, [pruned])


WORDS = {
    0: ("difference", {(0.1, 0.3): "supported", (-0.3, -0.1): "refuted", (-0.1, 0.1): "not resolved"}),
    1: ("sink", {(0.6, 0.7): "supported", (0.2, 0.4): "refuted", (0.4, 0.6): "not resolved"}),
    2: ("lost", {(0.41, 0.6): "supported", (0.1, 0.39): "refuted", (0.3, 0.5): "not resolved"}),
    3: ("rise", {(0.01, 0.09): "supported", (0.1, 0.2): "refuted", (0.09, 0.1): "not resolved"}),
}


@pytest.mark.parametrize("claim", WORDS)
def test_verdicts_follow_from_the_numbers_by_the_rule(claim):
    name, words = WORDS[claim]
    for interval, word in words.items():
        assert rules.all_of(found(**{name: interval}))[claim].word == word, interval


def test_the_page_and_the_numbers_say_the_verdicts():
    given = report.make(Config(), found())
    assert [verdict.word for verdict in given.verdicts] == ["supported"] * 4
    assert given.page.html().count("Supported") >= 4 and json.dumps(given.numbers)


def tokenizer():
    """A token a word, by its letters; none is special."""
    encode = lambda text, **_: SimpleNamespace(ids=[sum(map(ord, word)) % 59 + 1 for word in text.split()])  # noqa: E731
    return SimpleNamespace(encode=encode)


@pytest.mark.slow
def test_a_tiny_model_is_asked_from_end_to_end(tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "blimp").mkdir()
    (tmp_path / "tinyshakespeare/input.txt").write_text(
        "to be or not to be that is the question whether tis nobler " * 40
    )
    for name in BLIMP:
        pairs = [
            {"one_prefix_prefix": f"the {noun} here", "one_prefix_word_good": "is", "one_prefix_word_bad": "are"}
            for noun in ("cat", "dog", "cow", "hen")
        ]
        (tmp_path / "blimp" / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    params = random_params(language_model.init_params, SHAPE)
    made: Any = Pretrained(params, SHAPE, tokenizer(), language_model, Arrays({}))
    monkeypatch.setattr(models, "load", lambda name: made)
    monkeypatch.setattr(measures.fetch, "locate", lambda name, root: tmp_path / name)
    config = replace(Config(data=Texts(str(tmp_path))), sequences=4, length=5, windows=4, pairs=3, draws=1)
    given = answer(config)
    assert len(given.verdicts) == 4 and set(given.drawings) == {"induction", "sink", "agreement"}
    seen = np.asarray(given.numbers["first_token"]["value"])
    assert seen.shape == (2, 4) and (0 < seen).all() and (seen < 1).all()
    # Without one head, by hand: what the study says is lost of the mean difference.
    forms = [tokenizer().encode(word).ids[0] for word in ("is", "are")]
    lost = np.zeros((2, 4))
    for noun in ("cat", "dog", "cow"):
        tokens = jnp.asarray([tokenizer().encode(f"the {noun} here").ids])
        difference = lambda gates, tokens=tokens: float(  # noqa: E731
            language_model.apply(params, tokens, SHAPE, gates={"attention": gates})[0, -1, jnp.asarray(forms)]
            @ jnp.array([1.0, -1.0])
        )
        for layer, head in ((0, 1), (1, 2)):
            gates = jnp.ones((2, 4))
            lost[layer, head] += (difference(gates) - difference(gates.at[layer, head].set(0))) / 3
    stated = np.asarray(given.numbers["agreement_without"]["heads"]["value"])
    np.testing.assert_allclose(stated[[0, 1], [1, 2]], lost[[0, 1], [1, 2]], rtol=1e-3, atol=1e-5)
    assert given.numbers["pruned"][1]["heads"][0] <= 4
