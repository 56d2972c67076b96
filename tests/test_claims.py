"""The scoreboard: what every study says, in one table; what is there is not run again, what fails is told."""

import json
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import pytest
from rich.console import Console

from experiments import claims, kinds
from experiments.__main__ import main
from experiments.errors import DataError
from experiments.studies import Answer, Verdict
from mhajax.report.page import Page


@dataclass(frozen=True, kw_only=True)
class Config:
    """`kind = "asked"`: a study whose answer stands in its config."""

    kind: Literal["asked"] = "asked"
    quick: bool | None = None
    word: Literal["supported", "refuted", "not resolved"]
    missing: bool = False


@pytest.fixture
def study(monkeypatch):
    """A kind of study, and how often it was answered."""
    answered = []

    def answer(config, train):
        answered.append(config.word)
        if config.missing:
            raise DataError("the data are not here; fetch them")
        verdicts = (
            Verdict(f"It is {config.word}.", config.word, "[model] 1 | 2"),
            Verdict("And more.", "refuted", "3"),
        )
        page = Page("Asked", "Answered.")
        page.section("All").text("All.")
        return Answer(verdicts, {"number": 1.5}, page, {})

    module = ModuleType("asked")
    vars(module).update(Config=Config, answer=answer, shrink=lambda config: config, hashes=lambda config: {})
    monkeypatch.setitem(kinds.STUDIES, "asked", module)
    return answered


def test_every_study_is_run_once_and_told(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/more").mkdir(parents=True)
    (tmp_path / "configs/a.toml").write_text('kind = "asked"\nword = "supported"\n')
    (tmp_path / "configs/more/b.toml").write_text('kind = "asked"\nword = "not resolved"\nmissing = true\n')
    (tmp_path / "configs/training.toml").write_text('kind = "language_model"\n')
    (tmp_path / "configs/broken.toml").write_text("kind = ")
    assert main(["claims", "--show"]) == 0 and study == []
    assert {row["word"] for row in json.loads((tmp_path / "runs/claims.json").read_text())["claims"]} == {"not run"}
    for _ in range(2):
        assert main(["claims"]) == 0
    assert study == ["supported", "not resolved", "not resolved"]  # what has an answer is not asked again
    board = json.loads((tmp_path / "runs/claims.json").read_text())
    assert [(row["config"], row["word"]) for row in board["claims"]] == [
        ("configs/a.toml", "supported"), ("configs/a.toml", "refuted"), ("configs/more/b.toml", "not run")
    ]  # fmt: skip
    assert "fetch them" in board["claims"][2]["because"] and board["packages"]["jax"] and board["claims"][0]["date"]
    lines = (tmp_path / "runs/claims.md").read_text().splitlines()
    assert len(lines) == 5 and "| It is supported. | **supported** | [model] 1 \\| 2 |" in lines[2]
    assert "3 claims about heads: 1 supported, 1 refuted, 1 not run" in (tmp_path / "runs/claims.svg").read_text()
    # beside the scoreboard, the result and the figures; and what was asked, so that a changed config shows
    assert main(["claims", "--show", "--to", "board"]) == 0
    board = json.loads((tmp_path / "board/claims.json").read_text())["claims"]
    assert json.loads((tmp_path / "board" / board[0]["result"]).read_text())["number"] == 1.5
    assert board[0]["asked"] == claims.fingerprint({"kind": "asked", "word": "supported", "said": "It is."})
    assert str(tmp_path) not in (tmp_path / "board/claims.json").read_text()
    assert "`python -m experiments configs/a.toml`" in lines[2]
    shown = capsys.readouterr().out
    assert "It is supported." in shown and shown.count("[model] 1 | 2") >= 2  # where it is run, and in the table


def test_what_answers_no_claim_is_said_to(study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["claims"]) == 2 and "no study under configs/" in capsys.readouterr().err
    (tmp_path / "lm.toml").write_text(
        'kind = "language_model"\n[data]\nkind = "shakespeare"\n[model]\nd_model = 8\nnum_heads = 1\nnum_layers = 1\n'
    )
    (row,) = claims.rows_of("lm.toml", "runs", Console(quiet=True), show=True, quick=False)
    assert row["word"] == "not run" and "claims are answered by studies" in row["because"]
