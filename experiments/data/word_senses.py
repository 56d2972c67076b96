"""Sentences with an ambiguous word and its sense: CoarseWSD-20, three of its words.

References:
  Loureiro et al. 2021, "Analysis and Evaluation of Language Models for Word Sense Disambiguation", section 3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.data import fetch, files
from experiments.errors import DataError

WORDS = ("bank", "spring", "crane")
_FOLDER = "CoarseWSD-20_balanced"  # as many training sentences of every sense; tests as they are distributed


@dataclass(frozen=True)
class CoarseWSD:
    """Sentences of Wikipedia with bank, spring or crane, and which sense it has (Loureiro et al. 2021).

    Attributes:
      words: which of the ambiguous words, any of bank, spring, crane.
      root: folder of the data; None: $MHAJAX_DATA, else the folder that `fetch` writes to.
    """

    words: tuple[str, ...] = WORDS
    root: str | None = None
    kind: Literal["coarsewsd20"] = "coarsewsd20"

    def __post_init__(self):
        if not self.words or len(set(self.words)) < len(self.words) or not set(self.words) <= set(WORDS):
            raise ValueError(f"words must be different ones of {', '.join(WORDS)}, got {list(self.words)}.")


class Sentence(NamedTuple):
    """A sentence in words.

    Attributes:
      words: as the data separates them, lower case.
      target: index of the ambiguous one.
      sense: number of its sense.
    """

    words: tuple[str, ...]
    target: int
    sense: int


class Word(NamedTuple):
    """An ambiguous word.

    Attributes:
      name: the word.
      senses: what each number of a sense means.
      train, test: sentences with it.
    """

    name: str
    senses: tuple[str, ...]
    train: tuple[Sentence, ...]
    test: tuple[Sentence, ...]


def read(data: CoarseWSD) -> list[Word]:
    """The words that a config names.

    Raises:
      DataError: files are missing, or do not hold what they should.
    """
    folder = fetch.locate("coarsewsd20", data.root) / _FOLDER
    return [_word(name, folder / name) for name in data.words]


def hashes(data: CoarseWSD) -> dict[str, str]:
    """SHA-256 of every file that `read` reads.

    Raises:
      DataError: files are missing.
    """
    folder = fetch.locate("coarsewsd20", data.root) / _FOLDER
    names = [f"{part}.{kind}.txt" for part in ("train", "test") for kind in ("data", "gold")]
    return {f"{word}/{name}": files.sha256(folder / word / name) for word in data.words for name in names}


def _word(name: str, folder: Path) -> Word:
    try:
        named = json.loads((folder / "classes_map.txt").read_text(encoding="utf-8"))
        senses = tuple(_meaning(name, named[str(number)]) for number in range(len(named)))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{folder / 'classes_map.txt'}: must name the senses 0, 1, … ({error}).") from None
    return Word(name, senses, *(_sentences(folder, part, len(senses)) for part in ("train", "test")))


def _meaning(word: str, name: str) -> str:
    """bank_bank_(geography) is "geography", bank_bank is "bank"."""
    return name.removeprefix(f"{word}_").removeprefix(f"{word}_").strip("()")


def _sentences(folder: Path, part: str, senses: int) -> tuple[Sentence, ...]:
    path = folder / f"{part}.data.txt"
    lines = files.read_text(path).removesuffix("\n").split("\n")
    gold = files.read_text(folder / f"{part}.gold.txt").split()
    if len(lines) != len(gold):
        raise DataError(f"{path}: has {len(lines)} sentences, and {len(gold)} senses are in {part}.gold.txt.")
    found = []
    for number, (line, sense) in enumerate(zip(lines, gold, strict=True), 1):
        index, _, text = line.partition("\t")
        words = tuple(text.split())
        if not (index.isdecimal() and sense.isdecimal() and int(index) < len(words) and int(sense) < senses):
            raise DataError(
                f"{path}, line {number}: must be the index of a word, a tab and the words, with a sense below {senses} "
                f"in {part}.gold.txt; got {line[:60]!r} and {sense!r}."
            )
        found.append(Sentence(words, int(index), int(sense)))
    return tuple(found)
