"""Runs keep their word: what is damaged is named, one process works on a folder, a full disk loses nothing."""

import errno
import io
import json
import os
import random
import resource
import shutil
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_runs import TINY, call
from rich.console import Console

from experiments import curve, environment, host, schema, toml
from experiments import folder as folders
from experiments import run as running
from experiments.data import vocabulary
from experiments.data.batches import PairBatches, TextBatches
from experiments.errors import ConfigError, DataError, UserError
from experiments.progress import Times
from mhajax import checkpoints, training
from mhajax.checkpoints import Checkpoints, Damaged

CONFIG = """
kind = "language_model"
data = {{kind = "text", path = "{path}"}}
batches = {{size = 2, length = 8}}
model = {{d_model = 8, num_heads = 2, num_layers = 1}}
training = {{steps = 8, warmup_steps = 2, log_every = 2, evaluate_every = 4}}
sampling = {{prompt = "a", tokens = 3}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, quick_compiles):
    """A run folder as a finished training leaves it, made without one."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text("a rose is a rose is a rose.\n" * 40)
    (root / "tiny.toml").write_text(CONFIG.format(path=root / "text.txt"))
    config, folder = running.load(str(root / "tiny.toml"), [], str(root))
    with folders.opened(folder):
        task = running.prepare(config, folder)
        state = training.init(task.init_params, training.optimizer(config.training), config.training)
        saved = Checkpoints(folder / "checkpoints")
        for step in (4, 8):
            saved.offer(state._replace(step=jnp.int32(step)), float(step))
            saved.save(state._replace(step=jnp.int32(step)))
        lines = [{"step": step, "loss": [1.5], "gradient_norm": [1.0]} for step in range(1, 9)]
        folders.write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        folders.write(folder / "config.toml", schema.to_toml(config))
        folders.write(
            folder / "environment.json", json.dumps(environment.describe(task.hashes, folder), indent=2) + "\n"
        )
        times = Times(folder)
        times.start(0)
        times.save(8)
        folders.write(folder / "result.json", json.dumps({"seconds": 3.0, "tokens_per_second": 5.0}))
    return folder


def read(folder):
    """All that going on with a finished run, or asking it something, reads."""
    config, folder = running.load_run(folder)
    task, params = running.trained(config, folder)
    environment.same_data(folder, task.hashes)
    Times(folder).start(8)
    running._timing_of(folder)
    folders.lines(folder / "metrics.jsonl")
    return params


def fuzz(folder, tmp_path, files, count):
    """A file gone, emptied, or with a bit flipped: the parameters are the same, or a person is told in few lines."""
    whole, rng, told = read(folder), random.Random(0), 0
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in files:
        content = (folder / file).read_bytes()
        flips = [(rng.randrange(len(content)), 1 << rng.randrange(8)) for _ in range(count)]
        flipped = [content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :] for i, bit in flips]
        for changed in (None, b"", *flipped):
            (copy / file).unlink() if changed is None else (copy / file).write_bytes(changed)
            try:
                chex.assert_trees_all_equal(read(copy), whole)
            except UserError as error:
                told += 1
                assert str(copy) in str(error) and len(str(error).splitlines()) <= 5
            (copy / file).write_bytes(content)
    return told


def files_of(folder, parts=("",)):
    """The files under parts of a folder, relative to it."""
    found = (path for part in parts for path in sorted((folder / part).rglob("*")))
    return [path.relative_to(folder) for path in found if path.is_file() and path.name != "lock"]


@pytest.mark.slow
def test_no_flipped_byte_changes_parameters_or_gives_a_raw_error(tiny, tmp_path):
    arrays = files_of(tiny, ["checkpoints/latest/8", "checkpoints/best/8"])
    files = [file for file in files_of(tiny) if len(file.parts) == 1] + random.Random(1).sample(arrays, 4)
    assert fuzz(tiny, tmp_path, files, 1) >= 3 * 4 + 5


@pytest.mark.parametrize("kind", ["latest", "best"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tiny, tmp_path, kind):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    newest = copy / "checkpoints" / kind / "8"
    file = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError) as error:
        read(copy)
    for part in (str(newest), "batch 8", file.name, "batch 4 are whole", f"delete {newest}"):
        assert part in str(error.value)
    shutil.rmtree(newest)  # as it says
    saved = Checkpoints(copy / "checkpoints")
    assert (saved.latest_step(), (saved.best_score() or {}).get("step")) == ((4, 8) if kind == "latest" else (8, 4))
    read(copy)


def test_states_that_are_gone_are_no_fresh_start(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    for step in (4, 8):
        shutil.rmtree(copy / "checkpoints" / "latest" / str(step))
    with pytest.raises(DataError, match="latest held states of this run and is empty"):
        read(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(DataError, match=r"there is a result.json, but what was trained is gone"):
        read(copy)


@pytest.mark.parametrize(
    ("line", "why"),
    [(b'{"step": 2, "lo', "JSON|Unterminated"), (b"\0\0\0", "Expecting"), (b'"\xff"', "UTF-8"),
     (b'{"loss": 1}', "step"), (b'{"step": 2, "loss": "x"}', "loss"), (b"[]", "object")],
)  # fmt: skip
def test_a_damaged_line_of_metrics_is_named(tmp_path, line, why):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": [1.0]}\n' + line + b'\n{"step": 3, "loss": [1.0]}\n{"step": 4')
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line 2: .*({why})"):
        folders.lines(file)
    file.write_bytes(b'{"step": 1, "loss": [1.0]}\n\0\0')  # what a kill or a power cut leaves
    assert folders.lines(file) == [{"step": 1, "loss": [1.0]}]


def test_one_process_works_on_a_folder(tmp_path):
    with folders.opened(tmp_path / "run"):
        (tmp_path / "run" / "config.toml").touch()
        with pytest.raises(UserError, match=r"another process works on this run \(process \d+ on"), folders.opened(
            tmp_path / "run"
        ):  # fmt: skip
            raise AssertionError("two at once")
    with folders.opened(tmp_path / "run"):
        pass


def test_a_trial_that_fails_before_there_is_a_config_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), folders.opened(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "vocabulary.json").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "run", Path("/proc/none/run"), Path("a\0b"), tmp_path / ("a" * 300)):
        with pytest.raises(UserError) as error, folders.opened(place):
            raise AssertionError("made")
        assert "\n" not in str(error.value)


def test_heads_are_refused_while_another_process_works_on_the_run(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    with folders.opened(copy):
        before = files_of(copy)
        status, out, err = call("heads", copy)
        assert status == 2 and "another process works on this run (process " in err and "Traceback" not in err
        assert files_of(copy) == before
        assert call("sample", copy, "--tokens", 1)[0] == 0  # which only reads


@pytest.mark.parametrize("kind", ["latest", "best"])
def test_reading_goes_on_with_what_a_training_puts_in_its_place(tmp_path, monkeypatch, kind):
    saved, real = Checkpoints(tmp_path), checkpoints._restore_arrays
    keep = saved.save if kind == "latest" else lambda state: saved.offer(state, float(state.step))
    keep(state_of(1))

    def meanwhile(path, like):
        for step in (3, 5) if path.parent.name == "1" else ():
            keep(state_of(step, float(step)))  # after which that of batch 1 is gone
        return real(path, like)

    monkeypatch.setattr(checkpoints, "_restore_arrays", meanwhile)
    read = saved.restore(state_of(0)).params if kind == "latest" else saved.best(state_of(0).params)
    chex.assert_trees_all_equal(read, state_of(5, 5.0).params)


def test_what_vanishes_while_it_is_read_is_one_line(tiny, tmp_path, monkeypatch, caplog):
    copy, real = shutil.copytree(tiny, tmp_path / "copy"), checkpoints._restore_arrays

    def vanishing(path, like):
        shutil.rmtree(copy / "checkpoints")
        return real(path, like)

    monkeypatch.setattr(checkpoints, "_restore_arrays", vanishing)
    status, _, err = call("sample", copy)
    assert (
        status == 2
        and caplog.records == []
        and err.count("\n") == 1
        and "cannot be trusted: SHA256SUMS is missing" in err
    )


@pytest.mark.parametrize("metrics", [None, "", '{"step": 8, "validation_loss": [1.5], "score": [-1.5]}\n', "whole"])
def test_metrics_that_are_gone_only_cost_the_figure(tiny, tmp_path, metrics):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    file = copy / "metrics.jsonl"
    if metrics is None:
        file.unlink()
    elif metrics != "whole":
        file.write_text(metrics)
    console = Console(file=io.StringIO(), width=200)
    running._forget_after(file, 8)
    curve.draw(copy, running.load_run(copy)[0], "character", console)
    assert (copy / "figures" / "training.svg").is_file() == (metrics == "whole")
    assert ("has no batches" in console.file.getvalue()) == (metrics != "whole")  # type: ignore[attr-defined]
    if metrics == "whole":
        assert "nats per character" in (copy / "figures" / "training.svg").read_text()


@pytest.mark.parametrize(
    ("losses", "validation", "ended"),
    [([4.0, 3, 2], 2.0, None), ([4.0, 4.5, 4.2], 4.4, None), ([4.0, 30, 60], 50.0, "60"), ([4.0], float("nan"), "nan"),
     ([4.0, 3, 2], 5.5, "5.5"), ([], 9.0, None)],
)  # fmt: skip
def test_a_training_that_diverged_says_so_and_is_drawn(tmp_path, losses, validation, ended):
    lines = [{"step": n, "loss": [loss]} for n, loss in enumerate(losses, start=1)]
    lines.append({"step": len(losses), "validation_loss": [validation], "score": [-validation]})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = curve.diverged(tmp_path)
    if ended is None:
        assert said is None
    else:
        assert said is not None and f"began at 4 and ended at {ended}" in said and "learning_rate" in said
        (tmp_path / "tiny.toml").write_text(CONFIG.format(path=tmp_path / "metrics.jsonl"))
        config = running.configs.read(tmp_path / "tiny.toml")
        curve.draw(tmp_path, config, "character", Console(file=io.StringIO()))
        assert (tmp_path / "figures" / "training.svg").is_file()


def test_a_result_is_json_whatever_the_numbers_are():
    result = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": "nan", "e": 3}}
    assert folders.plain(result) == {"a": None, "b": [1.5, None], "c": {"d": "nan", "e": 3}}


def state_of(step, value=1.0, size=3):
    params = {"w": jnp.full((1, size), value)}
    return training.State(jnp.int32(step), params, (), None)


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch, caplog):
    saved, lost = Checkpoints(tmp_path), []
    saved.save(state_of(1))
    monkeypatch.setattr(sys, "unraisablehook", lost.append)  # of writes that end after Orbax has raised
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    noise = {str(i): jax.random.normal(jax.random.key(i), (1, 5_000)) for i in range(20)}
    try:
        with pytest.raises(checkpoints.NotSaved) as error, folders.opened(tmp_path / "run"):
            saved.save(state_of(2)._replace(params=noise))
    except UserError as told:  # as the command line has it
        error = told
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written: File too large. What was saved before is whole" in str(error)
    assert (
        "\n" not in str(error) and lost == [] and [line for line in caplog.records if line.levelname == "ERROR"] == []
    )
    assert saved.latest_step() == 1 and [path.name for path in (tmp_path / "latest").iterdir()] == ["1"]
    chex.assert_trees_all_equal(saved.restore(state_of(0)), state_of(1))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_disk_that_fills_up_is_one_error_and_the_same_command_goes_on(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose.\n" * 40)
    (tmp_path / "tiny.toml").write_text(CONFIG.format(path=tmp_path / "text.txt"))
    real = checkpoints._save_arrays

    def full(path, tree):
        if "latest/8.part" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, tree)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_save_arrays", full)
        status, _, err = call(tmp_path / "tiny.toml", "--runs", tmp_path / "runs")
    (run,) = (tmp_path / "runs").iterdir()
    assert status == 2 and err.count("\n") == 1 and "No space left on device. What was saved before is whole" in err
    assert [path.name for path in (run / "checkpoints" / "latest").iterdir()] == ["4"]
    assert not (run / "result.json").exists()
    status, out, err = call(tmp_path / "tiny.toml", "--runs", tmp_path / "runs")
    assert status == 0 and "going on after batch 4 of 8" in out, err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_loss_that_is_not_a_number_is_one_error_and_keeps_the_state_before_it(tmp_path):
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose.\n" * 40)
    (tmp_path / "tiny.toml").write_text(CONFIG.format(path=tmp_path / "text.txt"))
    changes = ("learning_rate=1e30", "warmup_steps=0", "log_every=1", "checkpoint_every=1")
    runs = tmp_path / "runs"
    status, _, err = call(tmp_path / "tiny.toml", *(f"training.{change}" for change in changes), "--runs", runs)
    (run,) = runs.iterdir()
    assert status == 1 and err.count("\n") == 1 and err.startswith("error: training stopped at batch 2: "), err
    for part in ("is not finite", "the last good state, after batch 1, is kept", "Batch 2 has the windows of 8 tokens"):
        assert part in err
    assert [path.name for path in (run / "checkpoints" / "latest").iterdir()] == ["1"]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1]
    assert not (run / "result.json").exists() and not (run / "sample.txt").exists()


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_never_the_best(tmp_path, score):
    saved = Checkpoints(tmp_path)
    assert not saved.offer(state_of(1), score) and saved.best_score() is None
    assert saved.offer(state_of(2), -3.0)
    assert not saved.offer(state_of(3, 7.0), score)
    assert saved.best_score() == {"step": 2, "score": -3.0}
    assert saved.offer(state_of(4, 9.0), -2.0)
    chex.assert_trees_all_equal(saved.best(state_of(0).params), state_of(0, 9.0).params)


def test_two_states_are_kept_and_an_older_one_is_refused(tmp_path):
    saved = Checkpoints(tmp_path)
    for step in (1, 2, 5):
        saved.save(state_of(step))
    assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == ["2", "5"]
    with pytest.raises(ValueError, match=r"holds a state of batch 5, got one of batch 3"):
        saved.save(state_of(3))
    (tmp_path / "latest" / "5").rename(tmp_path / "latest" / "7")
    with pytest.raises(Damaged, match="it holds batch 5"):
        saved.restore(state_of(0))


def test_a_batch_beyond_the_data_is_refused_before_it_is_allocated():
    pairs = [([5, 6], [7])] * 20
    with pytest.raises(DataError, match=r"batches\.tokens must be at most the 80 tokens .* got 3,000,000,000"):
        PairBatches(pairs, batch_tokens=3_000_000_000, boundaries=(4,), seed=0)
    with pytest.raises(DataError, match=r"at most the 30 tokens .* got 3,000,000,000 \(1,000,000,000 × 3\)"):
        TextBatches(np.arange(30), batch_size=1_000_000_000, length=3, seed=0)
    assert PairBatches(pairs, batch_tokens=4096, boundaries=(4,), seed=0).shapes == ((1024, 4),)


def test_what_is_written_or_translated_is_refused_where_there_is_no_room(tiny, tmp_path, monkeypatch):
    assert (host.memory() or 2**30) > 2**20
    monkeypatch.setattr(host, "memory", lambda: 100_000)  # a token of this run: 64 bytes
    status, _, err = call("sample", tiny, "--tokens", 10_000)
    assert status == 2 and "[sampling]" in err and "Make sampling.tokens smaller." in err
    assert call("sample", tiny, "--tokens", 5)[0] == 0
    (tmp_path / "tiny.toml").write_text(TINY)
    status, _, err = call(tmp_path / "tiny.toml", "decoding.beams=3", "--runs", tmp_path / "runs")
    assert status == 2 and "[decoding]" in err and "Make decoding.batch or decoding.beams smaller." in err
    status, _, err = call(tmp_path / "tiny.toml", "decoding.batch=1", "--runs", tmp_path / "runs")
    assert status == 2 and "[model]" in err and "Make model.d_model" in err  # which decoding has room for now
    assert not (tmp_path / "runs").exists()


def test_the_examples_of_a_batch_are_named():
    pairs = PairBatches([([5], [7])] * 3, batch_tokens=6, boundaries=(2,), seed=0)
    batch = next(iter(pairs.iterate(pairs.position(0))))
    assert (
        pairs.examples(0) == f"the training pairs {', '.join(map(str, sorted(batch.index.tolist())))} (counted from 0)"
    )
    text = TextBatches(np.arange(30), batch_size=2, length=3, seed=0)
    starts = sorted(next(iter(text.iterate((0, 4))))[:, 0].tolist())  # a token is its place here
    assert f"begin at the training tokens {starts[0]}, {starts[1]} (" in text.examples(4)


def test_a_word_too_long_for_bpe_is_refused_at_once():
    with pytest.raises(
        DataError, match=r"at most 20,000 characters .* text 2 of 2 has one of 1,000,000 that begins 'xxx"
    ):
        vocabulary.train(["short", "a " + "x" * 1_000_000], vocabulary.Config(size=300))
    vocabulary.train(["some words " * 5000], vocabulary.Config(size=300))


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_a_vocabulary_that_fails_only_at_encode_is_refused_when_it_is_read(tmp_path, kind):
    file = tmp_path / "vocabulary.json"
    vocabulary.train(["a b c"], vocabulary.Config(kind=kind)).save(file)
    text = file.read_text()
    vocabulary.load(file)
    file.write_text(text.replace('"unk_token": "<unk>"', '"unk_token": "<unj>"'))
    with pytest.raises(DataError, match=r"vocabulary\.json: the file is damaged"):
        vocabulary.load(file)


def test_half_a_character_in_a_page_is_written_as_a_replacement(tmp_path):
    from mhajax.report.page import Page

    page = Page("half \ud83d of a pair")
    page.section("words").text("more \udc00")
    text = page.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "half \ufffd of a pair" in text and "more \ufffd" in text


def test_a_syntax_error_in_a_long_line_shows_the_part_around_it(tmp_path):
    file = tmp_path / "long.toml"
    file.write_text(f'x = "{"a" * 5000}" oops "{"b" * 5000}"\n')
    with pytest.raises(ConfigError) as error:
        toml.load(file)
    shown = str(error.value).splitlines()
    assert max(map(len, shown[1:])) < 120 and "oops" in shown[1]
    assert shown[1][shown[2].index("^")] == "o"
