"""Whether a ranking would be the same again: how much of its top is there with other units, or another seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from mhajax.statistics.estimates import Tally


class Stability(NamedTuple):
    """How much of the top k comes again.

    Attributes:
      overlap: mean Jaccard overlap |A ∩ B| / |A ∪ B|; 1: always the same.
      low, high: what 95 in 100 of the overlaps lie between.
      chance: what two rankings at random have on average.
    """

    overlap: float
    low: float
    high: float
    chance: float


def jaccard(a: ArrayLike, b: ArrayLike, top: int) -> np.ndarray:
    """Overlap |A ∩ B| / |A ∪ B| of the `top` largest of two rankings of the same things.

    Args:
      a, b: values, larger is higher, [..., M]; the leading axes broadcast. Of equal values the first is higher.
      top: k.

    Returns:
      [...].

    Raises:
      ValueError: the last axes differ, or top is not from 1 to M.

    >>> jaccard([5.0, 4, 3, 1], [5.0, 1, 3, 2], 2).round(2).item()  # {0, 1} and {0, 2}
    0.33
    """
    both = [np.asarray(one, float) for one in (a, b)]
    if any(one.ndim == 0 for one in both) or both[0].shape[-1] != both[1].shape[-1]:
        raise ValueError(
            f"statistics.jaccard: a and b must be values of the same M things, [..., M], got {both[0].shape} and "
            f"{both[1].shape}."
        )
    chosen = [_top("jaccard", one, top) for one in both]
    common = np.sum(chosen[0] & chosen[1], axis=-1)
    return common / (2 * top - common)


def bootstrap_stability(tally: Tally, top: int, *, resamples: int = 1000, seed: int = 0) -> Stability:
    """How much of the top of a ranking would come again with other sentences like these.

    Sentences are drawn again with replacement; each overlap is that of two such drawings, as of two data sets.

    Args:
      tally: of the ranked things, sentences first, [sentences, ...]; larger is higher. Turn the sign for the lowest.
      top: k of all of them together.
      resamples: pairs of drawings.
      seed: of the drawing.

    Raises:
      ValueError: fewer than two sentences, or top is not from 1 to M.

    >>> clear = Tally(np.array([[3.0, 2, 1], [3, 2, 0], [4, 2, 1]]), np.array(1), np.array(0))
    >>> bootstrap_stability(clear, 1)
    Stability(overlap=1.0, low=1.0, high=1.0, chance=0.3333333333333333)

    References:
      Méloux et al. 2025, "Mechanistic Interpretability as Statistical Estimation: A Variance Analysis of EAP-IG"
      (arXiv 2510.00845): Jaccard overlap of circuits over bootstrap resamples.
    """
    total, count = np.broadcast_arrays(*(np.asarray(part, float) for part in tally[:2]))
    if total.ndim < 2 or len(total) < 2:
        raise ValueError(
            "statistics.bootstrap_stability: tally must be [sentences, ...] with at least 2 sentences and something to "
            f"rank, got {total.shape}."
        )
    total, count = (part.reshape(len(part), -1) for part in (total, count))
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(total), np.full(len(total), 1 / len(total)), size=(2, resamples))
    sums, counts = drawn @ total, drawn @ count
    first, second = np.divide(sums, counts, out=np.full_like(sums, -np.inf), where=counts > 0)
    return _stability(jaccard(first, second, top), top, total.shape[1])


def agreement(values: ArrayLike, top: int) -> Stability:
    """How much of the top of a ranking is the same for every two seeds, or every two ways of ranking.

    Args:
      values: one ranking a row, larger is higher, [seeds, ...]. Indices must mean the same in all: heads of different
        trainings have to be matched before, see `heads.matching`.
      top: k.

    Raises:
      ValueError: fewer than two rows, or top is not from 1 to M.

    >>> agreement([[3.0, 2, 1], [3, 1, 2], [3, 2, 0]], 2).overlap  # 1/3, 1 and 1/3
    0.5555555555555555
    """
    given = np.asarray(values, float)
    if given.ndim < 2 or len(given) < 2:
        raise ValueError(
            "statistics.agreement: values must be [seeds, ...] with at least 2 seeds and something to rank, got "
            f"{given.shape}."
        )
    flat = given.reshape(len(given), -1)
    pairs = np.triu_indices(len(flat), 1)
    return _stability(jaccard(flat[pairs[0]], flat[pairs[1]], top), top, flat.shape[1])


def _top(who: str, values: np.ndarray, top: int) -> np.ndarray:
    """Bool [..., M], the largest."""
    if not 1 <= top <= values.shape[-1]:
        raise ValueError(f"statistics.{who}: top must be from 1 to {values.shape[-1]}, got {top}.")
    order = np.argsort(-values, axis=-1, kind="stable")[..., :top]
    chosen = np.zeros(values.shape, bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def _stability(overlaps: np.ndarray, top: int, things: int) -> Stability:
    common = np.arange(top + 1)
    chance = np.sum(stats.hypergeom.pmf(common, things, top, top) * common / (2 * top - common))
    low, high = np.quantile(overlaps, [0.025, 0.975])
    return Stability(float(np.mean(overlaps)), float(low), float(high), float(chance))
