"""From attention between the pieces of a tokenizer to attention between words, and where each word looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from experiments import work
from experiments.data.dependencies import Sentence
from experiments.errors import DataError
from experiments.studies import models
from mhajax import masks
from mhajax.pretrained import Pretrained

BATCH = 512  # tokens of a batch: few enough that the first sentences alone do not cost much more than they are


class Pieces(NamedTuple):
    """A sentence as a model reads it.

    Attributes:
      tokens: of the tokenizer, with special ones.
      word: the place in the sentence of the word that each belongs to; -1 of special tokens.
      size: how many words there are.
    """

    tokens: list[int]
    word: list[int]
    size: int


class Answers(NamedTuple):
    """The word that gets most attention from each word of a sentence, -1 where no word gets any.

    Attributes:
      other: of all words but itself, integers [L, N, W].
      any: of all words, [L, N, W].
    """

    other: np.ndarray
    any: np.ndarray


def pieces(sentences: Sequence[Sentence], tokenizer: Any, start: str | None = None) -> list[Pieces]:
    """The sentences as a tokenizer cuts them. A piece belongs to the word in which its first letter stands.

    Args:
      sentences: with the places of their words.
      tokenizer: of `tokenizers`.
      start: a token to be put before each.

    Raises:
      DataError: the tokenizer does not know `start`.
    """
    first = [] if start is None else [tokenizer.token_to_id(start)]
    if None in first:
        raise DataError(f"arms.start must be a token of the model, got {start!r}, which its tokenizer does not know.")
    found = []
    for sentence, encoded in zip(sentences, tokenizer.encode_batch([s.text for s in sentences]), strict=True):
        ends = [end for _, end in sentence.spans]
        word = [-1] * len(first)
        for begin, end in encoded.offsets:
            begin += len(sentence.text[begin:end]) - len(sentence.text[begin:end].lstrip())
            word.append(int(np.searchsorted(ends, begin, side="right")) if begin < end else -1)
        found.append(Pieces([*first, *encoded.ids], word, len(ends)))
    return found


def to_words(weights: ArrayLike, word: ArrayLike) -> Array:
    """Attention between words: summed over the pieces of a word that gets it, averaged over those of one that looks.

    What special tokens get is left out, and nothing is divided by what is left: a piece that looks at them says less
    than the other pieces of its word.

    Args:
      weights: between pieces, [..., N, T, T].
      word: which word a piece belongs to, [..., T]; -1 of none.

    Returns:
      [..., N, T, T], of as many words as there could be.

    >>> weights = jnp.array([[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]])
    >>> to_words(weights, jnp.array([0, 1, 1]))[0, :2, :2].tolist()
    [[0.5, 0.5], [0.125, 0.875]]
    """
    member = jax.nn.one_hot(word, np.shape(word)[-1], dtype=jnp.float32)  # [..., T, W]
    share = member / jnp.maximum(jnp.sum(member, axis=-2, keepdims=True), 1)
    to = jnp.einsum("...nts,...sw->...ntw", jnp.asarray(weights, jnp.float32), member)
    return jnp.einsum("...ntw,...tv->...nvw", to, share)


def most(weights: ArrayLike, *, itself: bool) -> Array:
    """The word that gets most, integers [..., W], of attention between words [..., W, W]; -1 where none gets any.

    Args:
      weights: from `to_words`.
      itself: whether a word's attention to itself counts.
    """
    weights = jnp.asarray(weights)
    if not itself:
        weights = jnp.where(jnp.eye(weights.shape[-1], dtype=bool), 0, weights)
    return jnp.where(jnp.max(weights, axis=-1) > 0, jnp.argmax(weights, axis=-1), -1).astype(jnp.int16)


@partial(jax.jit, static_argnums=(0, 1))
def _look(
    model: ModuleType, config: Any, params: Any, tokens: Array, lengths: Array, word: Array
) -> tuple[Array, Array]:
    """The other word, and the word, that gets most from each word, [L, B, N, W]."""
    _, seen = model.apply_captured(params, tokens, config, capture=("weights",), mask=masks.lengths(lengths))
    weights = to_words(seen.attention["weights"], word)
    return most(weights, itself=False), most(weights, itself=True)


def answers(opened: Pretrained, texts: Sequence[Pieces], note: str) -> Callable[[Any], Iterator[tuple[int, Answers]]]:
    """Where all words of all sentences look: parameters → sentence by sentence (its number, Answers).

    Args:
      opened: the model.
      texts: what it reads.
      note: what is shown while it reads.
    """
    batches = list(models.batches([text.tokens for text in texts], tokens=BATCH))
    look = partial(_look, opened.model, opened.config)

    def run(params: Any) -> Iterator[tuple[int, Answers]]:
        for batch in work.each(batches, note, len(batches), "batches"):
            word = np.full(batch.tokens.shape, -1, np.int32)
            for row, number in enumerate(batch.index):
                if number >= 0:
                    word[row, : len(texts[number].word)] = texts[number].word
            found = [np.asarray(a) for a in look(params, batch.tokens, batch.lengths, word)]
            for row, number in enumerate(batch.index):
                if number >= 0:
                    yield int(number), Answers(*(a[:, row, :, : texts[number].size] for a in found))

    return run
