"""What the best parameters of a finished run write: translations, or text."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import config as configs
from experiments import finished, language_modelling, translating, translation, work
from experiments.data.vocabulary import Vocabulary
from experiments.errors import UserError
from experiments.run import load_run
from experiments.task import seeds_of


def translate(
    path: str | Path, sentences: Sequence[str], *, beams: int | None = None, console: Console | None = None
) -> list[str]:
    """Translations of sentences by the best parameters (of the first seed) of an earlier run; empty lines stay empty.

    Args:
      path: the folder of the run.
      sentences: one sentence each.
      beams: other than the config's; 1 is greedy.
      console: where a person is told of words that the run does not know, and how far it is; None for nowhere.
    """
    config, folder = load_run(path)
    if not isinstance(config, translation.Config):
        raise UserError(f"{folder}: this run is a {config.kind}, not a translation; use: sample {folder}")
    model, words, params = finished.parameters(config, folder)
    wanted = [sentence for sentence in sentences if sentence.strip()]
    translator = translating.Translator(model, words, config.decoding, config.batches.boundaries)
    for number, sentence in enumerate(sentences, start=1):
        _warn(console, f"line {number}", words.unknown(sentence), words)
    with contextlib.nullcontext() if console is None else work.shown_on(console):
        outputs = iter(translator(seeds_of(params)[0], wanted, beams=beams) if wanted else [])
    return [next(outputs) if sentence.strip() else "" for sentence in sentences]


def _warn(console: Console | None, where: str, unknown: list[str], words: Vocabulary) -> None:
    """Tell of what a vocabulary does not know, which a model reads as one and the same unknown token."""
    if console is not None and unknown:
        listed = ", ".join(map(repr, unknown[:8])) + (" …" if len(unknown) > 8 else "")
        of = f"the {words.size:,} {words.unit}s that this run knows"
        console.print(f"warning: {where}: {listed} not among {of}", style="yellow", highlight=False, markup=False)


def sample(path: str | Path, seed: int = 0, *, console: Console | None = None, **changes: Any) -> str:
    """Text by the best parameters (of the first seed) of an earlier run.

    Args:
      path: the folder of the run.
      seed: another seed, another text.
      console: where a person is told of characters or words that the run does not know; None for nowhere.
      **changes: to the config's [sampling].
    """
    config, folder = load_run(path)
    if not isinstance(config, language_modelling.Config):
        raise UserError(f"{folder}: this run is a {config.kind}, not a language model; use: translate {folder}")
    if not 0 <= seed <= configs.LARGEST:
        raise UserError(
            f"sample: seed must be between 0 and {configs.LARGEST:,}, got {seed}; others are the same again."
        )
    try:
        sampling = dataclasses.replace(config.sampling, **changes)
    except ValueError as error:
        raise UserError(f"sample: {error}") from None
    model, words, params = finished.parameters(config, folder)
    if not words.encode(sampling.prompt):
        raise UserError(f"sample: the prompt {sampling.prompt!r} has no token in this run's vocabulary; give another.")
    _warn(console, "the prompt", words.unknown(sampling.prompt), words)
    with contextlib.nullcontext() if console is None else work.shown_on(console):
        return language_modelling.write_sample(model, words, seeds_of(params)[0], sampling, seed)
