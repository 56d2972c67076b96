"""A sense from a vector: the nearest mean of a sense. Macro-F1, and resampled sentences for its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.statistics import Measure

FOLDS = 5


class Classifier(NamedTuple):
    """Mean and spread of the training vectors, [D], and the mean of each sense after that, of norm 1, [C, D]."""

    mean: Array
    scale: Array
    senses: Array


def fit(vectors: np.ndarray, gold: np.ndarray, count: int) -> Classifier:
    """The classifier of training vectors [n, D]; nothing in it is tuned.

    Every channel gets mean 0 and variance 1 over the training vectors, since a few channels of a model are a hundred
    times larger than the others. A channel that never changes is 0.
    """
    mean, spread = vectors.mean(0), vectors.std(0)
    scale = np.where(spread > 1e-6 * (1e-6 + np.abs(mean)), 1 / np.maximum(spread, 1e-12), 0.0)
    scaled = (vectors - mean) * scale
    senses = np.stack([scaled[gold == sense].mean(0) if (gold == sense).any() else 0 * mean for sense in range(count)])
    senses /= np.maximum(np.linalg.norm(senses, axis=-1, keepdims=True), 1e-9)
    return Classifier(*(jnp.asarray(part, jnp.float32) for part in (mean, scale, senses)))


def scores(classifier: Classifier, vectors: Array) -> Array:
    """Cosine with the mean of each sense, [..., C] of [..., D]; all 0 for a vector that says nothing."""
    scaled = (vectors - classifier.mean) * classifier.scale
    norm = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return (scaled / jnp.maximum(norm, 1e-6)) @ classifier.senses.T


def answers(found: np.ndarray, otherwise: int) -> np.ndarray:
    """The sense with the highest score; `otherwise` where all scores are alike."""
    alike = found.max(-1) - found.min(-1) < 1e-6
    return np.where(alike, otherwise, found.argmax(-1))


def margin(found: np.ndarray, sense: np.ndarray) -> np.ndarray:
    """Score of a sense minus the best of the others; found [n, ..., C], sense [n]."""
    right = np.arange(found.shape[-1]) == sense.reshape(-1, *[1] * (found.ndim - 1))
    return np.where(right, found, -np.inf).max(-1) - np.where(right, -np.inf, found).max(-1)


def cross_validated(vectors: np.ndarray, gold: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The answer to every training vector by a classifier of the other folds, [n]."""
    found = np.zeros(len(gold), int)
    fold = np.empty(len(gold), int)
    fold[np.random.default_rng(seed).permutation(len(gold))] = np.arange(len(gold)) % FOLDS
    for out in range(FOLDS):
        held = fold == out
        if held.any():
            own = fit(vectors[~held], gold[~held], count)
            found[held] = answers(np.asarray(scores(own, jnp.asarray(vectors[held]))), 0)
    return found


def macro_f1(found: np.ndarray, gold: np.ndarray, count: int, weights: np.ndarray) -> np.ndarray:
    """Mean over the senses of their F1, [samples], for weights [samples, n] of the sentences.

    A sense that is neither there nor answered counts for nothing.
    """
    answered, there = np.eye(count)[found], np.eye(count)[gold]
    hits, sums = weights @ (answered * there), weights @ answered + weights @ there
    of_sense = np.divide(2 * hits, sums, out=np.full_like(sums, np.nan), where=sums > 0)
    return np.nanmean(of_sense, axis=-1)


def resampled(sizes: Sequence[int], resamples: int, seed: int) -> list[np.ndarray]:
    """How often each sentence is drawn, [1 + resamples, n] for every word; the first row is the sentences as they are.

    Whoever compares two answers to the same sentences takes the same weights for both: then they are paired.
    """
    random = np.random.default_rng(seed)
    return [np.concatenate([np.ones((1, n)), random.multinomial(n, np.full(n, 1 / n), resamples)]) for n in sizes]


def interval(samples: np.ndarray, level: float = 0.95, baseline: float = np.nan) -> Measure:
    """Value and percentile interval of what was computed from `resampled`: first the value, then the resamples."""
    low, high = np.quantile(samples[1:], [(1 - level) / 2, (1 + level) / 2])
    return Measure(*(np.asarray(part) for part in (samples[0], low, high, baseline)))
