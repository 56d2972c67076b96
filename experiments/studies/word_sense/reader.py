"""A pretrained model up to one of its layers: what it gives at the ambiguous word, as it is and changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import work
from experiments.studies import models
from experiments.studies.word_sense import classifier as classifiers
from experiments.studies.word_sense.classifier import Classifier
from experiments.studies.word_sense.texts import Text
from mhajax import PerAttention, block, interventions, language_model, masks, transformer
from mhajax.heads import ablation
from mhajax.pretrained import Pretrained
from mhajax.transformer import Stage


class _Batch(NamedTuple):
    tokens: Array  # [B, T]
    lengths: Array  # [B]
    target: Array  # [B, T], how much each token is of the vector of the ambiguous word


class Reader:
    """A model, run on texts in batches of few shapes.

    Args:
      loaded: the model.
      layer: how many of its layers are run; None: all. What comes after them is not: no last normalisation.
    """

    def __init__(self, loaded: Pretrained, layer: int | None = None):
        self.loaded = loaded
        self.causal = loaded.model is language_model
        self.layer = loaded.config.num_layers if layer is None else layer
        self.heads = loaded.config.num_heads
        self._layers = jax.jit(self._run_layers)
        self._vectors = jax.jit(self._run_vectors)
        self._without = jax.jit(self._run_without)
        self._sets = jax.jit(self._run_sets)
        self._attention = jax.jit(self._run_attention)

    def static(self, words: Sequence[Sequence[int]]) -> np.ndarray:
        """The mean input vector of some tokens each, [n, D], before any layer; 0 for none."""
        table = np.asarray(self.loaded.params.embedding.tokens)
        return np.stack([table[list(own)].mean(0) if own else np.zeros(table.shape[1], table.dtype) for own in words])

    def layers(self, texts: Sequence[Text]) -> np.ndarray:
        """The vector of the ambiguous word after every layer, [n, L, D]."""
        return self._each(texts, "reading", self._layers)

    def vectors(self, texts: Sequence[Text], *, changed: Any = None) -> np.ndarray:
        """Its vector after the last layer that is run, [n, D].

        Args:
          texts: what is read.
          changed: an `interventions.Intervention` for the attention of every layer.
        """
        given = None if changed is None else PerAttention(attention=changed)
        return self._each(texts, "reading", self._vectors, given)

    def without_heads(self, texts: Sequence[Text], classifier: Classifier) -> np.ndarray:
        """The scores of the senses without each head, [n, layers, N, C]."""
        return self._each(texts, "removing heads", self._without, classifier)

    def without_sets(self, texts: Sequence[Text], classifier: Classifier, sets: np.ndarray) -> np.ndarray:
        """The scores of the senses without sets of heads, [n, sets, C]; sets [sets, layers, N], True: removed."""
        return self._each(texts, "removing sets of heads", self._sets, classifier, jnp.asarray(1.0 - sets))

    def attention(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """Attention from the ambiguous word (mean of its tokens) to each word (sum), [layers, N, words]."""
        longest = max(len(text.tokens) for text in texts)
        rows = self._each(texts, "reading attention", self._attention, width=longest)  # [n, layers, N, T]
        return [
            np.stack([row[..., start:stop].sum(-1) for start, stop in text.spans], -1)
            for row, text in zip(rows, texts, strict=True)
        ]

    def _each(
        self, texts: Sequence[Text], what: str, function: Callable[..., Array], *rest: Any, width: int | None = None
    ) -> np.ndarray:
        """What a function gives for every text, in their order; a last axis that is the batch's T is cut to `width`."""
        out: np.ndarray | None = None
        with work.piece(what, len(texts), "sentences") as piece:
            lists = [text.tokens for text in texts]
            for batch in models.batches(lists, tokens=256, step=16 if self.causal else 32):
                target = np.zeros(batch.tokens.shape, np.float32)
                for row, index in enumerate(batch.index):
                    if index >= 0:
                        start, stop = texts[index].spans[texts[index].target]
                        target[row, start:stop] = 1 / (stop - start)
                given = _Batch(*map(jnp.asarray, (batch.tokens, batch.lengths, target)))
                found = np.asarray(function(self.loaded.params, given, *rest))[batch.index >= 0]
                if width is not None:
                    found = found[..., :width]
                    found = np.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, width - found.shape[-1])])
                if out is None:
                    out = np.zeros((len(texts), *found.shape[1:]), found.dtype)
                out[batch.index[batch.index >= 0]] = found
                piece.advance(int((batch.index >= 0).sum()))
        assert out is not None, "there are texts"
        return out

    def _stage(self, params: Any, batch: _Batch) -> Stage:
        mask = None if self.causal else masks.lengths(batch.lengths)  # what follows is not seen anyway
        (stage,) = self.loaded.model.stages(params, batch.tokens, self.loaded.config, mask=mask)
        layers = jax.tree.map(lambda leaf: leaf[: self.layer], stage.params.layers)
        shape = replace(stage.config, num_layers=self.layer, final_norm=False)
        return stage._replace(params=transformer.Params(layers, None), config=shape)

    def _run_layers(self, params: Any, batch: _Batch) -> Array:
        stage = self._stage(params, batch)

        def layer(x: Array, own: Any) -> tuple[Array, Array]:
            x = block.apply(own, x, stage.config, **stage.options)
            return x, _at(batch, x)

        return jnp.moveaxis(jax.lax.scan(layer, stage.x, stage.params.layers)[1], 0, 1)

    def _run_vectors(self, params: Any, batch: _Batch, given: Any) -> Array:
        return _at(batch, transformer.run_stage(self._stage(params, batch), (), interventions=given)[0])

    def _run_without(self, params: Any, batch: _Batch, classifier: Classifier) -> Array:
        def of_senses(features: Array) -> Array:  # [B · C]: one number after the other, as if each were a loss
            return classifiers.scores(classifier, _at(batch, features)).reshape(-1)

        found = ablation.of_stages([self._stage(params, batch)], of_senses, batch_size=1)["attention"]
        count, senses = batch.tokens.shape[0], classifier.senses.shape[0]
        found = found.reshape(self.layer, count, senses, self.heads)
        return jnp.transpose(found, (1, 0, 3, 2))

    def _run_sets(self, params: Any, batch: _Batch, classifier: Classifier, gates: Array) -> Array:
        stage = self._stage(params, batch)

        def one(own: Array) -> Array:
            x = transformer.run_stage(stage, (), gates=PerAttention(attention=own))[0]
            return classifiers.scores(classifier, _at(batch, x))

        return jnp.swapaxes(jax.lax.map(one, gates), 0, 1)

    def _run_attention(self, params: Any, batch: _Batch) -> Array:
        captured = transformer.run_stage(self._stage(params, batch), (), capture=("weights",))[2]
        return jnp.einsum("lbnts,bt->blns", captured["attention"]["weights"], batch.target)


UNIFORM = interventions.uniform()


def _at(batch: _Batch, x: Array) -> Array:
    """The vector of the ambiguous word, [B, D] of [B, T, D]."""
    return jnp.einsum("btd,bt->bd", x, batch.target)
