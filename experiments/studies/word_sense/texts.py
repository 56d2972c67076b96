"""From words to the tokens of a model, with where each word is; words left out and words moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiments.data.word_senses import Sentence

PLACES = ("first", "before", "after", "last")  # where a word is moved to; "before" and "after" touch the ambiguous one


class Text(NamedTuple):
    """A sentence as a model reads it.

    Attributes:
      tokens: of the model.
      spans: first and last + 1 of the tokens of every word.
      target: index of the ambiguous word.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    target: int


class Spelling:
    """How a tokenizer writes words, each by itself, with a space before it.

    Args:
      tokenizer: of the model.
      causal: whether a token sees only those before it. Then a text ends with the ambiguous word: the vector of that
        word is the same, and half of the work is saved.
    """

    def __init__(self, tokenizer: Any, causal: bool):
        self.tokenizer, self.causal = tokenizer, causal
        self._known: dict[str, list[int]] = {}
        alone, framed = self.pieces("a"), list(tokenizer.encode(" a").ids)
        start = next(at for at in range(len(framed)) if framed[at : at + len(alone)] == alone)
        self._before, self._after = framed[:start], framed[start + len(alone) :]

    def pieces(self, word: str) -> list[int]:
        """The tokens of one word."""
        if word not in self._known:
            self._known[word] = list(self.tokenizer.encode(f" {word}", add_special_tokens=False).ids)
        return self._known[word]

    def text(self, sentence: Sentence) -> Text:
        """A sentence as the model reads it."""
        words = sentence.words[: sentence.target + 1] if self.causal else sentence.words
        tokens, spans = list(self._before), []
        for word in words:
            pieces = self.pieces(word)
            spans.append((len(tokens), len(tokens) + len(pieces)))
            tokens += pieces
        return Text(tokens if self.causal else tokens + self._after, spans, sentence.target)

    def others(self, sentence: Sentence) -> list[int]:
        """Which words besides the ambiguous one the model sees at that one."""
        end = sentence.target if self.causal else len(sentence.words)
        return [index for index in range(end) if index != sentence.target]


def crop(sentence: Sentence, reach: int) -> Sentence:
    """The sentence with at most `reach` words on either side of the ambiguous one."""
    start = max(sentence.target - reach, 0)
    words = sentence.words[start : sentence.target + reach + 1]
    return Sentence(words, sentence.target - start, sentence.sense)


def without(sentence: Sentence, index: int) -> Sentence:
    """The sentence with a word left out."""
    words = sentence.words[:index] + sentence.words[index + 1 :]
    return Sentence(words, sentence.target - (index < sentence.target), sentence.sense)


def moved(sentence: Sentence, index: int, place: str) -> Sentence:
    """The sentence with one of its words, not the ambiguous one, in another place.

    >>> moved(Sentence(("we", "fish", "near", "a", "bank", "."), 4, 1), 1, "before")
    Sentence(words=('we', 'near', 'a', 'fish', 'bank', '.'), target=4, sense=1)
    """
    rest = without(sentence, index)
    at = {"first": 0, "before": rest.target, "after": rest.target + 1, "last": len(rest.words)}[place]
    words = (*rest.words[:at], sentence.words[index], *rest.words[at:])
    return Sentence(words, rest.target + (at <= rest.target), sentence.sense)


def balanced(sentences: Sequence[Sentence], per_sense: int, order: Iterable[int]) -> list[int]:
    """Which sentences are taken, so that every sense has at most so many; the first ones in a given order."""
    taken: dict[int, list[int]] = {}
    for index in order:
        some = taken.setdefault(sentences[index].sense, [])
        if len(some) < per_sense:
            some.append(int(index))
    return sorted(sum(taken.values(), []))
