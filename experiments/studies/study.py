"""What a study is to the command line: a question from a config, an answer in a run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

from rich.console import Console
from rich.markup import escape

from experiments import environment, schema
from experiments import folder as folders
from experiments.errors import ConfigError
from experiments.folder import CONFIG, ENVIRONMENT, REPORT, RESULT, write
from experiments.task import Task
from mhajax.figures import Drawing
from mhajax.report.page import Page

Word = Literal["supported", "refuted", "not resolved"]
COLOURS = {"supported": "green", "refuted": "red", "not resolved": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the Config of every study has.

    Attributes:
      said: the claim in the words of whoever made it, for the scoreboard.
    """

    said: str = ""


class Verdict(NamedTuple):
    """What was asked, and what came out, by the rule that the study's module states.

    Attributes:
      claim: a sentence that may be false.
      word: "supported", "refuted" or "not resolved".
      because: the numbers that decide it, in a sentence.
    """

    claim: str
    word: Word
    because: str


class Answer(NamedTuple):
    """What a study found.

    Attributes:
      verdicts: one for each claim.
      numbers: for result.json: every number that the page shows.
      page: for a reader.
      drawings: the figures by name, for figures/.
    """

    verdicts: tuple[Verdict, ...]
    numbers: dict[str, Any]
    page: Page
    drawings: dict[str, Drawing]


class Models(NamedTuple):
    """What a training made, for a study that asks its models.

    Attributes:
      task: of the training.
      params: its best parameters [seeds, ...].
      first_seed: the seed of the first of them.
      attentions: of the model's functions: parameters of one seed → {kind: attention.Params}.
    """

    task: Task
    params: Any
    first_seed: int
    attentions: Callable[[Any], dict[str, Any]]


class Train(Protocol):
    """How a study trains: every arm is a run of its own, and one that is finished is not trained again."""

    def __call__(self, path: str, lines: Sequence[str], name: str) -> dict[str, Any]:
        """The result of a config with other values; `name` is for whoever watches."""
        ...

    def models(self, path: str, lines: Sequence[str], name: str) -> Models:
        """The models of a config with other values, trained if they are not there yet."""
        ...

    def cost(self, elapsed: float) -> float:
        """What a study of so many seconds would have taken if none of its trainings had been there already."""
        ...

    def check(self, path: str, lines: Sequence[str]) -> None:
        """Raise a ConfigError or DataError unless this is the config of a training."""
        ...


def run(study: ModuleType, config: Any, folder: Path, console: Console, train: Train) -> dict[str, Any]:
    """Answer the question of a config, and write config, environment, figures, report and result to its folder.

    A study that has a result is shown again; delete result.json to have it measured anew.

    Args:
      study: the module of its kind, see `experiments.kinds`.
      config: its Config.
      folder: of the run, which is this process's.
      console: where a person reads.
      train: how it trains, if it does.

    Returns:
      What stands in result.json.

    Raises:
      ConfigError: the folder is of another config.
      DataError: data or a model is missing, damaged, or other than when the study began.
    """
    from mhajax import figures

    text = schema.to_toml(config)
    if (folder / CONFIG).is_file() and (folder / CONFIG).read_text(encoding="utf-8") != text:
        raise ConfigError(f"{folder}: this is the run of another config; choose another folder with --runs.")
    hashes = study.hashes(config)
    environment.same_data(folder, hashes)
    if (folder / RESULT).is_file():
        result = folders.read_json(folder / RESULT, "verdicts")
        _show(result, folder, console)
        return result
    if config.quick:
        console.print("[bold]a quick look[/bold]: very little data; its numbers mean nothing")
    write(folder / CONFIG, text)
    write(folder / ENVIRONMENT, json.dumps(environment.describe(hashes, folder), indent=2) + "\n")
    began = time.perf_counter()
    answer: Answer = study.answer(config, train)
    for name, drawing in answer.drawings.items():
        figures.save(drawing, folder / "figures" / name)
    answer.page.save(folder / REPORT)
    result = folders.plain({
        "kind": config.kind,
        **({"quick": True} if config.quick else {}),
        "verdicts": [verdict._asdict() for verdict in answer.verdicts],
        **answer.numbers,
        "seconds": train.cost(time.perf_counter() - began),
    })  # fmt: skip
    write(folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _show(result, folder, console)
    return result


def _show(result: dict[str, Any], folder: Path, console: Console) -> None:
    for verdict in result["verdicts"]:
        colour = COLOURS.get(verdict["word"], "white")
        claim, because = escape(verdict["claim"]), escape(verdict["because"])
        console.print(f"[bold {colour}]{verdict['word']}[/]  {claim}", soft_wrap=True, highlight=False)
        console.print(f"    {because}", style="dim", soft_wrap=True, highlight=False)
    console.print(f"{result['seconds']:.0f} s · the report is {folder / REPORT}", highlight=False, soft_wrap=True)
