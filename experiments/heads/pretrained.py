"""The report about the heads of a pretrained model: `python -m experiments heads FOLDER_OR_FILE --text FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import folder as folders
from experiments import heads, work
from experiments.data import files
from experiments.errors import DataError, UserError
from experiments.folder import HEADS, REPORT, write
from experiments.heads import held_out
from experiments.studies import models
from mhajax import encoder, report
from mhajax.pretrained import Pretrained
from mhajax.report import text as texts

ROWS = 4  # windows that are computed together


def examine(
    name: str, text: str, runs: str | Path, console: Console, *, windows: int, length: int, shown: int
) -> dict[str, Any]:
    """Measure the heads of a pretrained model on a text: writes report.html, heads.json and figures to a new folder.

    The untrained model of the report is the same one with the numbers of every array in another order.

    Args:
      name: "minilm", "smollm2", or a file or folder.
      text: a text file; its beginning is read.
      runs: where the folder is made.
      console: where a person reads.
      windows: how many windows of the text are measured.
      length: tokens of a window.
      shown: how many of them can be looked at.

    Returns:
      What stands in heads.json.

    Raises:
      DataError: the model or the text is missing or cannot be read.
      UserError: for a model that predicts no tokens.
    """
    from mhajax import figures

    loaded = models.load(name)
    hidden = hidden_token(name, loaded)
    content = files.read_text(text)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise DataError(f"{name}: there is no tokenizer beside the model; heads reads a text.")
    ids = np.asarray(tokenizer.encode(content[: 16 * windows * length], add_special_tokens=False).ids, np.int32)
    held_out.check_room(len(ids), length)
    read = texts.Text(
        ids[: windows * length + 1], length, ROWS, "token",
        lambda some: [tokenizer.decode([one]) for one in some], tokenizer.decode,
        f"windows of {Path(text).name}",
    )  # fmt: skip
    stem = f"heads-{Path(name).stem}"
    settings = json.dumps([name, models.digest(name), text, windows, length])
    folder = Path(runs) / folders.name(stem, settings)
    with folders.opened(folder), work.shown_on(console):
        console.print(f"[dim]folder[/dim] {folder}", highlight=False, soft_wrap=True)
        found = report.examine(
            texts.make_subject(loaded.model, loaded.config, read, hidden),
            [loaded.params], [models.shuffled(loaded.params)],
            name=Path(name).stem, shown=shown, progress=heads.progress,
        )  # fmt: skip
        for drawing_name, drawing in found.drawings.items():
            figures.save(drawing, folder / "figures" / "heads" / drawing_name)
        write(folder / HEADS, json.dumps(found.numbers, indent=1, ensure_ascii=False) + "\n")
        found.page.save(folder / REPORT)
        write(folder / "config.toml", f"# heads of {name} on {text}\n")
    console.print(f"the report about the heads is {folder / REPORT}, its numbers are {folder / HEADS}", soft_wrap=True)
    return found.numbers


def hidden_token(name: str, loaded: Pretrained) -> int | None:
    """The token that hides others, of an encoder; None of a model that predicts what comes next.

    Raises:
      UserError: an encoder that predicts no tokens.
      DataError: its tokenizer has no such token.
    """
    if loaded.model is not encoder:
        return None
    if loaded.params.head is None:
        raise UserError(
            f"{name}: this encoder has no head that predicts tokens, so there is no loss to lose; its attention is "
            "asked by configs/bank.toml and configs/syntax.toml."
        )
    found = loaded.tokenizer and (loaded.tokenizer.token_to_id("[MASK]") or loaded.tokenizer.token_to_id("<mask>"))
    if not found:
        raise DataError(f"{name}: the tokenizer has no token that hides others, [MASK] or <mask>.")
    return int(found)
