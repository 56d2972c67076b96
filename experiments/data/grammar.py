"""A generated data set: sentences of an English-like language, their German-like translations, and gold annotations.

Every sentence is written in both languages at once, as lists of `Word`s that point at each other: a verb at its
subject, a pronoun at its noun, a German word at the English words it translates. Pointers become indices at the end.

What a reader of the source can rely on, and so what a translator can learn:

- A pronoun that is a subject stands for the subject of the previous clause, one that is an object for its object
  (relative clauses do not count); `it` becomes er, sie or es by that noun's German gender, however far back it is.
- A verb agrees with the head of its subject, not with nouns of the phrases and relative clauses in between.
- German puts the finite verb second, and last in subordinate and relative clauses; infinitives, participles and
  separated prefixes close a main clause. Adverbs stand before an indefinite object and behind a definite one.
- An ambiguous noun (bank: Bank or Ufer) occurs with exactly one noun that is a cue for one of its senses.
- `und` and `aber` always begin a new main clause.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from experiments.data import lexicon
from experiments.data.words import Pair, Side
from experiments.data.writer import Style, Writer

__all__ = ["Config", "Pair", "Side", "Splits", "Style", "generate", "held_out", "parallel_text", "splits"]

SHORTEST = 4
"""Fewest source tokens of any sentence."""
LONGEST_TRAINED = 20
"""Most source tokens of any sentence outside `generalisation`."""
LONGEST = 30
"""Most source tokens of any sentence."""
MOST = 1_000_000
"""Most sentence pairs of a split: they take five minutes to write, and 3 GB."""


@dataclass(frozen=True)
class Config:
    """How many sentence pairs each split has. A split does not change when `train` does.

    Half of `generalisation` are longer sentences, half contain a held-out combination of noun and adjective.
    """

    train: int = 30_000
    validation: int = 500
    test: int = 500
    generalisation: int = 500
    seed: int = 0

    def __post_init__(self):
        for name, least in (("train", 0), ("validation", 0), ("test", 0), ("generalisation", 0), ("seed", None)):
            number = getattr(self, name)
            if type(number) is not int or (least is not None and not least <= number <= MOST):
                counted = f"a whole number of sentences, at least {least} and at most {MOST:,}"
                expected = "a whole number" if least is None else counted
                raise ValueError(f"grammar.Config: {name} must be {expected}, got {number!r}; write {name} = 500.")


class Splits(NamedTuple):
    """Four sets of pairs without a common source sentence."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    generalisation: tuple[Pair, ...]


ORDINARY = Style(clauses=(0.45, 0.45, 0.10, 0.0), modifiers=0.26, places=0.3)
LONG = Style(clauses=(0.0, 0.15, 0.5, 0.35), modifiers=0.45, places=0.45)


def held_out(noun: str, adjective: str) -> bool:
    """Whether training never shows this adjective with this noun (English lemmas): about one combination in twelve."""
    return (lexicon.position(noun) + 5 * lexicon.position(adjective)) % 12 == 0


def generate(rng: random.Random, style: Style = ORDINARY) -> Pair:
    """One sentence pair, drawn at random.

    Example:
        >>> " ".join(generate(random.Random(10739)).target.words)
        'das berühmte Ufer wird verschwinden , obwohl es beim Boot ist .'
    """
    while True:
        pair = Writer(rng, style).sentence()
        if pair is not None:
            return pair


def splits(config: Config) -> Splits:
    """The four sets of sentence pairs; the same for the same config, on every machine."""
    seen: set[tuple[str, ...]] = set()

    def draw(name: str, size: int, kind: str = "") -> tuple[Pair, ...]:
        # A stream of random numbers of its own for each split, so that their sizes do not influence each other.
        rng, pairs = random.Random(f"{config.seed}/{name}/{kind}"), []
        while len(pairs) < size:
            pair = generate(rng, LONG if kind == "length" else ORDINARY)
            if pair.source.words not in seen and _kind(pair) == kind:
                seen.add(pair.source.words)
                pairs.append(pair._replace(kind=kind))
        return tuple(pairs)

    # Train comes last: it avoids the sentences of the others, which so do not depend on its size.
    test = draw("test", config.test)
    validation = draw("validation", config.validation)
    longer = draw("generalisation", config.generalisation // 2, "length")
    recombined = draw("generalisation", config.generalisation - len(longer), "combination")
    return Splits(draw("train", config.train), validation, test, recombined + longer)


def _kind(pair: Pair) -> str:
    """Where a pair belongs: "" for training and testing, a kind of generalisation, or "neither"."""
    novel = any(held_out(*combination) for combination in pair.combinations)
    length = len(pair.source.words)
    if SHORTEST <= length <= LONGEST_TRAINED:
        return "combination" if novel else ""
    return "length" if LONGEST_TRAINED < length <= LONGEST and not novel else "neither"


def parallel_text(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """Sources and targets as lines of words with spaces between."""
    return [" ".join(pair.source.words) for pair in pairs], [" ".join(pair.target.words) for pair in pairs]
