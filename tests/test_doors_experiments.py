"""What a stranger writes to add an experiment, a study or a measure of heads, and that everything here works on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from experiment_runs import call

import experiments
from experiments import keys, kinds, tables
from experiments.data import batches, corpora, vocabulary
from experiments.heads import held_out
from experiments.studies import Answer, Verdict
from experiments.task import Task, build_model, initialiser, seeds_of
from mhajax import language_model, linen, training
from mhajax.figures import head_table
from mhajax.report import numbers, patterns, render, results
from mhajax.report import text as texts
from mhajax.report.page import Page
from mhajax.statistics import Tally

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A kind of training: a language model that reads from right to left ------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Backwards(tables.Training):
    """`kind = "backwards"`: a language model of a text from its end to its beginning."""

    kind: Literal["backwards"] = "backwards"
    quick: bool | None = None
    data: corpora.TextFile
    vocabulary: vocabulary.Config = vocabulary.Config(kind="characters")
    batches: tables.Windows = tables.Windows()
    model: language_model.Config
    training: training.Config = training.Config()
    heads: tables.Heads = tables.Heads()


def prepare(config, folder):
    text = corpora.text(config.data)
    words = vocabulary.load_or_train(folder / "vocabulary.json", [text.train], config.vocabulary)
    model = build_model(config, words)
    ids = [np.asarray(words.encode(part[::-1]), np.int32) for part in (text.train, text.validation)]
    stream = batches.TextBatches(ids[0], batch_size=4, length=8, seed=config.training.seed)

    def loss(params, batch, key):
        logits = model.apply({"params": params}, batch[:, :-1], deterministic=False, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean(), {"weight": jnp.float32(32)}

    def evaluate(params):
        found = [float(loss(one, ids[1][None, :9], jax.random.key(0))[0]) for one in seeds_of(params)]
        return {"validation_loss": found, "score": [-value for value in found]}

    return Task(
        init_params=initialiser(model), loss=loss, batches=lambda seen: stream.iterate(stream.position(seen)),
        tokens=lambda batch: 32, evaluate=evaluate, functional=partial(linen.functional, model),
        examine=lambda count: texts.make_subject(
            language_model, model.config, held_out.windows(text.validation[::-1], words, config.batches, count)
        ),
        report=lambda params, folder, console: {"validation_loss": evaluate(params)["validation_loss"][0]},
        epoch=None, hashes=text.hashes, unit=words.unit, notes=(), examples=stream.examples,
    )  # fmt: skip


# A study: two arms of that kind, and a rule -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Question:
    """`kind = "question"`: do two heads read backwards better than one?"""

    kind: Literal["question"] = "question"
    quick: bool | None = None
    base: Base


@dataclass(frozen=True)
class Base:
    """The table [base]."""

    path: str


def answer(config, train):
    one, two = (train(config.base.path, [f"model.num_heads={n}"], f"{n} heads")["validation_loss"] for n in (1, 2))
    verdict = Verdict("Two heads read better.", "supported" if two < one else "refuted", f"{two:.2f}, {one:.2f}")
    drawing = head_table([[one, two]], title="Loss", label="nats", baseline=0.0)
    page = Page("Two heads or one?", verdict.because)
    page.section("The arms").figure(drawing, "Loss of both.")
    return Answer((verdict,), {"losses": [one, two]}, page, {"arms": drawing})


def module(**names):
    made = ModuleType("mine")
    vars(made).update(names)
    return made


@pytest.fixture
def known(monkeypatch):
    """The rows of the tables."""
    shrink = lambda config: config  # noqa: E731
    monkeypatch.setitem(kinds.TRAININGS, "backwards", module(Config=Backwards, prepare=prepare, shrink=shrink))
    own = module(Config=Question, shrink=shrink, hashes=lambda config: {}, answer=answer)
    monkeypatch.setitem(kinds.STUDIES, "question", own)


TOML = """
kind = "backwards"
[data]
kind = "text"
path = "text.txt"
[model]
d_model = 8
num_heads = 2
num_layers = 1
d_ff = 8
[training]
steps = 2
warmup_steps = 1
[batches]
length = 16
[heads]
sentences = 4
"""


def test_a_config_of_a_kind_of_ones_own_is_read_explained_and_refused(known, tmp_path):
    (tmp_path / "text.txt").write_text("a rose is a rose. " * 60)
    (tmp_path / "mine.toml").write_text(TOML)
    assert "[data] with kind" not in call("keys", "backwards")[1] and "d_model" in call("keys", "backwards")[1]
    assert {key.name for key in keys.keys("question")} == {"kind", "quick", "path"}
    status, _, err = call(tmp_path / "mine.toml", "model.num_head=2", "--runs", tmp_path / "runs")
    assert status == 2 and "did you mean num_heads?" in err and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_kind_and_a_study_of_ones_own_run_from_the_command_line(known, tmp_path):
    (tmp_path / "text.txt").write_text("a rose is a rose. " * 60)
    (tmp_path / "mine.toml").write_text(TOML)
    (tmp_path / "ask.toml").write_text('kind = "question"\n[base]\npath = "mine.toml"\n')
    runs = tmp_path / "runs"
    status, out, err = call(tmp_path / "mine.toml", "--runs", runs, "--json")
    assert status == 0 and json.loads(out.splitlines()[-1])["steps"] == 2, err
    (run,) = runs.iterdir()
    params, config, words, apply = experiments.load(run)
    assert apply(params, jnp.asarray([words.encode("a rose")]), config).shape == (1, 6, words.size)
    status, out, err = call("heads", run, "--json")
    assert status == 0 and (run / "report.html").is_file() and json.loads(out)["heads"], err
    status, out, err = call(tmp_path / "ask.toml", "--runs", runs, "--json")
    assert status == 0, err
    assert len(json.loads(out.splitlines()[-1])["losses"]) == 2
    assert len(list(runs.iterdir())) == 3  # the study and its arms, of which one was there
    assert "already" not in err and len(list(runs.glob("ask-*/figures/arms.svg"))) == 1


# A measure of heads -----------------------------------------------------------------------------------------------


def on_rarest(weights, keys, ids):
    """Share of the attention that goes to the rarest of the visible tokens of its window."""
    counts = jnp.sum(ids[..., :, None] == ids[..., None, :], -1)  # [B, 1, T]
    seen = jnp.where(keys, counts[:, :, None, :], counts.shape[-1] + 1)
    rarest = keys & (seen == seen.min(-1, keepdims=True))
    share = jnp.mean(rarest, -1) * jnp.any(keys, -1)
    return Tally(jnp.sum(weights * rarest, (-1, -2)), jnp.sum(jnp.any(keys, -1), -1), jnp.sum(share, -1))


@pytest.mark.slow
def test_a_measure_of_ones_own_is_in_the_report_and_in_the_numbers(monkeypatch):
    monkeypatch.setitem(patterns.MEASURES_OF_TEXT, "the rarest character", on_rarest)
    text = "the cat sat on the mat and the dog sat on the log. " * 6
    words = vocabulary.train([text], vocabulary.Config(kind="characters"))
    shape = language_model.Config(d_model=8, num_heads=2, d_ff=8, num_layers=1, vocab_size=words.size)
    windows = held_out.windows(text, words, tables.Windows(size=4, length=12), 8)
    subject = texts.make_subject(language_model, shape, windows)
    params = [language_model.init_params(jax.random.key(0), shape)]
    found = results.examine(subject, params, params)
    heads = numbers.as_json(subject, found, 1)["heads"]
    measured = [head["measures"]["the rarest character"] for head in heads]
    assert all(0 < one["value"] < 1 and one["low"] <= one["value"] <= one["high"] for one in measured)
    page, _ = render.render(subject, found, params, "text", 2)
    assert "attention: the rarest character" in page.html()
