"""The committed scoreboard: configs, JSON, table and picture agree, and each verdict follows from its numbers."""

import json
import tomllib
from pathlib import Path

import pytest

from experiments import claims, config, kinds
from experiments.studies import board

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/claims"
BOARD = json.loads((FOLDER / "claims.json").read_text(encoding="utf-8"))
ROWS = BOARD["claims"]
STUDIES = claims.every_study(ROOT / "configs")
# The rules of these three are applied to more than a result holds; their own tests apply them to planted numbers.
RULES_ELSEWHERE = {"lm_heads", "syntax", "word_sense"}


def test_every_study_has_its_rows_and_every_row_its_study():
    asked = [str(Path(path).relative_to(ROOT)) for path in STUDIES]
    assert list(dict.fromkeys(row["config"] for row in ROWS)) == asked
    assert {row["word"] for row in ROWS} <= {"supported", "refuted", "not resolved"}  # each of them was run
    assert all(
        row["seconds"] > 0 and row["said"] and row["date"] and row["command"].endswith(row["config"]) for row in ROWS
    )
    assert all(BOARD[name] for name in ("python", "packages", "machine"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: Path(path).stem)
def test_a_row_is_of_the_config_that_is_there_and_its_verdict_follows(path):
    text = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    rows = [row for row in ROWS if row["config"] == str(Path(path).relative_to(ROOT))]
    again = "it was changed since; python -m experiments claims --to docs/claims runs it again"
    assert {row["asked"] for row in rows} == {claims.fingerprint(text)} and rows[0]["said"] == text["said"], again
    result = json.loads((FOLDER / rows[0]["result"]).read_text(encoding="utf-8"))
    told = [(row["claim"], row["word"], row["because"]) for row in rows]
    assert told == [(one["claim"], one["word"], one["because"]) for one in result["verdicts"]]
    assert not result.get("quick") and {row["seconds"] for row in rows} == {round(result["seconds"])}
    study = kinds.STUDIES[text["kind"]]
    if text["kind"] not in RULES_ELSEWHERE:
        assert [tuple(one) for one in study.judge(config.read(path, []), result)] == told
    assert list((FOLDER / rows[0]["result"]).parent.glob("*.svg"))


def test_the_table_and_the_picture_show_the_same():
    assert (FOLDER / "claims.md").read_text(encoding="utf-8") == claims.markdown(ROWS)
    shown = (FOLDER / "claims.svg").read_text(encoding="utf-8")
    assert f'aria-label="{claims._title(ROWS)}"' in shown  # how many of each verdict
    drawing = board.draw([(row["said"], row["claim"], row["word"]) for row in ROWS], claims._title(ROWS))
    drawn = [text.get_text() for text in drawing.figure.texts]
    assert [word for word in drawn if word in claims.COLOURS] == [row["word"] for row in ROWS]
