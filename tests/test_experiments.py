"""The command line from end to end on tiny settings: what it prints, what it writes, and how it fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from experiment_runs import REPOSITORY, TINY, TINY_TEXT, call
from tiers import tiered

pytestmark = pytest.mark.usefixtures("quick_compiles", "compiled_once")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compiles, compiled_once):
    """A finished tiny translation: its result, its folder, its config."""
    folder = tmp_path_factory.mktemp("translation")
    config = folder / "tiny.toml"
    config.write_text(TINY)
    status, out, err = call(config, "--runs", folder / "runs", "--json", "--tensorboard")
    assert status == 0, err
    (run,) = (folder / "runs").iterdir()
    return json.loads(out.splitlines()[-1]), run, config


@pytest.mark.slow
def test_the_result_has_its_keys_and_is_the_file(finished):
    result, run, _ = finished
    wanted = {"bleu", "chrf", "bleu_signature", "seconds", "tokens_per_second", "parameters", "seeds"}
    assert wanted <= set(result)
    assert json.loads((run / "result.json").read_text()) == result
    assert set(result["tests"]) == {"test", "generalisation"}
    assert result["tests"]["test"]["sentences"] == 14
    assert "nrefs:1" in result["bleu_signature"]


@pytest.mark.slow
def test_the_run_folder_has_everything(finished):
    _, run, _ = finished
    assert run.name.startswith("tiny-")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_bleu" in line] == [6, 12]
    environment = json.loads((run / "environment.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", environment["data_sha256"]["train"])
    assert environment["packages"]["jax"]
    for name in ("training", "cross_attention"):
        for ending in ("svg", "pdf", "png", "csv"):
            assert (run / "figures" / f"{name}.{ending}").stat().st_size > 100
    assert list((run / "tensorboard").iterdir())
    translations = (run / "translations.test.tsv").read_text().splitlines()
    assert len(translations) == 15


@pytest.mark.slow
def test_every_head_is_measured_with_interval_and_baseline(finished):
    heads = finished[0]["heads"]
    assert len(heads) == 2 * 1 + 2 * 2 + 2 * 2
    for head in heads:
        for measure in head["measures"].values():
            assert None in measure.values() or measure["low"] <= measure["value"] <= measure["high"]
    cross = next(head for head in heads if head["attention"] == "cross")
    assert 0 < cross["measures"]["word written → its source"]["baseline"] < 1


@pytest.mark.slow
def test_the_heads_of_a_run_are_reported(finished):
    _, run, _ = finished
    status, out, err = call("heads", run, "--json", "--sentences", 6, "--shown", 2)
    assert status == 0, err
    numbers = json.loads(out)
    assert numbers == json.loads((run / "heads.json").read_text())
    assert numbers["sentences"] == 6 and len(numbers["heads"]) == 10
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "What the heads of tiny-" in page and "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert (run / "figures" / "heads" / "pruning.csv").stat().st_size > 100
    assert call("heads", run, "--sentences", 1)[0] == 2


@pytest.mark.parametrize("kind", tiered(["text_run", "finished"], "text_run"))
def test_a_finished_run_is_reported_again_without_training(kind, request):
    result, run, *_ = request.getfixturevalue(kind)
    again = [run.parent.parent / "tiny.toml", "--runs", run.parent] if kind == "text_run" else [run]
    status, out, err = call(*again, "--json")
    assert status == 0 and "already trained" in err
    assert json.loads(out) == result


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
def test_lines_are_translated(finished, beams):
    _, run, _ = finished
    status, out, _ = call(
        "translate", run, "--beams", beams, stdin="the dog sees my cat .\n\n" + "my cat sleeps .\n" * 7
    )
    assert status == 0
    lines = out.split("\n")
    assert len(lines) == 10 and lines[1] == "" and lines[9] == "" and len(set(lines[2:9])) == 1
    assert call("translate", run, stdin="")[:2] == (0, "")


@pytest.mark.slow
def test_words_that_the_run_does_not_know_are_told(finished, monkeypatch):
    from experiments import translating

    monkeypatch.setattr(translating, "Translator", lambda *_: lambda params, lines, beams: ["translated"] * len(lines))
    status, out, err = call("translate", finished[1], stdin="my cat sleeps .\nthe zebra sees a [unicorn] .\n")
    told = " ".join(err.split())
    assert (status, out) == (0, "translated\n" * 2)
    assert re.search(r"warning: line 2: 'zebra', '\[unicorn\]' not among the \d+ words that this run knows", told), err
    assert "line 1" not in told


def test_a_changed_config_is_another_run(text_run):
    from experiments import run as running

    _, run = text_run
    config = run.parent.parent / "tiny.toml"
    _, folder = running.load(str(config), ["model.d_ff=24"], str(run.parent))
    assert folder != run
    _, folder = running.load(str(config), ["training.seed=0"], str(run.parent))  # the default, spelled out
    assert folder == run


def everything(folder):
    """Every file of a folder but the lock and the time it took: name → content."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in ("lock", "times.json"))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.d_model=24", "training.steps=13"], ["another config"]),
        (["data.validation_share=0.5", "training.steps=11"], ["began with other data", "validation"]),
        (["vocabulary.size=300", "training.steps=14"], ["[vocabulary]", "size=300"]),
        (["training.steps=5"], ["training.steps=5", "8 batches"]),
    ],
)
def test_going_on_with_what_does_not_fit_is_refused_and_leaves_nothing(text_run, overrides, parts):
    _, run = text_run
    before = everything(run.parent)
    status, _, err = call(run, *overrides)
    assert status == 2 and "Traceback" not in err, err
    for part in parts:
        assert part in err
    assert everything(run.parent) == before


def test_a_config_that_was_edited_in_the_run_folder_is_refused(text_run, tmp_path):
    copy = shutil.copytree(text_run[1], tmp_path / "copy")
    text = (copy / "config.toml").read_text()
    assert "tokens = 9" in text
    (copy / "config.toml").write_text(text.replace("tokens = 9", "tokens = 8"))
    for command in ([copy], ["sample", copy]):
        status, _, err = call(*command)
        assert status == 2 and "config.toml" in err and "key=value" in err and "Traceback" not in err


def test_files_of_the_same_name_are_told_apart(tmp_path):
    from experiments.data import corpora

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for side in ("x", "y"):
            (tmp_path / folder / side).write_text(f"{folder} {side}\n" * 9)
    names = {f"{part}_{side}": str(tmp_path / folder / file) for part, folder in (("train", "a"), ("test", "b"))
             for side, file in (("source", "x"), ("target", "y"))}  # fmt: skip
    hashes = corpora.parallel(corpora.ParallelFiles(**names, hold_out=2)).hashes
    assert len(hashes) == len(set(hashes.values())) == 5  # and what is held out for validation


@pytest.mark.slow
def test_several_seeds_are_one_run_with_a_spread(tmp_path):
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    status, out, err = call(config, "training.seeds=2", "training.steps=4", "--runs", tmp_path, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["seeds"] == 2
    for name in ("bleu", "chrf"):
        assert np.isclose(result[name], np.mean(result[f"{name}_by_seed"]), atol=1e-3)
        assert np.isclose(result[f"{name}_sd"], np.std(result[f"{name}_by_seed"], ddof=1), atol=2e-3)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, quick_compiles, compiled_once):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("a rose is a rose is a rose.\n" * 40)
    (folder / "tiny.toml").write_text(TINY_TEXT.format(path=folder / "text.txt"))
    status, out, err = call(folder / "tiny.toml", "--runs", folder / "runs", "--json")
    assert status == 0, err
    (run,) = (folder / "runs").iterdir()
    return json.loads(out), run


def test_any_text_file_trains_a_language_model(text_run):
    result, run = text_run
    assert {"validation_loss", "seconds", "tokens_per_second", "parameters"} <= set(result)
    assert result["sample"].startswith("a") and len(result["sample"]) == 10
    assert 0 < result["validation_loss"] < 4


@pytest.mark.slow
def test_a_language_model_writes(text_run):
    _, run = text_run
    status, out, _ = call("sample", run, "--prompt", "rose", "--tokens", "5")
    assert status == 0 and out.startswith("rose") and len(out) == len("rose") + 5 + 1
    again = call("sample", run, "--prompt", "rose", "--tokens", "5")[1]
    assert again == out


@pytest.mark.slow
def test_a_run_continued_for_longer_is_a_run_of_its_own(text_run, tmp_path):
    _, run = text_run
    copy = shutil.copytree(run, tmp_path / run.name)
    times = json.loads((copy / "times.json").read_text())
    times[-1]["seconds"] += 1000  # which no run of this test takes
    (copy / "times.json").write_text(json.dumps(times))
    before = everything(copy)
    status, _, err = call(copy, "training.steps=10", "--json")
    assert status == 0 and "going on after batch 8 of 10" in err, err
    (longer,) = tmp_path.glob(f"{run.name}+*")
    result = json.loads((longer / "result.json").read_text())
    assert result["steps"] == 10 and result["seconds"] > 1000
    assert (result["continued_from"]["run"], result["continued_from"]["step"]) == (run.name, 8)
    lines = [json.loads(line) for line in (longer / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert everything(copy) == before  # nothing of what was finished changes
    from experiments import run as running

    assert running.load(str(copy), ["training.steps=10"], "")[1] == longer  # the same command finds the same run
    assert running.load(str(copy), ["training.steps=8"], "")[1] == copy  # and what changes nothing the first


@pytest.mark.slow
def test_any_pair_of_files_trains_a_translator(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"one {i} two\n" for i in range(60)))
    (tmp_path / "b.txt").write_text("".join(f"zwei {i} eins\n" for i in range(60)))
    config = tmp_path / "mine.toml"
    data = f'kind = "files"\ntrain_source = "{tmp_path}/a.txt"\ntrain_target = "{tmp_path}/b.txt"\nhold_out = 5\n'
    text = re.sub(
        r'kind = "grammar".*?\[vocabulary\]\nkind = "words"', f"{data}[vocabulary]\nsize = 300", TINY, flags=re.S
    )
    config.write_text(text)
    status, out, err = call(config, "training.steps=3", "--runs", tmp_path, "--json")
    assert status == 0, err
    assert json.loads(out)["tests"]["test"]["sentences"] == 5


def _bytes_of(run):
    """What must not depend on how often a run was killed."""
    from experiments import run as running
    from mhajax import training

    config, folder = running.load_run(str(run))
    task = running.prepare(config, folder)
    state = training.init(task.init_params, training.optimizer(config.training), config.training)
    checkpoints = training.Checkpoints(run / "checkpoints")
    state, best = checkpoints.restore(state), checkpoints.best(state.evaluated)
    checkpoints.close()
    import jax

    arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state, best))]
    result = json.loads((run / "result.json").read_text())
    for timing in ("seconds", "tokens_per_second"):
        del result[timing]
    return arrays, (run / "metrics.jsonl").read_bytes(), result


def _start(config, runs):
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_DISABLE_MOST_OPTIMIZATIONS="true")
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", str(config), "--runs", str(runs)],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _wait_for_step(runs, step, process):
    """Wait until the metrics of a run have reached a step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        for file in runs.glob("*/metrics.jsonl"):
            if any(json.loads(line)["step"] >= step for line in file.read_text().splitlines() if line.endswith("}")):
                return
        time.sleep(0.02)
    raise AssertionError(f"the run never reached step {step}: {process.communicate()[0]}")


KILLED = [("text_run", [3]), ("finished", [5, 9])]


@pytest.mark.parametrize(("kind", "steps"), tiered(KILLED, KILLED[0]))
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(kind, steps, request, tmp_path):
    _, whole, *_ = request.getfixturevalue(kind)
    config = whole.parent.parent / "tiny.toml"
    for step in steps:  # after a checkpoint, between two others; each time somewhere in a step
        process = _start(config, tmp_path)
        _wait_for_step(tmp_path, step, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    (run,) = tmp_path.iterdir()
    assert not (run / "result.json").exists()
    status, _, err = call(config, "--runs", tmp_path)
    assert status == 0, err
    assert _bytes_of(run) == _bytes_of(whole)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(text_run, tmp_path):
    _, whole = text_run
    config = whole.parent.parent / "tiny.toml"
    process = _start(config, tmp_path)
    _wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert "the state is saved" in output and "same command" in output and "Traceback" not in output
    (run,) = tmp_path.iterdir()
    status, _, err = call(config, "--runs", tmp_path)
    assert status == 0, err
    assert _bytes_of(run) == _bytes_of(whole)


@pytest.mark.slow
def test_commands_of_the_other_kind_of_run_are_refused(finished, text_run):
    status, _, err = call("sample", finished[1])
    assert status == 2 and "translate" in err
    status, _, err = call("translate", text_run[1])
    assert status == 2 and "sample" in err
