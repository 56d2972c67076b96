"""What a config file may hold: one dataclass per experiment, made of the library's own configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments import schema, toml
from experiments.data import corpora, paths, vocabulary
from experiments.errors import ConfigError
from experiments.studies import lm_heads, syntax, word_sense
from mhajax import decoding, language_model, training, translator


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The table [batches] of a translation.

    Attributes:
      tokens: target tokens per batch, padding included.
      boundaries: lengths to which sentences are padded; each costs one compilation. Longer pairs are left out of
        training (and counted), never out of evaluation.
    """

    tokens: int = 4096
    boundaries: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}.")
        if not self.boundaries or any(a >= b for a, b in zip((0, *self.boundaries), self.boundaries, strict=False)):
            raise ValueError(
                f"boundaries must be positive and ascending, such as [16, 32, 64], got {list(self.boundaries)}."
            )
        if self.boundaries[-1] > self.tokens:
            raise ValueError(
                f"tokens must be at least the last of boundaries, got tokens={self.tokens} and "
                f"boundaries={list(self.boundaries)}; a batch would hold no sentence."
            )


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The table [decoding] of a translation.

    Attributes:
      beams: 1 is greedy.
      length_penalty: exponent of the length normalisation, see `mhajax.decoding.beam_search`.
      batch: sentences at a time.
      validation_sentences: how many of the validation sentences are translated (greedily) at each evaluation; their
        BLEU decides which parameters are best.
    """

    beams: int = 4
    length_penalty: float = 1.0
    batch: int = 100
    validation_sentences: int = 300

    def __post_init__(self):
        for name in ("beams", "batch", "validation_sentences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, most in (("beams", 1_000), ("batch", 1_000_000)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name):,}.")
        if abs(self.length_penalty) > 10:
            raise ValueError(f"length_penalty must be in [-10, 10], got {self.length_penalty}.")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The table [heads]: the report about the heads, report.html in the run's folder.

    Attributes:
      report: make it at the end of the run; `python -m experiments heads RUN` makes it at any time.
      sentences: how many held-out sentences (or windows of a text) are measured.
      shown: how many of them can be looked at, with every head.
    """

    report: bool = False
    sentences: int = 200
    shown: int = 8

    def __post_init__(self):
        for name, least in (("sentences", 4), ("shown", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Translation:
    """`kind = "translation"`: train a translator, report BLEU and chrF, show its heads.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: of the data only the first sentences are used, and everything says so. Left out: all of it.
      data: the sentence pairs; a table of one of these kinds.
      vocabulary: how text becomes numbers.
      batches: how many sentences are taken at a time.
      model: the shape of the translator.
      training: how it is trained.
      decoding: how it translates.
      heads: the report about its heads.
    """

    kind: Literal["translation"] = "translation"
    quick: bool | None = None
    data: corpora.Grammar | corpora.Multi30k | corpora.ParallelFiles = corpora.Grammar()
    vocabulary: vocabulary.Config = vocabulary.Config()
    batches: Batches = Batches()
    model: translator.Config
    training: training.Config = training.Config()
    decoding: Decoding = Decoding()
    heads: Heads = Heads()


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The table [batches] of a language model.

    Attributes:
      size: windows per batch.
      length: tokens per window.
    """

    size: int = 16
    length: int = 128

    def __post_init__(self):
        for name in ("size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The table [sampling] of a language model: the text that is printed at the end.

    Attributes:
      prompt: what it goes on from.
      tokens: how much of it.
      temperature: below 1 safer, above 1 wilder; 0 is greedy: always the likeliest token.
      top_k: only so many of the likeliest tokens may come; left out: all.
      top_p: only the likeliest tokens that together have this probability may come; 1: all.
    """

    prompt: str = "\n"
    tokens: int = 300
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not self.prompt:
            raise ValueError('prompt must not be empty; a line break is written "\\n".')
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}.")
        if self.tokens > 1_000_000:
            raise ValueError(f"tokens must be at most 1,000,000, got {self.tokens:,}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0 (0 is greedy), got {self.temperature}.")
        if self.temperature and not decoding.COLDEST <= self.temperature <= decoding.HOTTEST:
            raise ValueError(
                f"temperature must be 0 (greedy) or in [{decoding.COLDEST}, {decoding.HOTTEST}], "
                f"got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")


@dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """`kind = "language_model"`: train a language model, report its validation loss, print a sample.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: of the text only the beginning is used, and everything says so. Left out: all of it.
      data: the text; a table of one of these kinds.
      vocabulary: how text becomes numbers.
      batches: how much text is taken at a time.
      model: the shape of the language model.
      training: how it is trained.
      sampling: the text that it writes at the end.
      heads: the report about its heads.
    """

    kind: Literal["language_model"] = "language_model"
    quick: bool | None = None
    data: corpora.Shakespeare | corpora.TextFile
    vocabulary: vocabulary.Config = field(default_factory=lambda: vocabulary.Config(kind="characters"))
    batches: Windows = Windows()
    model: language_model.Config
    training: training.Config = training.Config()
    sampling: Sampling = Sampling()
    heads: Heads = Heads(sentences=32)


Training = Translation | LanguageModelling
Experiment = Training | lm_heads.Config | syntax.Config | word_sense.Config
LARGEST = 2**31 - 1  # what an int32 holds, and every number here becomes one somewhere


def read(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The config in a file, with overrides such as `model.num_heads=8`.

    Relative paths of data are those of the config's folder or, if they are not there, of the current one; in an
    override it is the other way round. In the config that is returned they are absolute.

    Raises:
      ConfigError: the file cannot be read, is not TOML, or does not fit the experiment that its `kind` names.
      DataError: a file of data is in neither folder.
    """
    config = schema.read(path, Experiment, overrides)
    if isinstance(config, Training) and config.model.vocab_size is not None:
        raise ConfigError(
            f"{path}: model.vocab_size must be left out, got {config.model.vocab_size}: it is that of the vocabulary; "
            "set vocabulary.size."
        )
    _check_numbers(config, str(path), "")
    _check_paths(config.data, str(path))
    return dataclasses.replace(config, data=paths.absolute(config.data, Path(path).parent, overrides))


def _check_numbers(part: Any, where: str, table: str) -> None:
    """Refuse a whole number that a compiled program cannot count with."""
    for field_ in dataclasses.fields(part):
        value, key = getattr(part, field_.name), f"{table}{field_.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _check_numbers(value, where, f"{key}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -LARGEST - 1 <= number <= LARGEST:
                raise ConfigError(
                    f"{where}: {key} must be between {-LARGEST - 1:,} and {LARGEST:,}, got {toml.show(number)}."
                )


def _check_paths(data: Any, where: str) -> None:
    """Refuse text in [data] that can be no path."""
    for field_ in dataclasses.fields(data):
        value = getattr(data, field_.name)
        if isinstance(value, str):
            names = value.encode("utf-8", "surrogatepass")
            if b"\0" in names:
                raise ConfigError(f"{where}: data.{field_.name} must be a path without a NUL character, "
                                  f"got {toml.show(value)}.")  # fmt: skip
            if len(names) > 4000 or any(len(name) > 255 for name in names.split(b"/")):
                raise ConfigError(f"{where}: data.{field_.name} must be a path of at most 4,000 bytes whose every name "
                                  f"has at most 255, got {toml.show(value)} of {len(names):,}.")  # fmt: skip
