"""Training on hidden tokens: which are hidden, what is lost on them, and a run from end to end."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_runs import call

from experiments import masked_modelling as masked
from experiments import schema
from experiments.data import batches, vocabulary
from experiments.data.vocabulary import SPECIAL_TOKENS, UNK
from experiments.errors import ConfigError
from experiments.masked_modelling import Masking
from experiments.task import build_model, initialiser
from mhajax import encoder, linen
from mhajax.report import text as texts

pytestmark = pytest.mark.usefixtures("quick_compiles")
TEXT = "the cat sat on the mat and the dog sat on the log . " * 30
TOML = """
kind = "masked_language_model"
[data]
kind = "text"
path = "text.txt"
validation_share = 0.2
[vocabulary]
kind = "words"
[batches]
size = 4
length = 12
[model]
d_model = 8
num_heads = 2
num_layers = 1
d_ff = 8
[training]
steps = 3
warmup_steps = 1
evaluate_every = 3
[heads]
sentences = 6
"""


@pytest.fixture(scope="module")
def words():
    return vocabulary.train([TEXT], vocabulary.Config(kind="words"), mask=True)


@pytest.mark.parametrize("masking", [Masking(), Masking(rate=0.4, hidden=0.5, replaced=0.3)])
def test_as_many_tokens_are_told_hidden_and_replaced_as_is_said(masking):
    mask, count = 50, 200_000
    tokens = jnp.full(count, 7)
    read, told = (np.asarray(a) for a in masked.disguise(jax.random.key(0), tokens, masking, mask))
    assert (read[~told] == 7).all()

    def near(share, expected):
        assert abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5 + 1e-3

    near(told.mean(), masking.rate)
    near((read == mask).mean(), masking.rate * masking.hidden)
    others = read[told & (read != mask) & (read != 7)]
    entries = mask - len(SPECIAL_TOKENS)
    near(len(others) / count, masking.rate * masking.replaced * (entries - 1) / entries)  # one of them is the token
    assert others.min() == len(SPECIAL_TOKENS) and others.max() == mask - 1
    again, _ = masked.disguise(jax.random.key(1), tokens, masking, mask)
    assert (np.asarray(again) != read).any()


def test_no_text_has_the_token_that_hides(words, tmp_path):
    assert words.mask == words.size - 1 and words.encode("the <mask> sat")[1] == UNK
    words.save(tmp_path / "vocabulary.json")
    again = vocabulary.load(tmp_path / "vocabulary.json")
    assert again.mask == words.mask and again.pieces([again.mask]) == ["<mask>"]
    assert vocabulary.train([TEXT], vocabulary.Config(kind="words")).mask is None
    theirs = vocabulary.train(["a <mask> b"], vocabulary.Config(kind="words"), mask=True)
    assert theirs.encode("a <mask> b")[1] == UNK and theirs.mask == theirs.size - 1
    for kind in ("characters", "bpe"):
        own = vocabulary.train([TEXT], vocabulary.Config(kind=kind, size=300), mask=True)
        text = "the <mask> sat"
        ids = own.encode(text)
        assert own.mask is not None and own.mask not in ids and own.decode(own.encode("the cat")) == "the cat"
        assert own.mask == own.size - 1


def test_the_loss_is_the_cross_entropy_of_the_hidden_tokens(words):
    shape = encoder.Config(d_model=8, num_heads=2, num_layers=1, d_ff=8, vocab_size=words.size)
    config = masked.Config(model=replace(shape, vocab_size=None))
    model = build_model(config, words)
    params = jax.jit(initialiser(model))(jax.random.key(0))
    bias = jnp.arange(words.size) / 10.0
    params["head"]["output_bias"] = bias
    batch = jnp.asarray([words.encode(TEXT)[:13], words.encode(TEXT)[3:16]])
    key = jax.random.key(3)
    tokens = batch[:, :-1]

    @jax.jit
    def both(params):
        loss, seen = masked._loss(config, model, words.mask, params, batch, key)
        read, told = masked.disguise(jax.random.split(key)[0], tokens, config.masking, words.mask)
        logits = encoder.apply(linen.functional(model, params), read, model.config)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        return loss, seen, nats, told

    loss, seen, nats, told = both(params)
    assert 0 < int(told.sum()) == int(seen["weight"])
    np.testing.assert_allclose(loss, float((nats * told).sum() / told.sum()), rtol=1e-5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[model]\nhead = false", "head must be true"),
        ("[model]\npooled = true", "pooled must be false"),
        ("[masking]\nrate = 1.0", r"rate must be between 0 and 1"),
        ("[masking]\nhidden = 0.9\nreplaced = 0.2", "shares of a whole"),
    ],
)
def test_what_cannot_be_trained_is_refused(lines, message):
    import tomllib

    table = {"model": {"d_model": 8, "num_heads": 2, "num_layers": 1}}
    for name, values in tomllib.loads(lines).items():
        table[name] = table.get(name, {}) | values
    with pytest.raises(ConfigError, match=message):
        schema.build(table, masked.Config)


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "mine.toml").write_text(TOML)
    short = ["model.positions='learned'", "model.max_positions=8"]
    status, _, err = call(tmp_path / "mine.toml", *short, "--runs", tmp_path / "bad")
    assert status == 2 and "batches.length must be at most model.max_positions=8, got 12" in err
    status, out, err = call(tmp_path / "mine.toml", "--runs", tmp_path / "runs", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert 0 < result["validation_loss"] < 4 and 0 <= result["validation_accuracy"] <= 1
    assert "≠" in result["sample"] or "[" in result["sample"]
    (run,) = (tmp_path / "runs").iterdir()
    status, out, err = call("heads", run, "--json")
    assert status == 0 and len(json.loads(out)["heads"]) == 2, err
    status, _, err = call("sample", run)
    assert status == 2 and "masked_language_model" in err


def test_a_text_in_which_nothing_is_hidden_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("a b c d e f g h i j k l m n o")
    (tmp_path / "mine.toml").write_text(TOML)
    status, _, err = call(tmp_path / "mine.toml", "data.validation_share=0.14", "batches.length=4", "--runs", tmp_path)
    assert status == 2 and "2 held-out words are too few" in " ".join(err.split()), err


def test_as_many_tokens_are_counted_as_are_hidden():
    text, length = np.arange(50, dtype=np.int32), 12
    found = 0
    for number, batch in enumerate(batches.windows(text, batch_size=1, length=length)):
        found += texts.hidden_positions(number, length)[: batch.lengths[0]].sum()
    assert masked._hidden_in(len(text), length) == found > 0


def test_the_same_tokens_are_hidden_in_every_evaluation():
    assert (texts.hidden_positions(3, 400) == texts.hidden_positions(3, 400)).all()
    assert 0.05 < texts.hidden_positions(3, 400).mean() < 0.3
    assert (texts.hidden_positions(3, 400) != texts.hidden_positions(4, 400)).any()
