"""Numbers with intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array
from numpy.typing import ArrayLike


class Tally(NamedTuple):
    """What a measure of heads found in some sentences, before it is divided and given an interval by `estimate`.

    Attributes:
      total: sum of the measure over what was measured in a sentence (queries, tokens), [..., sentences, ...].
      count: how many were summed, broadcasts to `total`.
      baseline: what `total` would be for the baseline of the measure, broadcasts to `total`.
    """

    total: Array | np.ndarray
    count: Array | np.ndarray
    baseline: Array | np.ndarray


class Measure(NamedTuple):
    """A value, its 95 % interval, and the value of the baseline; arrays of the same shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    baseline: np.ndarray


class Estimate(NamedTuple):
    """A value and its 95 % interval; arrays of the same shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def ratio(sums: ArrayLike, counts: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Σ sums / Σ counts with a percentile bootstrap over sentences.

    Args:
      sums: per sentence, [sentences, ...]: right answers, or a total of some measure.
      counts: per sentence, broadcasts to the same shape: questions, or tokens. Sentences with 0 count for nothing.
      resamples: bootstrap samples of sentences.
      seed: of the resampling.

    Returns:
      Three arrays [...]; NaN where there is nothing to count.

    References:
      Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    sums = np.asarray(sums, float)
    counts = np.broadcast_to(np.asarray(counts, float), sums.shape)
    n = len(sums)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # how often each is drawn
    flat = (n, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = sums.sum(0) / counts.sum(0)
        samples = (drawn @ sums.reshape(flat)) / (drawn @ counts.reshape(flat))
        samples = np.where(np.isnan(samples), value.ravel(), samples)  # a resample that drew no question says nothing
        low, high = np.percentile(samples, [2.5, 97.5], axis=0).reshape(2, *value.shape)
    return Estimate(value, low, high)
