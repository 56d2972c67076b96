"""The study of redundant heads: verdicts follow from numbers by the rules; a tiny model is asked from end to end."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from experiments import folder
from experiments.studies import models, redundancy
from experiments.studies.redundancy import Config, Text, measures, report, rules
from mhajax import language_model
from mhajax.pretrained import Arrays, Pretrained
from mhajax.statistics import Measure

SHAPE = language_model.Config(d_model=8, num_heads=4, num_kv_heads=2, num_layers=2, d_ff=6, vocab_size=60)
SMALL = redundancy.shrink(Config())


def one(low: float, high: float) -> Measure:
    return Measure(*(np.asarray(part, float) for part in ((low + high) / 2, low, high, 0.0)))


def numbers(rise=(0.02, 0.05), ahead=(-0.3, -0.2), draws=0.3, excess=(0.1, 0.2), without=(0.1, 0.2), risen=(0.2, 0.3)):
    return rules.Numbers(
        one(*rise), one(*ahead), np.full(20, draws), one(*excess), one(*without), 1, gone=1.0, risen=one(*risen)
    )


WORDS = [
    (0, {}, "supported"),
    (0, {"rise": (0.11, 0.2)}, "refuted"),
    (0, {"rise": (0.05, 0.2)}, "not resolved"),
    (1, {}, "supported"),
    (1, {"draws": 0.03}, "not resolved"),  # on average it is ahead, but draws are as good
    (1, {"ahead": (-0.3, 0.1)}, "not resolved"),
    (1, {"ahead": (0.1, 0.2)}, "refuted"),
    (2, {}, "supported"),
    (2, {"without": (-0.1, 0.1)}, "not resolved"),  # one layer decides
    (2, {"excess": (-0.2, -0.1), "without": (-0.2, -0.1)}, "refuted"),
    (3, {}, "supported"),
    (3, {"risen": (0.01, 0.09)}, "refuted"),
    (3, {"risen": (0.01, 0.3)}, "not resolved"),
]


@pytest.mark.parametrize(("claim", "changes", "word"), WORDS)
def test_verdicts_follow_from_the_numbers_by_the_rules(claim, changes, word):
    assert rules.verdicts(Config(), numbers(**changes))[claim].word == word


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": 3}, "chosen must be at least 4, got 3"),
        ({"pairs": 9}, "pairs must be at most chosen=8, got 9"),
        ({"share": 0.3}, "curve must increase and have share=0.3 in it"),
        ({"curve": (0.25, 1.0)}, "above 0 and below 1"),
    ],
)
def test_what_has_no_answer_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A tiny model, and what the study says of it."""
    root = tmp_path_factory.mktemp("data")
    (root / "input.txt").write_text("to be or not to be that is the question whether tis nobler in the mind " * 40)
    params = random_params(language_model.init_params, SHAPE)
    encode = lambda text, **_: SimpleNamespace(ids=[sum(map(ord, word)) % 59 + 1 for word in text.split()])  # noqa: E731
    tokenizer: Any = SimpleNamespace(encode=encode, decode=str)
    made: Any = Pretrained(params, SHAPE, tokenizer, language_model, Arrays({}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda name: made)
        patch.setattr(measures.fetch, "locate", lambda name, given: root)
        config = replace(SMALL, data=Text(str(root)), length=6, draws=3)
        found = measures.measure(config)
        yield config, params, found, report.make(config, found)


@pytest.mark.slow
def test_a_tiny_model_is_asked_from_end_to_end(answered):
    config, params, found, answer = answered
    assert len(answer.verdicts) == 4 and set(answer.drawings) == {"pruning", "layers", "shares", "takeover"}
    assert all(verdict.claim in answer.page.html() for verdict in answer.verdicts)
    result = json.loads(json.dumps(folder.plain(answer.numbers), allow_nan=False))
    assert redundancy.judge(config, result) == answer.verdicts
    # By hand: the loss of all chosen windows without some heads.
    words = ("to be or not to be that is the question whether tis nobler in the mind " * 4).split()
    ids = np.array([sum(map(ord, word)) % 59 + 1 for word in words])[:25]
    windows = jnp.stack([ids[start : start + 7] for start in range(0, 24, 6)])

    @jax.jit
    def loss(gates):
        logits = language_model.apply(params, windows[:, :-1], SHAPE, gates={"attention": gates})
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], -1)[..., 0], axis=1)

    full, ones = loss(jnp.ones((2, 4))), jnp.ones((2, 4))
    np.testing.assert_allclose(found.effects.single[:, 1, 2], loss(ones.at[1, 2].set(0)) - full, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.effects.joint[:, 0], loss(ones.at[0].set(0)) - full, rtol=1e-3, atol=1e-5)
    gone = ones.at[found.best].set(0)
    other = (1, 1) if found.best != (1, 1) else (1, 0)
    np.testing.assert_allclose(found.after[(slice(None), *other)], loss(gone.at[other].set(0)) - loss(gone), atol=1e-5)
    whole = (loss(0 * ones) - full)[:2] / 6
    np.testing.assert_allclose(found.shares.sum((1, 2)), whole, rtol=1e-3, atol=1e-5)
    order = np.argsort(found.effects.single.sum(0).ravel())[:2]
    assert found.judged.removed.tolist() == [2] and found.judged.drawn.shape == (3, 1, 4)
    assert found.judged.ranked["single effect"].shape == (1, 4) and len(order) == 2
