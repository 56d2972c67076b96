"""What is asked of the heads, and how often they are right, sentence by sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from experiments.data.dependencies import Sentence
from experiments.studies.syntax.words import Answers, Pieces

Direction = Literal["to the head", "to the dependent"]
DIRECTIONS: tuple[Direction, ...] = ("to the head", "to the dependent")
NEVER = ("punct", "root")  # no relations between words


class Question(NamedTuple):
    """A relation, and which of its two words is asked for the other."""

    relation: str
    direction: Direction


class Asked(NamedTuple):
    """What is asked of a sentence: by words, for words that would be right.

    Attributes:
      right: bool [R, W, W + 1]: whether the second word is a right answer of the first to a question. The last place is
        no word, and never right.
      asks: bool [R, W]: who has a right answer.
    """

    right: np.ndarray
    asks: np.ndarray


class Counts(NamedTuple):
    """What the heads of a model did.

    Attributes:
      hits: right answers, [R, S, L, N].
      ordered: words that look that many words away, [S, L, N, O].
    """

    hits: np.ndarray
    ordered: np.ndarray


class Baseline(NamedTuple):
    """What does not depend on a model.

    Attributes:
      asked: questions, [R, S].
      by_offset: right answers of a fixed offset, [R, S, O].
      places: words of which that offset stays inside the sentence (and is seen), [S, O].
    """

    asked: np.ndarray
    by_offset: np.ndarray
    places: np.ndarray


def distances(reach: int, causal: bool) -> np.ndarray:
    """Fixed offsets of the answer, in words, without the word itself; of a causal model only those before it."""
    both = np.array([*range(-reach, 0), *range(1, reach + 1)])
    return both[both < 0] if causal else both


def questions(sentences: Sequence[Sentence], instances: int) -> list[Question]:
    """The relations with so many arcs or more, most of them first, each in both directions. Subtypes are their own."""
    arcs = Counter(arc.relation for sentence in sentences for arc in sentence.arcs)
    names = [name for name, count in arcs.most_common() if count >= instances and name not in NEVER]
    return [Question(name, direction) for name in names for direction in DIRECTIONS]


def asked(sentence: Sentence, read: Pieces, wanted: Sequence[Question], causal: bool) -> Asked:
    """What is asked of a sentence, of words that the model has read, and for words that it can see."""
    size = len(sentence.spans)
    right = np.zeros((len(wanted), size, size + 1), bool)
    place = {question: number for number, question in enumerate(wanted)}
    for arc in sentence.arcs:
        for direction, (query, key) in zip(
            DIRECTIONS, ((arc.dependent, arc.head), (arc.head, arc.dependent)), strict=True
        ):
            number = place.get(Question(arc.relation, direction))
            if number is not None and {query, key} <= set(read.word) and (key < query or not causal):
                right[number, query, key] = True
    return Asked(right, right.any(-1))


def baseline(every: Sequence[Asked], offsets: np.ndarray) -> Baseline:
    """How many questions there are, and what fixed offsets get right."""
    by_offset = np.zeros((len(every[0].asks), len(every), len(offsets)))
    places = np.zeros((len(every), len(offsets)))
    for number, one in enumerate(every):
        size = one.asks.shape[1]
        for column, offset in enumerate(offsets):
            by_offset[:, number, column] = np.trace(one.right[..., :size], offset, 1, 2)
            places[number, column] = max(size - abs(offset), 0)
    return Baseline(np.stack([one.asks.sum(-1) for one in every], 1), by_offset, places)


def count(answers: Iterable[tuple[int, Answers]], every: Sequence[Asked], offsets: np.ndarray) -> Counts:
    """How often each head is right.

    Args:
      answers: of all sentences, in any order.
      every: what is asked of each sentence.
      offsets: from `distances`.
    """
    hits, ordered = dict[int, np.ndarray](), dict[int, np.ndarray]()
    for number, found in answers:
        right = every[number].right
        places = np.arange(right.shape[1])
        hits[number] = right[:, places, found.other].sum(-1, dtype=np.int32)  # [R, L, N]; -1 is the last place
        away = np.where(found.any < 0, 0, found.any - places)
        ordered[number] = (away[..., None] == offsets).sum(-2, dtype=np.int32)  # [L, N, O]
    numbers = range(len(every))
    return Counts(np.stack([hits[n] for n in numbers], 1), np.stack([ordered[n] for n in numbers]))
