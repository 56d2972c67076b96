"""Which head of one model is which head of another: head numbers mean nothing across seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from mhajax.statistics import Measure


class Matching(NamedTuple):
    """Pairs of heads.

    Attributes:
      order: for each head of the first model its partner in the second, [N]; -1 where there are too few. For as many
        heads, indexing the second model's heads with it puts them where their partners are: `surgery.permute`, or
        `params.w_q[order]`.
      similarity: of each pair, [N]; NaN without partner.
      mean: of the pairs.
      baseline: mean under random matching, the same blocks.
    """

    order: np.ndarray
    similarity: np.ndarray
    mean: float
    baseline: float


def match(similarity: ArrayLike, *, blocks: tuple[ArrayLike, ArrayLike] | None = None) -> Matching:
    """Give each head the partner so that the sum of similarities is largest (Hungarian algorithm).

    Even heads that have nothing in common reach more than `baseline` when matched, as the best of many matchings is
    taken: compare with matched untrained models as well (`stability`).

    Args:
      similarity: of each head of one model to each of the other, larger is more alike, [N, N']. All layers: flatten
        [L, N] to one axis on both sides.
      blocks: a number for each head of both, ([N], [N']); only heads with the same number are matched. To stay within
        layers, `np.repeat(np.arange(L), N)` twice. None: any with any.

    Returns:
      A Matching.

    Raises:
      ValueError: similarity is not a finite matrix, or blocks do not fit it.

    Example:
      >>> match([[0.1, 0.9], [0.8, 0.7]]).order.tolist()
      [1, 0]

    References:
      Kuhn 1955, "The Hungarian Method". Li et al. 2016, "Convergent Learning", section 3.2 (one-to-one matching of
      units of networks).
    """
    matrix = np.asarray(similarity, float)
    if matrix.ndim != 2 or 0 in matrix.shape or not np.isfinite(matrix).all():
        raise ValueError(f"matching.match: similarity must be a matrix [N, N'] of finite numbers, got {matrix.shape}.")
    ours, theirs = (np.zeros(size, int) for size in matrix.shape) if blocks is None else map(np.asarray, blocks)
    if (*ours.shape, *theirs.shape) != matrix.shape:
        raise ValueError(
            f"matching.match: blocks must be a number for each head, ({matrix.shape[0]},) and ({matrix.shape[1]},), "
            f"got {ours.shape} and {theirs.shape}."
        )
    order, expected = np.full(len(matrix), -1), 0.0
    for block in np.intersect1d(ours, theirs):
        rows, columns = np.flatnonzero(ours == block), np.flatnonzero(theirs == block)
        part = matrix[np.ix_(rows, columns)]
        left, right = optimize.linear_sum_assignment(part, maximize=True)
        order[rows[left]] = columns[right]
        expected += part.mean() * len(left)
    pairs = order >= 0
    if not pairs.any():
        raise ValueError(f"matching.match: no head of the two models is in the same block, {ours} and {theirs}.")
    found = np.where(pairs, matrix[np.arange(len(matrix)), order], np.nan)
    return Matching(order, found, float(found[pairs].mean()), float(expected / pairs.sum()))


class Stability(NamedTuple):
    """How alike seeds are once their heads are matched.

    Attributes:
      matched: mean similarity of matched heads over all pairs of seeds, with its interval; `baseline` is that of random
        matching.
      untrained: the same for untrained models, if they were given: matching alone reaches so much.
      heads: for each head of the first seed, how alike its partners in the other seeds are on average, [N]; NaN where
        it never has one.
    """

    matched: Measure
    untrained: Measure | None
    heads: np.ndarray


def stability(
    similarities: ArrayLike,
    *,
    untrained: ArrayLike | None = None,
    blocks: ArrayLike | None = None,
    level: float = 0.95,
) -> Stability:
    """Match the heads of every pair of seeds and say how alike they are.

    The interval is over seeds, by the jackknife with Student's t: pairs that share a seed are not independent, so a
    seed is left out with all its pairs.

    Args:
      similarities: of each head of each seed to each head of each other, [seeds, seeds, N, N]; the diagonal is ignored.
      untrained: the same for untrained models.
      blocks: a number for each head, [N]; only heads with the same number are matched, as in `match`.
      level: of the interval.

    Returns:
      A Stability.

    Raises:
      ValueError: similarities are not [seeds, seeds, N, N] with at least 3 seeds.

    Example:
      >>> import numpy as np
      >>> orders = [[0, 1, 2], [2, 0, 1], [1, 0, 2], [0, 2, 1]]  # the same three heads, in another order each time
      >>> seeds = [np.eye(3)[order] for order in orders]
      >>> found = stability([[a @ b.T for b in seeds] for a in seeds])
      >>> found.matched.value.item(), round(found.matched.baseline.item(), 2), found.heads.tolist()
      (1.0, 0.33, [1.0, 1.0, 1.0])

    References:
      Arvesen 1969, "Jackknifing U-Statistics" (means over pairs).
    """
    given = np.asarray(similarities, float)
    matched, first = _over_seeds(given, blocks, level)
    chance = None if untrained is None else _over_seeds(np.asarray(untrained, float), blocks, level)[0]
    counted = (~np.isnan(first)).sum(0)
    heads = np.where(counted > 0, np.nansum(first, 0) / np.maximum(counted, 1), np.nan)
    return Stability(matched, chance, heads)


def between(similarity, seeds: Sequence) -> np.ndarray:
    """The similarities of all pairs of seeds, for `stability`.

    Args:
      similarity: (what one seed's heads gave, what another's gave, on the same sentences) → [N, N'], symmetric.
      seeds: what each seed's heads gave: outputs, or patterns; whatever `similarity` takes.

    Returns:
      [seeds, seeds, N, N]; on the diagonal zeros.

    Example:
      >>> import numpy as np
      >>> between(lambda a, b: a @ b.T, [np.eye(2), np.eye(2)[::-1]])[0, 1].tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    pairs = {
        pair: np.asarray(similarity(seeds[pair[0]], seeds[pair[1]])) for pair in combinations(range(len(seeds)), 2)
    }
    out = np.zeros((len(seeds), len(seeds), *next(iter(pairs.values())).shape))
    for (a, b), matrix in pairs.items():
        out[a, b], out[b, a] = matrix, matrix.T
    return out


def _over_seeds(similarities: np.ndarray, blocks: ArrayLike | None, level: float) -> tuple[Measure, np.ndarray]:
    """Mean over pairs with an interval, and the similarities of the pairs of the first seed's heads [seeds - 1, N]."""
    shape = similarities.shape
    if len(shape) != 4 or shape[0] != shape[1] or shape[2] != shape[3] or shape[0] < 3:
        raise ValueError(
            "matching.stability: similarities must be [seeds, seeds, N, N] with at least 3 seeds (with fewer there is "
            f"no interval), got {shape}; two models: matching.match."
        )
    seeds = shape[0]
    both = None if blocks is None else (blocks, blocks)
    found = {(a, b): match(similarities[a, b], blocks=both) for a, b in combinations(range(seeds), 2)}
    value, baseline = (float(np.mean([getattr(m, part) for m in found.values()])) for part in ("mean", "baseline"))
    without = np.array([np.mean([m.mean for pair, m in found.items() if left not in pair]) for left in range(seeds)])
    error = np.sqrt((seeds - 1) / seeds * ((without - without.mean()) ** 2).sum())
    half = stats.t.ppf(0.5 + level / 2, seeds - 1) * error
    measure = Measure(*(np.asarray(part) for part in (value, value - half, value + half, baseline)))
    return measure, np.stack([found[0, b].similarity for b in range(1, seeds)])
