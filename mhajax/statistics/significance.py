"""Is it more than chance: tests over seeds, over sentences, and over many heads at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from mhajax.statistics.estimates import Tally

_ALL_FLIPS = 15  # up to so many units every pattern of signs is looked at: 32,768


class Paired(NamedTuple):
    """A difference over seeds, each part of the shape of the other axes.

    Attributes:
      difference: mean of a - b.
      low, high: its 95 % interval, by Student's t.
      t_test: two-sided p of the paired t test; for differences that are about normal.
      sign_flip: two-sided p of the sign-flip permutation test, exact for at most 15 seeds; its smallest possible value
        is 2 / 2**seeds: 0.0625 with 5 seeds, 0.03125 with 6.
      effect: the difference in standard deviations of it (Cohen's d of paired samples).
      effect_low, effect_high: 95 % interval of the effect, from the noncentral t distribution.
    """

    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    t_test: np.ndarray
    sign_flip: np.ndarray
    effect: np.ndarray
    effect_low: np.ndarray
    effect_high: np.ndarray


def paired(a: ArrayLike, b: ArrayLike, *, resamples: int = 9999, seed: int = 0) -> Paired:
    """Compare two arms that were run with the same seeds.

    Args:
      a: one number for every seed, [seeds, ...].
      b: of the other arm, same seeds in the same order; or 0, or a baseline that broadcasts.
      resamples: sign flips that are drawn if there are more than 15 seeds.
      seed: of that drawing.

    Returns:
      A Paired of shapes [...]; NaN where the seeds do not differ at all from each other (effect, t_test).

    Raises:
      ValueError: fewer than 2 seeds.

    Example:
      >>> found = paired([3.0, 5.0, 4.0, 6.0], [1.0, 2.0, 3.0, 4.0])
      >>> found.difference.item(), found.sign_flip.item()
      (2.0, 0.125)

    References:
      Good 2005, "Permutation, Parametric, and Bootstrap Tests of Hypotheses", section 3.2 (sign flips). Cumming &
      Finch 2001, "A Primer on … Noncentral Distributions" (the effect's interval).
    """
    given = np.asarray(a, float)
    off = given - np.asarray(b, float)
    if given.ndim == 0 or off.shape != given.shape or len(off) < 2:
        raise ValueError(
            "statistics.paired: a must be [seeds, ...] with at least 2 seeds and b must broadcast to it, got "
            f"{given.shape} and {np.shape(b)}; put the seeds first."
        )
    seeds, flat = len(off), off.reshape(len(off), -1)
    mean, error = flat.mean(0), flat.std(0, ddof=1) / np.sqrt(seeds)
    varies = error > 1e-12 * np.abs(mean)
    t = np.divide(mean, error, out=np.full_like(mean, np.nan), where=varies)
    half = stats.t.ppf(0.975, seeds - 1) * error
    extreme = np.zeros(len(mean))
    tried = 0
    for signs in _signs(seeds, resamples, seed):
        extreme += (np.abs(signs @ flat) >= np.abs(flat.sum(0)) * (1 - 1e-9)).sum(0)
        tried += len(signs)
    sign_flip = np.where(np.isnan(mean), np.nan, extreme / tried)
    effects = [special.nctdtrinc(seeds - 1, p, t) / np.sqrt(seeds) for p in (0.975, 0.025)]
    parts = (mean, mean - half, mean + half, 2 * stats.t.sf(np.abs(t), seeds - 1), sign_flip, t / np.sqrt(seeds))
    return Paired(*(np.asarray(part).reshape(off.shape[1:]) for part in (*parts, *effects)))


def benjamini_hochberg(p: ArrayLike) -> np.ndarray:
    """Adjusted p of many tests: those at most 0.05 are, on average, at most 5 % false ones.

    Args:
      p: any shape; all of it is one family. NaN (nothing was tested) stays NaN and counts for nothing.

    Returns:
      Same shape.

    Example:
      >>> benjamini_hochberg([0.01, 0.02, 0.5]).round(3).tolist()
      [0.03, 0.03, 0.5]

    References:
      Benjamini & Hochberg 1995, "Controlling the False Discovery Rate", section 3.1.
    """
    adjusted = np.array(p, float)
    there = ~np.isnan(adjusted)
    if there.any():
        adjusted[there] = stats.false_discovery_control(adjusted[there], method="bh")
    return adjusted


class Maximum(NamedTuple):
    """Which heads do it, and whether any does.

    Attributes:
      any: p of "there is a head that", one number.
      heads: p of every head, adjusted for having looked at all of them.
    """

    any: float
    heads: np.ndarray


def sign_flips(tally: Tally, *, axis: int = 0, resamples: int = 9999, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How far each head is above its baseline, and how far it would be if that were luck: for `max_statistic`.

    If a head is no better than its baseline, a sentence where it wins is as likely as one where it loses by as much;
    so the sign of a sentence's difference may be flipped, the same sentences for all heads (which keeps how heads
    depend on each other). That is exact where differences are symmetric about 0; with a fixed baseline far from 50 %
    they are not. Dividing each head by its own spread would then alarm far too often, so it is not done.

    Args:
      tally: of any measure.
      axis: of the sentences; for one number per seed, of the seeds.
      resamples: patterns of signs that are drawn; up to 15 sentences all are tried.
      seed: of that drawing.

    Returns:
      values [...] and null [resamples, ...], of the axes other than `axis`.

    Example:
      >>> values, null = sign_flips(Tally(np.array([[3.0, 1], [2, 4], [4, 2]]), np.array(4), np.array(2)))
      >>> values.round(2).tolist(), null.shape
      ([0.25, 0.08], (7, 2))
    """
    total, count, baseline = np.broadcast_arrays(*(np.asarray(part, float) for part in tally))
    if not -total.ndim <= axis < total.ndim or not total.shape[axis]:
        raise ValueError(
            "statistics.sign_flips: axis must be the axis of the sentences, at least 1, of a tally, "
            f"got axis={axis} and {total.shape}."
        )
    off = np.moveaxis(total - baseline, axis, 0)
    flat = off.reshape(len(off), -1)
    counted = count.sum(axis).ravel()
    flat = np.divide(flat, counted, out=np.zeros_like(flat), where=counted > 0)
    null = np.concatenate([signs @ flat for signs in _signs(len(flat), resamples, seed)])
    null = null[1:]  # the first pattern flips nothing: `max_statistic` counts what was seen itself
    return flat.sum(0).reshape(off.shape[1:]), null.reshape(len(null), *off.shape[1:])


def max_statistic(values: ArrayLike, null: ArrayLike) -> Maximum:
    """Test "there is a head that": the best of many heads is compared with the best of as many under chance.

    Args:
      values: of the heads, larger is better, [...].
      null: values of the same heads under chance, [samples, ...]: from `sign_flips`, from untrained models, from
        shuffled labels. Values of different heads must be on one scale.

    Returns:
      A Maximum. The p of a head says the chance that *any* head without the property gets so far (step-down: heads
      that were found are left out when the next one is judged). With n samples no p is below 1 / (n + 1). Heads whose
      value is NaN count for nothing, and their p is NaN.

    Raises:
      ValueError: null is not [samples, and the axes of values], or NaN where values are not.

    Example:
      >>> import numpy as np
      >>> chance = np.random.default_rng(0).normal(size=(999, 3))
      >>> found = max_statistic([0.1, 5.0, -1.0], chance)
      >>> found.any, (found.heads < 0.05).tolist()
      (0.001, [False, True, False])

    References:
      Westfall & Young 1993, "Resampling-Based Multiple Testing", algorithm 2.8. Nichols & Holmes 2002, "Nonparametric
      Permutation Tests for Functional Neuroimaging".
    """
    values, null = np.asarray(values, float), np.asarray(null, float)
    if null.shape[1:] != values.shape or values.size == 0 or len(null) == 0:
        raise ValueError(
            f"statistics.max_statistic: null must be [samples, ...] with values of the same heads {values.shape}, "
            f"got {null.shape}; from untrained models, stack one [layers, heads] for each."
        )
    there = ~np.isnan(values)  # what was not measured has no p, and is not the best of all
    if not there.all():
        adjusted = np.full(values.shape, np.nan)
        if not there.any():
            return Maximum(math.nan, adjusted)
        found = max_statistic(values[there], null[:, there])
        adjusted[there] = found.heads
        return Maximum(found.any, adjusted)
    if np.isnan(null).any():
        where = tuple(int(i) for i in np.argwhere(np.isnan(null))[0])
        raise ValueError(
            f"statistics.max_statistic: null must be numbers where values are, got NaN at {where}; it would count as "
            "chance that got less far."
        )
    order = np.argsort(values, axis=None)  # the worst head first
    best = np.maximum.accumulate(null.reshape(len(null), -1)[:, order], axis=1)  # of this head and those below it
    reached = (best >= values.ravel()[order] - 1e-9 * np.abs(values.ravel()[order])).sum(0)
    p = (reached + 1) / (len(null) + 1)
    adjusted = np.empty(values.size)
    adjusted[order] = np.maximum.accumulate(p[::-1])[::-1]
    return Maximum(float(adjusted.min()), adjusted.reshape(values.shape))


def _signs(units: int, resamples: int, seed: int):
    """Patterns of +1 and -1 in pieces [some, units]: all of them for few units, else drawn; the first is all +1."""
    if units <= _ALL_FLIPS:
        yield 1.0 - 2 * ((np.arange(2**units)[:, None] >> np.arange(units)) & 1)
        return
    random = np.random.default_rng(seed)
    yield np.ones((1, units))
    for start in range(0, resamples, 1000):
        yield random.choice([-1.0, 1.0], size=(min(1000, resamples - start), units))
