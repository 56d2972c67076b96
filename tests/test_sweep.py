"""A study of arms: its rule on numbers whose answer is known, its page, and arms that are not trained twice."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from experiments import run, studies
from experiments.errors import ConfigError
from experiments.studies import paired, sweep
from experiments.studies.sweep import rules
from experiments.studies.sweep.rules import Trained
from mhajax import training

ARMS = (
    sweep.Arm("four heads", ("model.num_heads=4",)),
    sweep.Arm("one head", ("model.num_heads=1",)),
    sweep.Arm("none", (), control=True),
)
CONFIG = sweep.Config(
    question="Are four heads better than one?", claim="Four heads have a lower loss than one.",
    base=sweep.Base("base.toml", ("training.steps=3",)), arms=ARMS, tuned=("training.learning_rate=1e-3",
    "training.learning_rate=1e-2"),
)  # fmt: skip


class Trainer:
    """Results by formula: the loss falls with heads, and is lowest for the rate 1e-2."""

    def __init__(self, gain=0.1, noise=0.01):
        self.asked, self._gain, self._noise = [], gain, noise

    def models(self, path, lines, name) -> studies.Models:
        raise AssertionError("a sweep asks no models")

    def cost(self, elapsed):
        return elapsed

    def check(self, path, lines):
        if "model.num_heads=3" in lines:
            raise ConfigError("d_model must be a multiple of num_heads")

    def __call__(self, path, lines, name):
        if "training.learning_rate=9.0" in lines:
            raise training.NonFinite("the loss is not finite", 3)
        self.asked.append((name, tuple(lines)))
        heads = int(next((line[-1] for line in lines if "num_heads" in line), "1"))
        seeds = int(next(line[-1] for line in lines if "seeds" in line))
        values = 2 - self._gain * np.log2(heads) + 0.1 * ("training.learning_rate=1e-3" in lines)
        values = values + 0.3 * np.arange(seeds) + self._noise * np.random.default_rng(heads).normal(size=seeds)
        by_seed = {"validation_loss_by_seed": values.tolist()} if seeds > 1 else {}
        return {"validation_loss": float(values.mean()), **by_seed, "parameters": 100 * heads, "seconds": 2.0}


def test_the_verdict_follows_from_the_seeds_by_the_rule():
    train = Trainer()
    answer = sweep.answer(CONFIG, train)
    (verdict,) = answer.verdicts
    assert verdict.word == "supported" and verdict.because.startswith("ahead of “one head” by 0.2")
    assert sweep.answer(CONFIG, Trainer(gain=-0.1)).verdicts[0].word == "refuted"
    open_ = sweep.answer(CONFIG, Trainer(gain=0.002, noise=0.05)).verdicts[0]
    assert open_.word == "not resolved" and "seeds would resolve" in open_.because
    # every arm is tuned with one seed for each line, then trained with the best, which is tried for all alike
    assert [name for name, _ in train.asked[:3]] == [
        "four heads, training.learning_rate=1e-3", "four heads, training.learning_rate=1e-2", "four heads"
    ]  # fmt: skip
    assert train.asked[2][1] == (
        "training.steps=3", "model.num_heads=4", "training.learning_rate=1e-2", "training.seeds=5"
    )  # fmt: skip
    html = answer.page.html()
    for shown in ("Are four heads better than one?", "one head", "none (control)", "Supported", "more of them on that"):
        assert shown in html
    result = json.loads(json.dumps(answer.numbers, allow_nan=False))
    assert sweep.judge(CONFIG, result) == answer.verdicts


def test_what_all_seeds_share_is_no_noise_and_the_margin_counts():
    arms = [Trained("a", False, (), [1.0, 2.0, 3.1], {}, 1, 0.0), Trained("b", False, (), [1.5, 2.5, 3.5], {}, 1, 0.0)]
    (found,) = rules.compare(arms, "lower", 0.0)
    np.testing.assert_allclose(found.ahead.value, (0.5 + 0.5 + 0.4) / 3)
    assert paired.verdict("c", [found]).word == "supported"
    assert paired.verdict("c", rules.compare(arms, "lower", 1.0)).word == "refuted"
    assert paired.verdict("c", rules.compare(arms, "higher", 0.0)).word == "refuted"


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_the_interval_is_students_whatever_the_range_of_the_numbers(shift):
    """Numbers between 0 and 1 are differences like others, and no shares."""
    values = np.array([0.02, 0.05, 0.03, 0.06]) + shift
    found = paired.over_seeds(values, 0.0, 0.95)
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    np.testing.assert_allclose([found.value, found.low, found.high], [values.mean(), low, high], rtol=1e-12)
    same = paired.over_seeds(np.zeros(4), 0.0, 0.95)
    assert same.low == same.high == 0


def test_several_comparisons_are_paid_for():
    """The interval of one of three comparisons is Student's of 1 - 0.05/3."""
    values = np.array([1.0, 2.0, 4.0, 3.0])
    arms = [Trained(name, False, (), (values + shift).tolist() if shift else [0.0] * 4, {}, 1, 0.0)
            for name, shift in (("a", 0), ("b", 1), ("c", 2), ("d", 3))]  # fmt: skip
    one = rules.compare(arms[:2], "lower", 0.0)[0].ahead
    three = rules.compare(arms, "lower", 0.0)[0].ahead
    assert three.value == one.value and three.low < one.low and three.high > one.high


def test_a_setting_that_diverges_is_no_candidate():
    lines = ("training.learning_rate=9.0", "training.learning_rate=1e-3")
    answer = sweep.answer(dataclasses.replace(CONFIG, tuned=lines), Trainer())
    assert answer.numbers["arms"][0]["tried"] == {lines[0]: None, lines[1]: pytest.approx(1.9, abs=0.05)}
    assert answer.numbers["arms"][0]["lines"][-1] == lines[1]
    with pytest.raises(ConfigError, match="arm 'four heads': with none of the lines"):
        sweep.answer(dataclasses.replace(CONFIG, tuned=lines[:1]), Trainer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ARMS[:1]}, "two or more of different names"),
        ({"arms": (ARMS[2], *ARMS[:2])}, "claimed one and no control"),
        ({"seeds": 2}, "at least 3"),
        ({"margin": -1.0}, "at least 0"),
    ],
)
def test_what_has_no_answer_is_refused(changes, message):
    given = {name: getattr(CONFIG, name) for name in ("question", "claim", "base", "arms")}
    with pytest.raises(ValueError, match=message):
        sweep.Config(**(given | changes))


def test_arms_are_read_before_any_is_trained_and_a_measure_must_be_there():
    train = Trainer()
    bad = sweep.Config(
        question="?", claim="!", base=CONFIG.base, arms=(ARMS[0], sweep.Arm("bad", ("model.num_heads=3",)))
    )
    with pytest.raises(ConfigError, match="arm 'bad': d_model must be a multiple"):
        sweep.answer(bad, train)
    assert train.asked == []
    other = sweep.Config(question="?", claim="!", base=CONFIG.base, arms=ARMS, measure="bleu")
    with pytest.raises(ConfigError, match="numbers? of the arms' results .*validation_loss.* got 'bleu'"):
        sweep.answer(other, train)


def test_an_arm_that_is_finished_is_not_trained_again(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a rose is a rose. " * 200)
    (tmp_path / "base.toml").write_text(
        'kind = "language_model"\n[data]\nkind = "text"\npath = "text.txt"\n'
        "[model]\nd_model = 8\nnum_heads = 2\nnum_layers = 1\n"
    )
    trained = []

    def train(config, folder, console):
        trained.append(config.model.num_heads)
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(run.schema.to_toml(config))
        result = {"validation_loss": 1.0, "validation_loss_by_seed": [1.0, 1.1, 1.3], "seconds": 1.0, "parameters": 9}
        (folder / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(run, "run", train)
    arms = run.Arms(tmp_path / "runs", Console(quiet=True), small=False)
    base = str(tmp_path / "base.toml")
    for _ in range(2):
        for heads in (1, 2):
            found = arms(base, [f"model.num_heads={heads}", "training.seeds=3"], "arm")
            assert found["parameters"] == 9
    assert trained == [1, 2]
    with pytest.raises(ConfigError, match="head_dim must be even"):
        arms.check(base, ["model.num_heads=8"])


def test_a_study_of_a_config_file_is_written_to_its_folder(tmp_path):
    (tmp_path / "base.toml").write_text("")
    text = 'kind = "sweep"\nquestion = "Q"\nclaim = "C."\n[base]\npath = "base.toml"\n'
    text += "".join(f'[[arms]]\nname = "{n}"\nset = ["model.num_heads={n}"]\n' for n in (4, 1))
    (tmp_path / "mine.toml").write_text(text)
    config, folder = run.load(str(tmp_path / "mine.toml"), [], str(tmp_path / "runs"))
    assert Path(config.base.path) == tmp_path / "base.toml"
    folder.mkdir(parents=True)
    result = studies.run(sweep, config, folder, Console(quiet=True), Trainer())
    assert result["verdicts"][0]["word"] == "supported" and (folder / "report.html").is_file()
    assert [arm["name"] for arm in result["arms"]] == ["4", "1"]
    again = studies.run(sweep, config, folder, Console(quiet=True), None)  # pyright: ignore[reportArgumentType]
    assert again == json.loads((folder / "result.json").read_text())
