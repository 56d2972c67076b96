"""What is counted in the sentences of a model: answers, margins, attention; no interval yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.data.word_senses import Sentence, Word
from experiments.studies.word_sense import classifier as classifiers
from experiments.studies.word_sense import texts
from experiments.studies.word_sense.classifier import Classifier
from experiments.studies.word_sense.reader import UNIFORM, Reader
from experiments.studies.word_sense.texts import Spelling
from mhajax.pretrained import Pretrained

if TYPE_CHECKING:
    from experiments.studies.word_sense import Config

CONTEXT, STATIC, BAG, MAJORITY = "contextual", "static", "bag of words", "majority"
FIXED, RETRAINED = "uniform, same classifier", "uniform"
EDGES = np.array([1, 2, 3, 4, 6, 9, 14, 20, 10**9])  # distances in words are alike up to the next of these


class Cues(NamedTuple):
    """The cue of each sentence that has words to be one.

    Attributes:
      sentence: which of the sentences, [m].
      words: the cue itself, [m].
      distance: from the ambiguous word, negative before it, [m].
      weight: margin of the answer that is lost without it, [m].
      attention: from the ambiguous word to the cue, [m, layers, N].
      alike: the same to other words at the same distance, in any sentence, [m, layers, N].
      answers: (which word is moved, place) → answers [m]; the word is "cue" or "other", one at random.
      still: how many cues were in that place already, by place.
    """

    sentence: np.ndarray
    words: list[str]
    distance: np.ndarray
    weight: np.ndarray
    attention: np.ndarray
    alike: np.ndarray
    answers: dict[tuple[str, str], np.ndarray]
    still: dict[str, int]


class OfWord(NamedTuple):
    """One ambiguous word in one model.

    Attributes:
      name, senses: of the word.
      gold: of the test sentences, [n].
      answers: arm → answers to them, [n].
      alone: test sentences in which the model sees no other word.
      some: which test sentences heads and cues are measured in, [m].
      found: answers there, [m].
      margin: of the right sense there, [m].
      lost: margin that is lost without each head, [m, layers, N].
      without: answers without each head, [m, layers, N].
      half: which half of them each is in, [m].
      chosen: heads that cost most in the *other* half, as flat indices, [2, top].
      margin_of_sets: without the chosen heads and without random ones of the same layers, [m, 1 + draws].
      answers_of_sets: answers, likewise.
      cues: what the answer hangs on.
    """

    name: str
    senses: tuple[str, ...]
    gold: np.ndarray
    answers: dict[str, np.ndarray]
    alone: int
    some: np.ndarray
    found: np.ndarray
    margin: np.ndarray
    lost: np.ndarray
    without: np.ndarray
    half: np.ndarray
    chosen: np.ndarray
    margin_of_sets: np.ndarray
    answers_of_sets: np.ndarray
    cues: Cues


class Seen(NamedTuple):
    """One model.

    Attributes:
      causal: whether it sees only what stands before a word.
      layers, heads: of the model.
      layer: the layer whose vectors are classified.
      validated: macro-F1 of every layer that was tried, on the training sentences, cross-validated, mean over words.
      words: by ambiguous word.
    """

    causal: bool
    layers: int
    heads: int
    layer: int
    validated: np.ndarray
    words: list[OfWord]


def examine(loaded: Pretrained, words: Sequence[Word], config: Config) -> Seen:
    """Everything that is counted in one model."""
    whole = Reader(loaded, min(config.deepest, loaded.config.num_layers))
    spelling = Spelling(loaded.tokenizer, whole.causal)
    parts = [_part(word, config) for word in words]
    trained = [whole.layers([spelling.text(one) for one in train]) for train, _ in parts]
    validated = np.mean(
        [
            [_validated(vectors[:, layer], train, len(word.senses), config.seed) for layer in range(whole.layer)]
            for vectors, (train, _), word in zip(trained, parts, words, strict=True)
        ],
        axis=0,
    )
    layer = 1 + int(np.argmax(validated >= validated.max() - config.tolerated))
    reader = Reader(loaded, layer)
    each = [
        _word(reader, spelling, word, *part, vectors[:, layer - 1], config)
        for word, part, vectors in zip(words, parts, trained, strict=True)
    ]
    return Seen(whole.causal, loaded.config.num_layers, whole.heads, layer, validated, each)


def gold_of(sentences: Sequence[Sentence]) -> np.ndarray:
    """The senses, [n]."""
    return np.array([sentence.sense for sentence in sentences])


def _part(word: Word, config: Config) -> tuple[list[Sentence], list[Sentence]]:
    """Training and test sentences, cropped; `most` of them are of all senses alike."""
    random = np.random.default_rng(config.seed)

    def some(part: Sequence[Sentence]) -> list[Sentence]:
        each = len(part) if config.most is None else -(-config.most // len(word.senses))
        taken = texts.balanced(part, each, random.permutation(len(part)))
        return [texts.crop(part[index], config.reach) for index in taken]

    return some(word.train), some(word.test)


def _validated(vectors: np.ndarray, train: Sequence[Sentence], count: int, seed: int) -> float:
    gold = gold_of(train)
    found = classifiers.cross_validated(vectors, gold, count, seed)
    return float(classifiers.macro_f1(found, gold, count, np.ones((1, len(gold))))[0])


def _word(
    reader: Reader, spelling: Spelling, word: Word, train: list[Sentence], test: list[Sentence], vectors: np.ndarray,
    config: Config,
) -> OfWord:  # fmt: skip
    random = np.random.default_rng(config.seed)
    count, right, gold = len(word.senses), gold_of(train), gold_of(test)
    often = int(np.bincount(gold).argmax())
    own = classifiers.fit(vectors, right, count)
    read, seen = [spelling.text(one) for one in train], [spelling.text(one) for one in test]

    def told(classifier: Classifier, given: np.ndarray) -> np.ndarray:
        return classifiers.answers(np.asarray(classifiers.scores(classifier, jnp.asarray(given))), often)

    def from_words(of: int | None) -> np.ndarray:
        """From input vectors: of the ambiguous word itself, or (None) the mean of all others that the model sees."""

        def inputs(sentences: list[Sentence]) -> np.ndarray:
            which = [[one.target] if of is not None else spelling.others(one) for one in sentences]
            pieces = [
                [token for index in indices for token in spelling.pieces(one.words[index])]
                for one, indices in zip(sentences, which, strict=True)
            ]
            return reader.static(pieces)

        return told(classifiers.fit(inputs(train), right, count), inputs(test))

    uniform = reader.vectors(seen, changed=UNIFORM)
    evenly = classifiers.fit(reader.vectors(read, changed=UNIFORM), right, count)
    final = reader.vectors(seen)
    arms = {
        CONTEXT: told(own, final), STATIC: from_words(0), BAG: from_words(None), MAJORITY: np.full(len(test), often),
        FIXED: told(own, uniform), RETRAINED: told(evenly, uniform),
    }  # fmt: skip

    some = np.array(texts.balanced(test, config.per_sense, random.permutation(len(test))))
    chosen_texts = [seen[index] for index in some]
    given = np.asarray(classifiers.scores(own, jnp.asarray(final[some])))
    margin, found = classifiers.margin(given, gold[some]), classifiers.answers(given, often)
    removed = reader.without_heads(chosen_texts, own)
    lost = margin[:, None, None] - classifiers.margin(removed, gold[some])
    half = _halves(gold[some], random)
    chosen, margins, answers = _sets(reader, own, chosen_texts, lost, half, gold[some], often, random, config)
    cues = _cues(reader, spelling, own, [test[index] for index in some], found, often, random)
    alone = sum(not spelling.others(one) for one in test)
    return OfWord(
        word.name, word.senses, gold, arms, alone, some, found, margin, lost, classifiers.answers(removed, often), half,
        chosen, margins, answers, cues,
    )  # fmt: skip


def _halves(gold: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """0 or 1 for each sentence, as many of each sense in both."""
    half = np.zeros(len(gold), int)
    for sense in np.unique(gold):
        members = random.permutation(np.flatnonzero(gold == sense))
        half[members] = np.arange(len(members)) % 2
    return half


def _sets(
    reader: Reader, own: Classifier, read: list[texts.Text], lost: np.ndarray, half: np.ndarray, gold: np.ndarray,
    often: int, random: np.random.Generator, config: Config,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """The worst heads of the other half removed together, and random ones of the same layers; see `OfWord`."""
    size = min(config.top, reader.layer * reader.heads - 1)
    chosen = np.zeros((2, size), int)
    margins = np.zeros((len(read), 1 + config.draws))
    answers = np.zeros((len(read), 1 + config.draws), int)
    for side in (0, 1):
        mean = lost[half != side].mean(0)
        chosen[side] = np.argsort(-mean, axis=None)[:size]
        sets = np.zeros((1 + config.draws, reader.layer, reader.heads), bool)
        sets[0].flat[chosen[side]] = True
        of_layer = sets[0].sum(1)
        for draw in range(1, 1 + config.draws):
            for layer, number in enumerate(of_layer):
                sets[draw, layer, random.permutation(reader.heads)[:number]] = True
        members = np.flatnonzero(half == side)
        scores = reader.without_sets([read[index] for index in members], own, sets)
        margins[members] = classifiers.margin(scores, gold[members])
        answers[members] = classifiers.answers(scores, often)
    return chosen, margins, answers


def _cues(
    reader: Reader, spelling: Spelling, own: Classifier, sentences: list[Sentence], found: np.ndarray, often: int,
    random: np.random.Generator,
) -> Cues:  # fmt: skip
    def scores(some: list[Sentence]) -> np.ndarray:
        vectors = reader.vectors([spelling.text(one) for one in some])
        return np.asarray(classifiers.scores(own, jnp.asarray(vectors)))

    whole = classifiers.margin(scores(sentences), found)
    owner = [(number, index) for number, one in enumerate(sentences) for index in spelling.others(one)]
    left = classifiers.margin(
        scores([texts.without(sentences[number], index) for number, index in owner]),
        found[[number for number, _ in owner]],
    )
    best: dict[int, tuple[int, float]] = {}
    for (number, index), margin in zip(owner, left, strict=True):
        lost = float(whole[number] - margin)
        if number not in best or lost > best[number][1]:
            best[number] = index, lost
    members = np.array(sorted(best))
    cue = {number: best[number][0] for number in members}
    other = {}  # the cue itself where there is no other
    for number in members:
        rest = [index for index in spelling.others(sentences[number]) if index != cue[number]]
        other[number] = int(random.choice(rest or [cue[number]]))
    sets = {"cue": cue, "other": other}
    answers, still = {}, {}
    for place in texts.PLACES:
        for which, index in sets.items():
            changed = [texts.moved(sentences[number], index[number], place) for number in members]
            answers[which, place] = classifiers.answers(scores(changed), often)
            if which == "cue":
                still[place] = sum(
                    one.words == sentences[number].words for one, number in zip(changed, members, strict=True)
                )
    to_cue, alike = _attention(reader, spelling, sentences, cue)
    return Cues(
        members, [sentences[number].words[cue[number]] for number in members],
        np.array([cue[number] - sentences[number].target for number in members]),
        np.array([best[number][1] for number in members]), to_cue, alike, answers, still,
    )  # fmt: skip


def _attention(
    reader: Reader, spelling: Spelling, sentences: list[Sentence], cue: dict[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """From the ambiguous word to the cue, and to words that are no cue at such a distance, [m, layers, N] each."""
    weights = reader.attention([spelling.text(one) for one in sentences])  # of each sentence [layers, N, words]
    sums: dict[tuple[bool, int], np.ndarray] = {}
    counts: dict[tuple[bool, int], int] = {}
    for number, one in enumerate(sentences):
        for index in spelling.others(one):
            if index != cue.get(number):
                where = _distance(index - one.target)
                sums[where] = sums.get(where, 0.0) + weights[number][..., index]
                counts[where] = counts.get(where, 0) + 1
    to_cue, alike = [], []
    for number in sorted(cue):
        where = _distance(cue[number] - sentences[number].target)
        to_cue.append(weights[number][..., cue[number]])
        alike.append(sums[where] / counts[where] if where in counts else np.full_like(to_cue[-1], np.nan))
    return np.stack(to_cue), np.stack(alike)


def _distance(offset: int) -> tuple[bool, int]:
    """The side, and the class of the distance."""
    return offset > 0, int(np.searchsorted(EDGES, abs(offset)))
