"""Where heads look: how far, how widely, how much it depends on the words, whether it is always the same place.

First what a query does (`mean_distance`, `entropy`), then measures of heads over sentences, each a `Tally` with
its baseline. These take `visible`, bool, broadcast to the weights: the query is a real token and may attend to that
key. Weights on other keys are taken out and the rest is divided by its sum, so to leave out keys (the first token, the
ends of sentences) is to say that they are not visible. A query that puts no weight on visible keys does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mhajax.statistics import Tally

OFFSETS = tuple(range(-8, 9))


def mean_distance(weights: ArrayLike, positions: ArrayLike, memory_positions: ArrayLike) -> Array:
    """How far each query looks, in tokens: Σ_s weight · |position - memory position|.

    Args:
      weights: attention after the softmax, [..., T, S].
      positions: of the queries, [T] or [..., T].
      memory_positions: of the keys, [S] or [..., S].

    Returns:
      [..., T].

    References:
      Vig & Belinkov 2019, "Analyzing the Structure of Attention", section 4.1 (their mean attention distance is the
      average of this over tokens).
    """
    distance = jnp.abs(jnp.asarray(positions)[..., :, None] - jnp.asarray(memory_positions)[..., None, :])
    return jnp.sum(jnp.asarray(weights) * distance, axis=-1)


def entropy(weights: ArrayLike, visible: ArrayLike) -> Array:
    """How widely each query looks: 0 is one key, 1 is all keys that it may see, equally.

    Args:
      weights: attention after the softmax, [..., T, S].
      visible: number of keys that the mask allows each query, [T] or [..., T].

    Returns:
      [..., T]: the entropy of the weights divided by log of the number of visible keys; 0 where that number is 1 or 0.
    """
    weights = jnp.asarray(weights)
    nats = -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1)), axis=-1)
    visible = jnp.asarray(visible)
    return jnp.where(visible > 1, nats / jnp.log(jnp.maximum(visible, 2)), 0.0)


def without_first(visible: ArrayLike) -> Array:
    """The same pairs but those with the first key, on which many heads rest when they have nothing to do.

    >>> without_first(np.tril(np.ones((3, 3), bool))).tolist()
    [[False, False, False], [False, True, False], [False, True, True]]

    References:
      Vig & Belinkov 2019, section 4.1, on attention to the first token. Xiao et al. 2024, "Efficient Streaming Language
      Models with Attention Sinks", section 3.1.
    """
    visible = jnp.asarray(visible)
    return visible & (jnp.arange(visible.shape[-1]) > 0)


def distance(
    weights: ArrayLike,
    visible: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    memory_positions: ArrayLike | None = None,
) -> Tally:
    """Mean attention distance in tokens: Σ_t Σ_s weight[t, s] |t - s| / number of queries.

    The baseline is exactly uniform attention to the same visible keys: (T² - 1)/(3T) for a whole sentence of T tokens,
    (T - 1)/4 if it is causal. For the distance without the first token's share: `without_first(visible)`.

    Args:
      weights: attention after the softmax, [..., T, S].
      visible: bool, broadcasts to [..., T, S].
      positions: of the queries, [T] or [..., T]; 0, 1, 2, … if None.
      memory_positions: of the keys, [S] or [..., S]; 0, 1, 2, … if None.

    Returns:
      Tally over the queries, [...].

    >>> tally = distance(jnp.eye(3)[jnp.array([0, 0, 1])], jnp.tril(jnp.ones((3, 3), bool)))
    >>> float(tally.total), int(tally.count), float(tally.baseline)
    (2.0, 3, 1.5)

    References:
      Vig & Belinkov 2019, "Analyzing the Structure of Attention in a Transformer Language Model", section 4.1.
    """
    seen = _seen(weights, visible)
    t, s = _places(seen.weights, positions, memory_positions)
    uniform = seen.visible / jnp.maximum(seen.keys, 1)[..., None]
    return _tally(mean_distance(seen.weights, t, s), mean_distance(uniform, t, s), seen.counts)


def spread(weights: ArrayLike, visible: ArrayLike) -> Tally:
    """How widely a head looks: the entropy of a query's weights divided by log of the number of visible keys.

    Queries with one visible key have no choice and do not count. The baseline is uniform attention: 1.

    Args:
      weights: attention after the softmax, [..., T, S].
      visible: bool, broadcasts to [..., T, S].

    Returns:
      Tally over the queries, [...]; between 0 (one key) and 1 (all visible keys alike).

    >>> tally = spread(jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([[True, False], [True, True]]))
    >>> float(tally.total), int(tally.count), float(tally.baseline)
    (1.0, 1, 1.0)

    References:
      Vig & Belinkov 2019, section 4.1; Clark et al. 2019, "What Does BERT Look At?", section 3.3. Both in nats, which
      grow with the length of the sentence.
    """
    seen = _seen(weights, visible)
    return _tally(entropy(seen.weights, seen.keys), 1.0, seen.counts & (seen.keys > 1))


def variability(weights: ArrayLike, visible: ArrayLike, *, length: int = 10, axis: int = -4) -> Tally:
    """How much a head's pattern depends on the words: mean absolute deviation from its mean pattern over the sentences.

    Σ_x Σ_t Σ_s |w(x)[t, s] - w̄[t, s]| / (2 Σ_x Σ_t Σ_s w(x)[t, s]), with w̄ the mean over the sentences x: 0 for a
    head that looks at the same places in every sentence; at most 1 - 1/n for n sentences.

    All sentences are needed at once, so they are cut to their first `length` queries and keys. A query counts if it
    sees all keys that queries in its place see in any sentence: so longer sentences differ in their words alone, and
    shorter ones count as far as they go if attention is causal, and not at all if it is not.

    The baseline is a head that does not care for places at all: the same weights on keys drawn anew in every sentence,
    (1 - 1/n) Σ_x Σ_t ½ Σ_s |w(x)[t, s] - 1/v[t]| with v visible keys (exact for weights of 0 and 1, and the limit for
    many sentences). Uniform attention has 0 of 0.

    Args:
      weights: attention after the softmax, [..., T, S], with the sentences at `axis`.
      visible: bool, broadcasts to [..., T, S].
      length: tokens that are compared.
      axis: of the sentences, such as -4 for [L, B, N, T, S].

    Returns:
      Tally over the queries, [...] with the axis of the sentences.

    References:
      Vig & Belinkov 2019, section 4.1 (their first N = 10 tokens).
    """
    weights = jnp.asarray(weights)
    visible = jnp.broadcast_to(visible, weights.shape)
    seen = _seen(weights[..., :length, :length], visible[..., :length, :length])
    most = jnp.any(seen.visible, axis=axis, keepdims=True)
    counts = seen.counts & jnp.all(seen.visible == most, axis=-1)
    of_counted = jnp.where(counts[..., None], seen.weights, 0)
    sentences = jnp.maximum(jnp.sum(counts[..., None], axis=axis, keepdims=True), 1)
    mean = jnp.sum(of_counted, axis=axis, keepdims=True) / sentences
    uniform = seen.visible / jnp.maximum(seen.keys, 1)[..., None]
    half = lambda other: jnp.sum(jnp.abs(seen.weights - other), axis=-1) / 2  # noqa: E731
    return _tally(half(mean), (1 - 1 / sentences[..., 0]) * half(uniform), counts)


def offset_hits(
    weights: ArrayLike,
    visible: ArrayLike,
    offsets: Sequence[int] = OFFSETS,
    *,
    positions: ArrayLike | None = None,
    memory_positions: ArrayLike | None = None,
) -> Tally:
    """How often a head's strongest weight sits at each fixed offset of the key from the query (-1: the token before).

    A query counts for an offset if it sees a key there, and another. The baseline is a key drawn from the visible ones.

    Args:
      weights: attention after the softmax, [..., T, S].
      visible: bool, broadcasts to [..., T, S].
      offsets: O offsets of positions.
      positions, memory_positions: as in `distance`.

    Returns:
      Tally over the queries, [..., O]. `positional` makes of it how positional a head is.

    References:
      Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 5.2.1: a head is positional if that is one
      offset at least 90 % of the time.
    """
    seen = _seen(weights, visible)
    t, s = _places(seen.weights, positions, memory_positions)
    strongest = jnp.argmax(jnp.where(seen.visible, seen.weights, -1), axis=-1)[..., None]
    tallies = []
    for offset in offsets:
        there = jnp.broadcast_to(s[..., None, :] - t[..., :, None] == offset, seen.weights.shape)
        asked = seen.counts & (seen.keys > 1) & jnp.any(there & seen.visible, axis=-1)
        hit = jnp.take_along_axis(there, strongest, axis=-1)[..., 0]
        tallies.append(_tally(hit, 1 / jnp.maximum(seen.keys, 1), asked))
    return Tally(*(jnp.stack(parts, axis=-1) for parts in zip(*tallies, strict=True)))


def positional(found: Tally, offsets: Sequence[int] = OFFSETS, *, axis: int = -3) -> tuple[np.ndarray, Tally]:
    """How positional heads are: each head's own best offset, chosen on every other sentence, and its hits on the rest.

    The best offset is the one that is hit most often (not the largest share: few queries have keys far away).

    Args:
      found: from `offset_hits`, of all sentences.
      offsets: those it was asked for.
      axis: of the sentences, such as -3 for [L, B, N, O].

    Returns:
      The offset of every head, [...] without the sentences, and the Tally of that offset on the sentences on which it
      was not chosen, [..., sentences, ...] without the offsets.

    Raises:
      ValueError: for less than two sentences, or other offsets than were asked for.

    >>> weights, causal = jnp.eye(4)[jnp.array([0, 0, 1, 2])], jnp.tril(jnp.ones((4, 4), bool))
    >>> found = offset_hits(jnp.stack([weights] * 2)[:, None], causal)  # [B, N, O]
    >>> best, tally = positional(found)
    >>> best.tolist(), tally.total.tolist(), tally.count.tolist()
    ([-1], [[3]], [[3]])
    """
    total = np.moveaxis(np.asarray(found.total), axis, 0)
    count, baseline = (np.moveaxis(np.broadcast_to(a, found.total.shape), axis, 0) for a in found[1:])
    if len(total) < 2 or total.shape[-1] != len(offsets):
        raise ValueError(
            f"patterns.positional: found must have two sentences or more at axis={axis} and O={len(offsets)} offsets "
            f"at its end, got {found.total.shape}."
        )
    best = np.argmax(total[::2].sum(0), axis=-1)  # [...]
    rest = (np.take_along_axis(a[1::2], best[None, ..., None], axis=-1)[..., 0] for a in (total, count, baseline))
    place = axis if axis >= 0 else axis + 1  # there is no axis of offsets any more
    return np.asarray(offsets)[best], Tally(*(np.moveaxis(a, 0, place) for a in rest))


class _Seen(NamedTuple):
    """The weights on visible keys."""

    weights: Array  # [..., T, S], float32; they sum to 1 where a query counts
    visible: Array  # bool [..., T, S]
    keys: Array  # visible keys of each query, [..., T]
    counts: Array  # bool [..., T]


def _seen(weights: ArrayLike, visible: ArrayLike) -> _Seen:
    weights = jnp.asarray(weights)
    visible = jnp.broadcast_to(visible, weights.shape)
    kept = jnp.where(visible, weights, 0).astype(jnp.promote_types(weights.dtype, jnp.float32))
    total = jnp.sum(kept, axis=-1, keepdims=True)
    return _Seen(
        kept / jnp.where(total > 0, total, 1), visible, jnp.sum(visible, axis=-1), jnp.squeeze(total > 0, axis=-1)
    )


def _places(weights: Array, positions: ArrayLike | None, memory_positions: ArrayLike | None) -> tuple[Array, Array]:
    given = zip((positions, memory_positions), weights.shape[-2:], strict=True)
    t, s = (jnp.arange(length) if places is None else jnp.asarray(places) for places, length in given)
    return t, s


def _tally(values: Array, baseline: ArrayLike, counts: Array) -> Tally:
    """Sums over the queries [..., T] that count."""
    total = lambda a: jnp.sum(jnp.where(counts, a, 0), axis=-1)  # noqa: E731
    return Tally(total(values), jnp.sum(counts, axis=-1), total(baseline))
