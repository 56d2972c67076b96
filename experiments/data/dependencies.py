"""Sentences with gold dependency trees, from files in the format CoNLL-U.

A word here is what is written between spaces and punctuation. Where the trees see several syntactic words in one
written word (German "am" is "an" and "dem"), each of their arcs is one of the written word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.data import fetch, files
from experiments.errors import DataError

Language = Literal["en", "de"]


@dataclass(frozen=True)
class Treebanks:
    """The same 1,000 sentences in English and German with gold trees (Parallel Universal Dependencies).

    Attributes:
      root: folder of the data; None: $MHAJAX_DATA, else the folder that `fetch` writes to.
    """

    root: str | None = None


class Arc(NamedTuple):
    """A word, the word that it depends on, both as places in the sentence, and how ("nsubj", "nmod:poss")."""

    dependent: int
    head: int
    relation: str


class Sentence(NamedTuple):
    """A sentence and its tree.

    Attributes:
      text: as it is written.
      spans: of each word, where it begins and ends in the text.
      arcs: from words to the words they depend on; neither those of the root nor those inside a written word.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    arcs: tuple[Arc, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """What is written."""
        return tuple(self.text[start:end] for start, end in self.spans)


def path(data: Treebanks, language: Language) -> Path:
    """The file of a language.

    Raises:
      DataError: it is not there.
    """
    return fetch.locate("ud", data.root) / f"{language}_pud-ud-test.conllu"


def read(file: Path) -> list[Sentence]:
    """All sentences of a CoNLL-U file.

    Raises:
      DataError: the file cannot be read, or a line is not what the format asks for.
    """
    sentences, block = list[Sentence](), list[tuple[int, list[str]]]()
    for number, line in enumerate([*files.read_lines(file), ""], start=1):
        if not line.strip():
            if block:
                sentences.append(_sentence(file, block))
            block = []
        elif not line.startswith("#"):
            cells = line.split("\t")
            if len(cells) != 10:
                raise DataError(f"{file}, line {number}: a word must have 10 columns between tabs, got {len(cells)}.")
            block.append((number, cells))
    if not sentences:
        raise DataError(f"{file}: there is no sentence in it.")
    return sentences


def _sentence(file: Path, lines: Iterable[tuple[int, list[str]]]) -> Sentence:
    text, spans = "", list[tuple[int, int]]()
    place = dict[int, int]()  # syntactic word -> written word
    depends = list[tuple[int, int, str, str]]()
    inside = 0  # the last syntactic word of the written word that was read last
    for number, (name, form, *_, head, relation, _, other) in lines:
        if "." in name:  # a word that is not written
            continue
        first, _, last = name.partition("-")
        if not (first.isdecimal() and (not last or last.isdecimal())):
            raise DataError(
                f"{file}, line {number}: a word must begin with its number, such as 7 or 7-8, got {name!r}."
            )
        if int(first) > inside:
            spans.append((len(text), len(text) + len(form)))
            text += form if "SpaceAfter=No" in other.split("|") else f"{form} "
            inside = int(last or first)
        if not last:
            place[int(first)] = len(spans) - 1
            depends.append((number, int(first), head, relation))
    arcs = []
    for number, dependent, head, relation in depends:
        if head == "0":
            continue
        if not head.isdecimal() or int(head) not in place:
            raise DataError(f"{file}, line {number}: the head must be 0 or a word of the sentence, got {head!r}.")
        arc = Arc(place[dependent], place[int(head)], relation)
        if arc.dependent != arc.head:
            arcs.append(arc)
    return Sentence(text.rstrip(), tuple(spans), tuple(arcs))
