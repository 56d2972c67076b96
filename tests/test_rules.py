"""The numbers by which "auto" decides: read from a file, refused if wrong, measured by `bench tune`."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from experiments import bench
from experiments.bench import attention, case, timing, tune
from experiments.errors import UserError
from mhajax import kernels, masks
from mhajax.kernels import rules
from mhajax.kernels.rules import BUILT_IN, Rules

OTHER = Rules(few_logits=7, keys_at_once=40, tile_tokens=64, masked_tile_tokens=32, tile_logits=2**13)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(rules, "_used", None)
    monkeypatch.delenv(rules.VARIABLE, raising=False)


@pytest.fixture
def file(tmp_path):
    rules.write(tmp_path / "found.toml", OTHER, """a CPU's name, "quoted\"""")
    return tmp_path / "found.toml"


def test_a_file_comes_back_and_is_used_where_it_is_named(file, monkeypatch):
    assert rules.current() == BUILT_IN and rules.read(file) == OTHER
    assert rules.use(file) == BUILT_IN and rules.current() == OTHER
    with rules.using(BUILT_IN):
        assert rules.current() == BUILT_IN
    assert rules.current() == OTHER
    monkeypatch.setattr(rules, "_used", None)  # as in a process that begins
    monkeypatch.setenv(rules.VARIABLE, str(file))
    assert rules.current() == OTHER


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("few_logit = 3", ["found.toml", "few_logits", "'few_logit'", "bench tune"]),
        ("tile_tokens = 0", ["found.toml", "tile_tokens must be at least 1, got 0"]),
        ("tile_tokens = 1.5", ["found.toml", "tile_tokens must be an integer", "1.5"]),
        ("tile_tokens = ", ["found.toml cannot be read", "line 1", "bench tune"]),
    ],
)
def test_what_is_no_rule_is_refused(file, line, parts):
    file.write_text(line + f'\njax = "{jax.__version__}"\n')
    with pytest.raises(ValueError) as error:
        rules.use(file)
    for part in parts:
        assert part in str(error.value)
    assert rules.current() == BUILT_IN
    with pytest.raises(ValueError, match=r"nowhere.toml cannot be read"):
        rules.use(file.parent / "nowhere.toml")


def test_another_jax_is_told(file):
    file.write_text(file.read_text().replace(f'jax = "{jax.__version__}"', 'jax = "0.1"'))
    with pytest.warns(UserWarning, match=r"measured with jax 0.1, this is jax .*: measure again"):
        assert rules.read(file) == OTHER


def test_they_decide_what_is_taken_and_change_no_number():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 48, 4))
    places = {"queries": masks.tokens(48), "keys": masks.tokens(48)}
    attend = lambda: kernels.attend(q, k, v, mask=masks.causal(), **places)[0]  # noqa: E731
    expected = attend()
    assert kernels.explain(q, k, v, mask=masks.causal()).kernel == "dense"
    with rules.using(OTHER):
        chosen = kernels.explain(q, k, v, mask=masks.causal())
        assert chosen.kernel == "blockwise" and chosen.tiling == (2, 24, 24) and not chosen.values_at_once
        assert kernels.explain(q, k, v).tiling == (2, 48, 48)
        few = (a[:, :, :40] for a in (q, k, v))
        assert kernels.explain(*few, platform="cpu").values_at_once == 2
        np.testing.assert_allclose(attend(), expected, rtol=0, atol=1e-6)


def test_tuning_takes_what_is_quickest_and_keeps_what_is_not_clearly_slower(monkeypatch):
    seconds = {256: 1.0, 512: 2.0, 1024: 0.99}  # by the queries of the tile that is chosen

    def prepare(asked):
        rows = int(attention.choice(asked).split("tiles of ")[1].split()[0])
        return case.Ready(lambda: rows, lambda: [])

    def interleave(programs, budget):
        assert len(programs) == 3
        return {name: np.full(3, seconds[call()]) for name, call in programs.items()}, np.ones(3)

    monkeypatch.setattr(timing, "interleave", interleave)
    cases = tuple(attention.of_shapes("tune", [(1, 2048, 2048, 8, 64)]))[:1]
    question = tune.Question("tile_tokens", (256, 1024), cases)
    found = tune.answer(question, BUILT_IN, 0.0, prepare)
    assert found.taken == 1024 and found.ratios == pytest.approx({256: 0.5, 512: 1.0, 1024: 0.495})
    seconds[256] = seconds[1024] = 1.97
    assert tune.answer(question, BUILT_IN, 0.0, prepare).taken == 512


def test_every_number_is_asked_for_on_cases_that_it_decides():
    fields = {field.name for field in dataclasses.fields(Rules)}
    assert {question.name for question in tune.questions()} == fields
    for question in tune.questions():
        for asked in question.cases:
            found = set()
            for candidate in question.candidates:
                with rules.using(dataclasses.replace(Rules(keys_at_once=512), **{question.name: candidate})):
                    found.add(attention.choice(asked))
            assert len(found) > 1, (question.name, asked.title)


def test_the_command_writes_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    small = tuple(attention.of_shapes("tune", [(1, 8, 8, 2, 4)]))[:1]
    monkeypatch.setattr(tune, "questions", lambda: (tune.Question("few_logits", (100,), small),))
    monkeypatch.setattr(attention, "HEADS", 2)
    assert bench.command(["tune", str(tmp_path / "mine.toml"), "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "few_logits" in out and f"export MHAJAX_RULES={tmp_path}/mine.toml" in out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rules.read(tmp_path / "mine.toml").tile_tokens == BUILT_IN.tile_tokens
    with pytest.raises(UserError, match="nowhere/mine.toml cannot be written"):
        bench.command(["tune", str(tmp_path / "nowhere" / "mine.toml")])
    with pytest.raises(UserError, match="has options of its own"):
        bench.command(["--json", "tune"])


def test_a_run_says_by_what_was_decided_and_refuses_a_file_that_is_wrong(monkeypatch, tmp_path):
    from experiments import environment

    rules.use(OTHER)
    assert environment.describe({}, tmp_path)["kernel_rules"] == dataclasses.asdict(OTHER)
    monkeypatch.setattr(rules, "_used", None)
    monkeypatch.setenv(rules.VARIABLE, str(tmp_path / "gone.toml"))
    with pytest.raises(UserError, match=r"gone.toml cannot be read"):
        environment.describe({}, tmp_path)
