"""What a person types and reads: commands, paths, keys, a quick look, a finished run in Python, long work."""

import io
import json
import time

import numpy as np
import pytest
from experiment_runs import TINY_TEXT, call
from rich.console import Console

import experiments
from experiments import config as configs
from experiments import extras, keys, kinds, work
from experiments import run as running
from experiments.__main__ import main
from experiments.data import corpora, vocabulary
from experiments.errors import ConfigError, DataError, UserError
from mhajax import language_model, training

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory, quick_compiles):
    """A quick look at a config of a text file beside it, named by a relative path."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "text.txt").write_text("a rose is a rose is a rose.\n" * 2000)
    (folder / "mine.toml").write_text(TINY_TEXT.format(path="text.txt"))
    status, out, err = call(folder / "mine.toml", "--quick", "--runs", folder / "runs", "--json")
    assert status == 0, err
    (run,) = (folder / "runs").iterdir()
    return json.loads(out.splitlines()[-1]), run, folder, err


@pytest.mark.parametrize("seed", ["-1", "99999999999"])
def test_a_seed_that_would_wrap_is_refused(quick_run, seed):
    status, _, err = call("sample", quick_run[1], "--seed", seed)
    assert status == 2 and f"sample: seed must be between 0 and 2,147,483,647, got {seed}" in err


def test_a_quick_look_says_that_it_is_one(quick_run):
    result, run, folder, err = quick_run
    assert run.name.startswith("quick-mine-") and result["quick"] is True and result["steps"] == 8
    assert "mean nothing" in err and "18,000" not in err and "20,000 characters to train on, 2,000 to validate" in err
    config, _ = running.load_run(run)
    assert config.quick and not (run / "figures").exists()
    assert running.load(str(folder / "mine.toml"), [], str(folder / "runs"))[1] != run  # a real run has its own folder
    status, _, err = call(run, "--quick")
    assert status == 2 and "is a run" in err


@pytest.mark.parametrize("path", ["grammar", "multi30k", "heads", "shakespeare", "masked"])
def test_every_config_has_a_quick_look(path):
    whole = configs.read(f"configs/{path}.toml", ["training.steps=3", "training.warmup_steps=0"])
    small = kinds.shrink(whole)
    assert small.quick and small.training.steps == 3 and small.training.seeds == 1 and small.model.d_model == 32
    assert small.model.activation == whole.model.activation and whole.quick is None
    assert kinds.shrink(small) == small


@pytest.mark.slow
def test_a_finished_run_in_python(quick_run):
    params, config, words, apply = experiments.load(quick_run[1])
    ids = words.encode("a rose")
    logits = apply(params, np.asarray([ids]), config)
    assert logits.shape == (1, 6, words.size) and apply is language_model.apply
    assert isinstance(params, language_model.Params)
    chosen = [int(i) for i in np.argmax(np.asarray(logits)[0, :, 4:], -1) + 4]
    status, out, _ = call("sample", quick_run[1], "--prompt", "a rose", "--tokens", 1, "--temperature", 0)
    assert status == 0 and out == "a rose" + words.decode(chosen[-1:]) + "\n"  # 0 is greedy
    with pytest.raises(UserError, match="seed must be below training.seeds=1, got 1"):
        experiments.load(quick_run[1], seed=1)


@pytest.mark.slow
def test_a_prompt_with_unknown_characters_is_told(quick_run):
    status, _, err = call("sample", quick_run[1], "--prompt", "rosé", "--tokens", 1)
    assert status == 0 and "'é' not among" in err and "characters that this run knows" in err
    status, _, err = call("sample", quick_run[1], "--temperature", -1)
    assert status == 2 and "at least 0 (0 is greedy), got -1" in err


def test_what_a_vocabulary_does_not_know():
    texts = ["the cat sees the dog"]
    words = vocabulary.train(texts, vocabulary.Config(kind="words"))
    assert words.unknown("the zebra sees a zebra . <eos>") == ["zebra", "a", ".", "<eos>"] and words.unit == "word"
    letters = vocabulary.train(texts, vocabulary.Config(kind="characters"))
    assert letters.unknown("the bat!") == ["b", "!"] and letters.unit == "character"
    pieces = vocabulary.train(texts, vocabulary.Config(kind="bpe", size=270))
    assert pieces.unknown("Zebra é") == [] and pieces.unit == "token"


WRONG = {
    "a command misspelt": (["heds"], ["heds", "did you mean heads?"]),
    "no such run": (["heads", "runs/nowhere"], ["runs/nowhere: there is no such folder in "]),
    "a folder that is no run": (["heads", "configs"], ["configs: this folder has no config.toml"]),
    "a file that is no run": (["heads", "configs/grammar.toml"], ["this is a file; give the folder of a run"]),
    "a folder for a config": (["configs"], ["this folder has no config.toml"]),
    "no such kind": (["keys", "translatoin"], ["translatoin", "did you mean translation?"]),
    "another kind in the file": (
        ["configs/grammar.toml", "data.kind=multi30k"],
        ["data.train = 30000 is not a known key", """'data={kind = "multi30k"}'"""],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_is_told_in_words(name):
    arguments, parts = WRONG[name]
    status, _, err = call(*arguments)
    assert status == 2 and "Traceback" not in err
    assert [part for part in parts if part not in err] == []


def test_usage_says_what_comes_in_which_order(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m experiments CONFIG [key=value …] [--quick]")


def test_a_bare_word_is_enough_where_it_is_one_of_the_allowed():
    with pytest.raises(ConfigError, match="model.vocab_size must be left out, got 5: it is that of the vocabulary"):
        configs.read("configs/multi30k.toml", ["model.vocab_size=5"])
    config = configs.read("configs/multi30k.toml", ["vocabulary.kind=words", "model.norm=layer"])
    assert (config.vocabulary.kind, config.model.norm) == ("words", "layer") and type(config.model.norm) is str


def test_a_missing_extra_is_told_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "_installed", lambda module: module not in ("sacrebleu", "orbax.checkpoint"))
    status, _, err = call("configs/grammar.toml", "--runs", tmp_path / "runs")
    assert status == 2 and not (tmp_path / "runs").exists()
    assert err == (
        'error: 2 packages are not installed: orbax-checkpoint, sacrebleu; pip install -e ".[experiments]"\n'
    )
    monkeypatch.setattr(extras, "_installed", lambda module: module != "tensorboardX")
    status, _, err = call("configs/grammar.toml", "--runs", tmp_path / "runs", "--tensorboard")
    assert status == 2 and '1 package is not installed: tensorboardX; pip install -e ".[tensorboard]"' in err
    assert not (tmp_path / "runs").exists()


def test_paths_are_those_beside_the_config(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.txt").write_text("x")
    (there / "config.txt").write_text("x")
    (here / "typed.txt").write_text("x")
    (there / "mine.toml").write_text(TINY_TEXT.format(path="both.txt"))
    monkeypatch.chdir(here)
    read = lambda *overrides: configs.read(there / "mine.toml", overrides).data.path  # noqa: E731
    assert read() == str(there / "both.txt")  # of the config's folder, not of the current one
    assert read("data.path=both.txt") == str(here / "both.txt")  # but what is typed here is here
    assert read("data.path=config.txt") == str(there / "config.txt")
    assert read("data.path=typed.txt") == str(here / "typed.txt")
    with pytest.raises(DataError) as caught:
        read("data.path=botth.txt")
    assert f"no such file in {here} and not in {there}. Did you mean {here / 'both.txt'}?" in str(caught.value)
    with pytest.raises(ConfigError, match="at most 4,000 bytes"):
        read("data.path=" + "x" * 5000)


def test_hold_out_scales(tmp_path):
    for side in "xy":
        (tmp_path / side).write_text("".join(f"{side} {i}\n" for i in range(500)))
    files = corpora.ParallelFiles(str(tmp_path / "x"), str(tmp_path / "y"))
    corpus = corpora.parallel(files)
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.tests["test"])] == [400, 50, 50]
    assert corpus.tests["test"][-1] == ("x 499", "y 499") and corpus.validation[-1] == ("x 449", "y 449")


@pytest.mark.parametrize("kind", ["translation", "language_model"])
def test_every_key_says_what_it_means(kind):
    found = keys.keys(kind)
    assert [key for key in found if not key.meaning or not key.takes] == []
    of = {(key.table, key.name): key for key in found}
    assert of["[training]", "steps"].default == "1000" and of["[model]", "d_model"].default is None
    assert of["[training]", "optimizer"].takes == 'one of "adamw", "adam", "sgd" or "lion"'
    assert of["[model]", "num_kv_heads"].default == "" and "Left out: K = N" in of["[model]", "num_kv_heads"].meaning
    if kind == "translation":
        assert of['[data] with kind = "files"', "train_source"].default is None
        assert of['[data] with kind = "multi30k"', "kind"].default == '"multi30k"'
    else:
        assert of["[heads]", "sentences"].default == "32"  # of this experiment, not of the class
    status, out, _ = call("keys", kind)
    assert status == 0 and all(key.name in out for key in found)


def test_work_is_told_now_and_then_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(work, "EVERY", 0.05)
    console = Console(file=io.StringIO(), width=80)
    with work.shown_on(console), work.piece("translating", 1000, "sentences") as piece:
        time.sleep(0.2)
        piece.advance(100)
        for _ in range(3):
            time.sleep(0.1)
            piece.advance(100)
        with work.shown_on(console), work.piece("inner", 2, "steps", note=""):  # the same watch, the innermost piece
            time.sleep(0.2)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("translating: 0 of 1,000 sentences · compiling …")
    assert any(" sentences/s · " in line and "s left" in line for line in lines) and "inner: 0 of 2 steps" in lines[-1]


def test_a_rate_leaves_out_what_came_before_the_first_units(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80)
    watch = work.Watch(console)
    piece = work.Piece(watch, "x", 100, "batches")
    for seconds, count in ((50.0, 10), (52.0, 40)):  # 50 seconds of compiling, then 40 in 2 seconds
        now[0] = seconds
        piece.advance(count)
    assert watch.bars.tasks[0].fields["note"] == "20 batches/s" and watch.bars.tasks[0].completed == 50
    piece.close()
    assert watch.bars.tasks == [] and work.Piece(None, "x", 1, "batches").advance() is None


@pytest.mark.slow
def test_compiling_is_not_training(quick_run, monkeypatch):
    """With a step that takes a second for the first batch of a shape, and no time for the others."""
    seen: list[int] = []

    def slow_first(*_):
        def step(state, batch):
            if not seen:
                time.sleep(1.0)
            seen.append(batch.shape[0])
            return state._replace(step=state.step + 1), {"loss": np.ones(1), "gradient_norm": np.ones(1)}

        return step

    def silent(config, folder, real=running.prepare):
        return real(config, folder)._replace(report=lambda *_: {}, evaluate=lambda params: {"score": [0.0]})

    monkeypatch.setattr(training, "make_step", slow_first)
    monkeypatch.setattr(running, "prepare", silent)
    folder = quick_run[2]
    status, _, err = call(folder / "mine.toml", "training.seed=1", "--quick", "--runs", folder / "other")
    assert status == 0, err
    (run,) = (folder / "other").iterdir()
    saved = json.loads((run / "times.json").read_text())
    assert len(seen) == 8 and saved[0]["step"] == 2
    assert saved[0]["seconds"] > 1 > saved[0]["training_seconds"]
