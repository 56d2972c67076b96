"""Sentences in, translations out, by the parameters of a translator: in batches of few shapes, greedily or by beams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import host, work
from experiments.data import batches
from experiments.data.vocabulary import BOS, EOS, Vocabulary
from mhajax import cache, decoding, linen, transformer, translator


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The table [decoding] of a translation.

    Attributes:
      beams: 1 is greedy.
      length_penalty: exponent of the length normalisation, see `mhajax.decoding.beam_search`.
      batch: sentences at a time.
      validation_sentences: how many of the validation sentences are translated (greedily) at each evaluation; their
        BLEU decides which parameters are best.
    """

    beams: int = 4
    length_penalty: float = 1.0
    batch: int = 100
    validation_sentences: int = 300

    def __post_init__(self):
        for name in ("beams", "batch", "validation_sentences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name, most in (("beams", 1_000), ("batch", 1_000_000)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name):,}.")
        if abs(self.length_penalty) > 10:
            raise ValueError(f"length_penalty must be in [-10, 10], got {self.length_penalty}.")


class Translator:
    """Text in, text out, in batches of few shapes."""

    def __init__(self, model: linen.Model, words: Vocabulary, settings: Decoding, boundaries: tuple[int, ...]):
        self._model, self._words, self._settings, self._boundaries = model, words, settings, boundaries
        self._decode = jax.jit(self._decode_batch, static_argnames=("beams", "length"))

    def __call__(self, params: Any, sentences: Sequence[str], *, beams: int | None = None) -> list[str]:
        """Translations of the sentences; `beams` other than the config's if given."""
        settings = self._settings
        beams = settings.beams if beams is None else beams
        self.check_room(len(sentences), beams)
        ids = self._words.encode_all(sentences)
        outputs = [""] * len(sentences)
        rows = rows_of(settings.batch, len(sentences))
        boundaries = self._boundaries
        with work.piece("translating", len(sentences), "sentences") as piece:
            for batch in batches.evaluation_batches(ids, batch_size=rows, boundaries=boundaries):
                longest = _longest(batch.source.shape[1])
                tokens = self._decode(params, batch.source, batch.source_lengths, beams=beams, length=longest)
                for number, output in zip(batch.index, np.asarray(tokens), strict=True):
                    if number >= 0:
                        outputs[number] = self._words.decode(output)
                piece.advance(int((batch.index >= 0).sum()))
        return outputs

    def check_room(self, sentences: int, beams: int) -> None:
        """Refuse beams that cannot fit into memory."""
        rows, decoder = rows_of(self._settings.batch, sentences) * beams, self._model.config.decoder
        longest = _longest(self._boundaries[-1])
        layer = jax.eval_shape(lambda: cache.init((rows,), longest, decoder))
        host.check_room(
            "[decoding] keys and values of all beams", layer, decoder.num_layers, "decoding.batch or decoding.beams"
        )

    def _decode_batch(self, params, source, source_lengths, *, beams, length):
        config = self._model.config
        params = linen.functional(self._model, params)
        state = translator.begin(params, source, length, config, source_lengths=source_lengths)
        first = jnp.full(source.shape[0], BOS)
        rows = jnp.repeat(jnp.arange(source.shape[0]), beams)
        params = translator.unstack(params)
        reading = translator.select(state, rows)  # what is read stays; what is written moves through the loop

        def step(tokens, written):
            logits, state = translator.extend(params, tokens[:, None], reading._replace(written=written), config)
            return logits[:, 0], state.written

        if beams == 1:
            key = jax.random.key(0)  # greedy takes none
            return decoding.generate(step, reading.written, first, decoding.greedy, key, length=length, end=EOS)
        return decoding.beam_search(
            step, transformer.select, reading.written, first,
            beams=beams, length=length, end=EOS, length_penalty=self._settings.length_penalty,
        ).tokens[:, 0]  # fmt: skip


def rows_of(batch: int, sentences: int) -> int:
    """The rows of a batch: all, where more than half are taken; a shape of its own is compiled only for a few."""
    return batch if 2 * sentences > batch else sentences


def _longest(source: int) -> int:
    """Tokens that a translation of so many may have."""
    return source * 3 // 2 + 8
