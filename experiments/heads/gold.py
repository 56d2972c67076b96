"""What the grammar knows of its sentences, as the keys that a head should look at.

Row t of a decoder reads target word t - 1 (row 0 reads the beginning) and writes word t, so a target word can be asked
about twice: when it is written (row t) and when it is read (row t + 1). Keys of the decoder's attention to itself are
words that were read, so target word s is key s + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from experiments.data.grammar import Pair
from mhajax.report.subject import Relation

Links = Iterable[tuple[int, int]]  # (query, key)


def _pointers(targets: Sequence[int]) -> list[tuple[int, int]]:
    return [(place, target) for place, target in enumerate(targets) if target >= 0]


def _translations(pair: Pair) -> dict[int, int]:
    """Source word of every target word that has one (the first of several)."""
    return {target: source for source, target in reversed(pair.alignment)}


def _pronouns(side) -> list[tuple[int, int]]:
    return [(p, noun) for p, noun in _pointers(side.antecedents) if side.tags[p] == "PRON"]


def _verbs(pair: Pair) -> list[tuple[int, int]]:
    """(verb, subject) of the target."""
    return _pointers(pair.target.subjects)


def _across(pair: Pair, targets: Iterable[int], pointers: Sequence[int]) -> Links:
    """From target words to what the source words that they translate point at."""
    sources = _translations(pair)
    return [(t, pointers[sources[t]]) for t in targets if t in sources and pointers[sources[t]] >= 0]


def _reordered(pair: Pair) -> list[tuple[int, int]]:
    """(target, source) of the words that cross another one: where the two languages have different orders."""
    links = pair.alignment
    return [(t, s) for s, t in links if any((s - other) * (t - place) < 0 for other, place in links)]


def _subjects_and_verbs(pair: Pair) -> set[int]:
    return {word for link in _verbs(pair) for word in link}


def _ambiguous(pair: Pair) -> list[int]:
    return [target for source, target in pair.alignment if pair.senses[source]]


_FAR = {"1–3 words": (1, 3), "4–6 words": (4, 6), "7–10 words": (7, 10), "more than 10": (11, 10**6)}

ALIGNED = Relation("word written → its source", "cross", "aligns")
_LINKS: tuple[tuple[Relation, Callable[[Pair], Links]], ...] = (
    (Relation("verb → its subject", "encoder", "subject"), lambda p: _pointers(p.source.subjects)),
    (Relation("pronoun → its noun", "encoder", "noun", _FAR), lambda p: _pronouns(p.source)),
    (Relation("bank → the cue of its sense", "encoder", "cue"), lambda p: _pointers(p.cues)),
    (Relation("verb read → its subject", "decoder", "subject"), lambda p: [(v + 1, s + 1) for v, s in _verbs(p)]),
    (Relation("verb written → its subject", "decoder", "subject"), lambda p: [(v, s + 1) for v, s in _verbs(p)]),
    (Relation("pronoun written → its noun", "decoder", "noun"), lambda p: [(q, n + 1) for q, n in _pronouns(p.target)]),
    (ALIGNED, lambda p: [(t, s) for s, t in p.alignment]),
    (Relation("word read → its source", "cross", "aligns read"), lambda p: [(t + 1, s) for s, t in p.alignment]),
    (
        Relation("subject or verb written → its source", "cross", "aligns verb"),
        lambda p: [(t, s) for s, t in p.alignment if t in _subjects_and_verbs(p)],
    ),
    (Relation("word in another order written → its source", "cross", "aligns reordered"), _reordered),
    (
        Relation("verb written → the source's subject", "cross", "subject"),
        lambda p: _across(p, [v for v, _ in _verbs(p)], p.source.subjects),
    ),
    (
        Relation("pronoun written → the source's noun", "cross", "noun", _FAR),
        lambda p: _across(p, [q for q, _ in _pronouns(p.target)], p.source.antecedents),
    ),
    (
        Relation("bank written → the cue of its sense", "cross", "cue"),
        lambda p: _across(p, _ambiguous(p), p.cues),
    ),
)
RELATIONS = tuple(relation for relation, _ in _LINKS)
LINKS = {relation.key: links for relation, links in _LINKS}
"""The key of a relation → (pair → (query, key) indices)."""


def keys(relation: Relation, pairs: Sequence[Pair | None], visible: np.ndarray) -> np.ndarray:
    """The right keys of every query, bool [B, T, S]; only those that the query may see.

    Args:
      relation: what is asked.
      pairs: the annotated sentences of a batch; None for a row of filling.
      visible: bool [B, T, S].
    """
    right = np.zeros(visible.shape, bool)
    for row, pair in enumerate(pairs):
        if pair is not None:
            for query, key in LINKS[relation.key](pair):
                right[row, query, key] = True
    return right & visible


OFFSETS = range(-8, 9)


def baselines(relation: Relation, pairs: Sequence[Pair | None], visible: np.ndarray) -> dict[str, np.ndarray]:
    """Keys that would be chosen without any attention, by position alone or nearly: name → bool [B, T, S].

    Every fixed offset from the query; for relations that may be far, the nearest noun before the query and the first
    noun of the text (of the source, for cross attention).
    """
    t, s = visible.shape[1:]
    distance = np.arange(s) - np.arange(t)[:, None]
    found = {f"offset {offset:+d}": visible & (distance == offset) for offset in OFFSETS}
    if relation.parts:
        nouns = np.zeros((len(pairs), s), bool)
        for row, pair in enumerate(pairs):
            if pair is not None:
                nouns[row, [i for i, tag in enumerate(pair.source.tags) if tag == "NOUN"]] = True
        before = nouns[:, None] & visible & (distance < 0)
        nearest = s - 1 - np.argmax(before[..., ::-1], axis=-1)
        found["nearest noun before"] = before & (np.arange(s) == nearest[..., None])
        found["first noun"] = visible & (nouns & (np.cumsum(nouns, axis=-1) == 1))[:, None]
    return found


CATEGORIES: dict[str, Callable[[Pair], Iterable[int]]] = {
    "verbs": lambda p: [v for v, _ in _verbs(p)],
    "pronouns": lambda p: [q for q, _ in _pronouns(p.target)],
    "bank": _ambiguous,
}
"""Target words whose loss is looked at apart: name → (pair → indices of target words)."""


def positions(words: Callable[[Pair], Iterable[int]], pairs: Sequence[Pair | None], length: int) -> np.ndarray:
    """Which target words of a batch belong to a category, bool [B, T]."""
    chosen = np.zeros((len(pairs), length), bool)
    for row, pair in enumerate(pairs):
        if pair is not None:
            chosen[row, list(words(pair))] = True
    return chosen
