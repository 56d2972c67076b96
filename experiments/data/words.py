"""Annotated sentences, finished and in the making: words that point at each other, and clauses in two orders."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from experiments.data.lexicon import Noun


class Side(NamedTuple):
    """One language's half of a sentence; every tuple has one entry per token.

    Attributes:
        words: The tokens.
        tags: DET ADJ NOUN VERB AUX PRON REL PREP ADV CONJ PART PUNCT; PART is a separated prefix of a German verb.
        subjects: For a finite verb or auxiliary the index of its subject's head noun or pronoun, else -1. The
            subject of a verb whose subject is a relative pronoun is the noun that the relative clause belongs to.
        antecedents: For a pronoun or relative pronoun the index of its noun, else -1 (also for we).
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    subjects: tuple[int, ...]
    antecedents: tuple[int, ...]


class Pair(NamedTuple):
    """A sentence and its translation.

    Attributes:
        source: The English-like half.
        target: The German-like half.
        alignment: Gold (source index, target index), sorted. "to" and most German commas have no partner; a German
            verb and its separated prefix share one, and "im" has two.
        senses: Per source token the sense of an ambiguous noun, else "".
        cues: Per source token the index of the noun that decides the ambiguous noun's sense, else -1.
        constructions: What the sentence contains, for breaking scores down; in order of first occurrence.
        combinations: Its (noun, adjective) pairs, of which some are held out of training (see `held_out`).
        kind: Which kind of generalisation the pair is for: "combination", "length", or "" for none.
    """

    source: Side
    target: Side
    alignment: tuple[tuple[int, int], ...]
    senses: tuple[str, ...]
    cues: tuple[int, ...]
    constructions: tuple[str, ...]
    combinations: tuple[tuple[str, str], ...]
    kind: str = ""


@dataclass(eq=False, slots=True)
class Word:
    """A token in the making. Equality is identity, so two tokens "the" stay two."""

    text: str
    tag: str
    translates: tuple["Word", ...] = ()
    subject: "Word | None" = None
    antecedent: "Word | None" = None
    sense: str = ""
    cue: "Word | None" = None


class Referent(NamedTuple):
    """Somebody or something in the sentence: a noun with its number and its two words, or us (no noun)."""

    noun: Noun | None
    plural: bool
    source: Word
    target: Word

    @property
    def kind(self) -> str:
        return self.noun.kind if self.noun else "p"


class Phrase(NamedTuple):
    """A noun phrase or a pronoun in both languages; `heads` are the words that a verb agrees with."""

    source: list[Word]
    target: list[Word]
    heads: tuple[Word, Word]
    who: Referent
    definite: bool = True


class Clause(NamedTuple):
    """A clause in both languages, and who the next clause's pronouns stand for."""

    source: list[Word]
    target: list[Word]
    subject: Referent
    object: Referent | None = None


Words = tuple[list[Word], list[Word]]
Order = Literal["second", "last"]
NOTHING: Words = ([], [])


class Parts(NamedTuple):
    """What a clause is made of, before each language puts it in order."""

    front: Words
    subject: Phrase
    finite: Words
    rest: Words
    adverb: Words
    objects: list[Phrase]
    place: Words
    copula: bool

    def english(self) -> list[Word]:
        """Subject, verbs with the adverb before the main one (but behind "is"), objects; the receiver with "to"."""
        simple = not self.rest[0] and not self.copula
        verbs = self.adverb[0] + self.finite[0] if simple else self.finite[0] + self.adverb[0] + self.rest[0]
        words = self.front[0] + self.subject.source + verbs
        for i, phrase in enumerate(self.objects):
            words += [Word("to", "PREP"), *phrase.source] if i else phrase.source
        return words + self.place[0]

    def german(self, order: Order) -> list[Word]:
        """Verb second or last; receiver before object, but behind a pronoun; the adverb behind what is definite."""
        objects = self.objects
        if len(objects) == 2 and objects[0].source[0].tag != "PRON":
            objects = objects[::-1]
        known = next((i for i, phrase in enumerate(objects) if not phrase.definite), len(objects))
        middle = [word for phrase in objects[:known] for word in phrase.target] + self.adverb[1]
        middle += [word for phrase in objects[known:] for word in phrase.target] + self.place[1]
        subject, finite, rest = self.subject.target, self.finite[1], self.rest[1]
        if order == "last":
            return subject + middle + rest + finite
        return (self.front[1] + finite + subject if self.front[1] else subject + finite) + middle + rest


def translated(english: str, german: str, tag: str) -> Words:
    """One word that is translated by one word."""
    source = Word(english, tag)
    return [source], [Word(german, tag, (source,))]


def joined(*parts: Words) -> Words:
    """Parts that follow each other in both languages."""
    return [word for source, _ in parts for word in source], [word for _, target in parts for word in target]
