"""Which data a config asks for, and the sentences or the text that it names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.data import fetch, files, grammar
from experiments.errors import DataError

Sentences = list[tuple[str, str]]


@dataclass(frozen=True)
class Grammar(grammar.Config):
    """The generated bilingual grammar; nothing to download.

    Attributes:
      train, validation, test, generalisation: number of sentence pairs.
      seed: of the generator.
    """

    kind: Literal["grammar"] = "grammar"


@dataclass(frozen=True)
class Multi30k:
    """29,000 image descriptions, English and German (Elliott et al. 2016).

    Attributes:
      root: folder of the data; None: $MHAJAX_DATA, else the folder that `fetch` writes to.
      source, target: "en" and "de", or the reverse.
    """

    kind: Literal["multi30k"] = "multi30k"
    root: str | None = None
    source: Literal["en", "de"] = "en"
    target: Literal["en", "de"] = "de"

    def __post_init__(self):
        if self.source == self.target:
            raise ValueError(f"source and target must differ, got source={self.source!r} and target={self.target!r}.")


@dataclass(frozen=True)
class ParallelFiles:
    """Any two text files, plain or .gz, with one sentence a line; line i of one translates line i of the other.

    Attributes:
      train_source, train_target: to learn from.
      validation_source, validation_target: to choose the best parameters by; None: the last `hold_out` training pairs
        before those of the test.
      test_source, test_target: to report on; None: the last `hold_out` training pairs.
      hold_out: pairs taken from the end of the training files for each part that is not given; left out: a tenth of
        them, at most 500.
    """

    train_source: str
    train_target: str
    validation_source: str | None = None
    validation_target: str | None = None
    test_source: str | None = None
    test_target: str | None = None
    hold_out: int | None = None
    kind: Literal["files"] = "files"

    def __post_init__(self):
        for name in ("validation", "test"):
            if (getattr(self, f"{name}_source") is None) != (getattr(self, f"{name}_target") is None):
                raise ValueError(f"{name}_source and {name}_target must be given together, or neither.")
        if self.hold_out is not None and self.hold_out < 1:
            raise ValueError(f"hold_out must be at least 1, got {self.hold_out}.")


@dataclass(frozen=True)
class Shakespeare:
    """1.1 MB of plays (Karpathy 2015), the last tenth for validation.

    Attributes:
      root: folder of the data; None: $MHAJAX_DATA, else the folder that `fetch` writes to.
    """

    kind: Literal["shakespeare"] = "shakespeare"
    root: str | None = None


@dataclass(frozen=True)
class TextFile:
    """Any text file, plain or .gz.

    Attributes:
      path: the file.
      validation_share: share of the characters, from the end, for validation.
    """

    path: str
    validation_share: float = 0.1
    kind: Literal["text"] = "text"

    def __post_init__(self):
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}.")


class ParallelCorpus(NamedTuple):
    """Sentence pairs, (source, target).

    Attributes:
      train, validation: to learn from, to choose by.
      tests: name → pairs to report on; the first is the main one.
      hashes: file (or part) → SHA-256 of its content.
      gold: name of a test → its annotations, where they are known.
    """

    train: Sentences
    validation: Sentences
    tests: dict[str, Sentences]
    hashes: dict[str, str]
    gold: dict[str, tuple[grammar.Pair, ...]]


class TextCorpus(NamedTuple):
    """Running text."""

    train: str
    validation: str
    hashes: dict[str, str]


@singledispatch
def parallel(data) -> ParallelCorpus:
    """The sentence pairs that a config's [data] names.

    Raises:
      DataError: a file is missing or cannot be used.
    """
    raise TypeError(f"corpora.parallel: no sentence pairs in {type(data).__name__}.")


@parallel.register
def _(data: Grammar) -> ParallelCorpus:
    splits = grammar.splits(data)
    for name in ("train", "validation", "test"):
        if not getattr(splits, name):
            raise DataError(f"data.{name} must be at least 1 sentence pair to run this experiment, got 0.")
    pairs = {name: list(zip(*grammar.parallel_text(part), strict=True)) for name, part in splits._asdict().items()}
    gold = {name: getattr(splits, name) for name in ("test", "generalisation") if pairs[name]}
    return ParallelCorpus(
        pairs["train"],
        pairs["validation"],
        {name: pairs[name] for name in gold},
        {name: _hash_lines(part) for name, part in pairs.items()},
        gold,
    )


@parallel.register
def _(data: Multi30k) -> ParallelCorpus:
    folder = fetch.locate("multi30k", data.root)
    read = _Reader()
    parts = {
        name: read.pairs(name, folder / f"{name}.{data.source}.gz", folder / f"{name}.{data.target}.gz")
        for name in ("train", "val", "test_2016_flickr", "test_2017_flickr")
    }
    train, validation = parts.pop("train"), parts.pop("val")
    return ParallelCorpus(train, validation, parts, read.hashes, {})


@parallel.register
def _(data: ParallelFiles) -> ParallelCorpus:
    read = _Reader()
    train = read.pairs("train", Path(data.train_source), Path(data.train_target))
    hold_out = min(500, max(1, len(train) // 10)) if data.hold_out is None else data.hold_out
    held_out = {}
    for name in ("test", "validation"):
        source, target = getattr(data, f"{name}_source"), getattr(data, f"{name}_target")
        if source is not None and target is not None:
            held_out[name] = read.pairs(name, Path(source), Path(target))
        else:
            train, held_out[name] = train[:-hold_out], train[-hold_out:]
            read.hashes[name] = _hash_lines(held_out[name])
    if not train:
        raise DataError(
            f"{data.train_source}: no sentence is left to train on after data.hold_out={hold_out} were taken for "
            "validation or test; give more text, a smaller data.hold_out, or files of their own for those."
        )
    return ParallelCorpus(train, held_out["validation"], {"test": held_out["test"]}, read.hashes, {})


@singledispatch
def text(data) -> TextCorpus:
    """The running text that a config's [data] names.

    Raises:
      DataError: a file is missing or cannot be used.
    """
    raise TypeError(f"corpora.text: no running text in {type(data).__name__}.")


@text.register
def _(data: Shakespeare) -> TextCorpus:
    return text(TextFile(str(fetch.locate("tinyshakespeare", data.root) / "input.txt")))


@text.register
def _(data: Grammar) -> TextCorpus:
    """The sentences that a translator would read, one a line."""
    pairs = parallel(data)
    train, validation = ("\n".join(source for source, _ in part) for part in (pairs.train, pairs.validation))
    return TextCorpus(train, validation, {name: pairs.hashes[name] for name in ("train", "validation")})


@text.register
def _(data: TextFile) -> TextCorpus:
    whole = files.read_text(data.path)
    cut = round(len(whole) * (1 - data.validation_share))
    hashes = {Path(data.path).name: files.sha256(data.path), "validation": _hash(whole[cut:])}
    return TextCorpus(whole[:cut], whole[cut:], hashes)


class _Reader:
    """Reads pairs of files and remembers what they contained."""

    def __init__(self):
        self.hashes: dict[str, str] = {}

    def pairs(self, part: str, source: Path, target: Path) -> Sentences:
        for side, path in (("source", source), ("target", target)):
            self.hashes[f"{part} {side}: {path.name}"] = files.sha256(path) if path.is_file() else ""
        return files.read_parallel(source, target)


def _hash_lines(pairs: Iterable[tuple[str, str]]) -> str:
    return _hash("".join(f"{source}\t{target}\n" for source, target in pairs))


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
