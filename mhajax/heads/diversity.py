"""How much the heads of an attention differ: in what they read, where they look, what they write, in their weights.

Measures of pairs of heads are Tallies with two axes of heads, [..., N, N]; `disagreement` and `between` make one number
of them. Li et al.'s three terms are

    D_subspace = disagreement(cosines(values))
    D_position = disagreement(overlaps(weights, visible))
    D_output   = disagreement(cosines(heads))

whose mean includes the pairs of a head with itself, which say nothing: `between` leaves these out.

What heads could do, by their weights alone, is in `circuits` and `copying`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax.statistics import Tally

_HIGHEST = jax.lax.Precision.HIGHEST


def cosines(vectors: ArrayLike, real: ArrayLike | None = None) -> Tally:
    """Cosine between what two heads make of the same token, summed over tokens.

    Args:
      vectors: values or outputs of heads, [..., N, T, H].
      real: which tokens count, bool, broadcasts to [..., T] (without the axis of heads).

    Returns:
      Tally [..., N, N], count [..., 1, 1]. The baseline is heads of independent random directions: 0, and 1 for a head
      with itself. A vector of zeros has cosine 0.

    References:
      Li et al. 2018, "Multi-Head Attention with Disagreement Regularization", section 3.2, equations 6 and 8 (before
      their sign and mean).
    """
    vectors = _floating("cosines", "vectors [..., N, T, H]", vectors, 3)
    real = _real(real, (*vectors.shape[:-3], vectors.shape[-2]))
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    unit = jnp.where(real[..., None, :, None] & (length > 0), vectors / jnp.where(length > 0, length, 1), 0)
    total = jnp.einsum("...nth,...mth->...nm", unit, unit, precision=_HIGHEST)
    count = jnp.sum(real, axis=-1)[..., None, None]
    return Tally(total, count, jnp.broadcast_to(count * jnp.eye(total.shape[-1]), total.shape))


def overlaps(weights: ArrayLike, visible: ArrayLike) -> Tally:
    """How much two heads look at the same keys: Σ_s weight · weight', summed over queries.

    Args:
      weights: attention after the softmax, [..., N, T, S].
      visible: bool, broadcasts to [..., N, T, S]; 1 or absent on the axis of heads.

    Returns:
      Tally [..., N, N], count [..., 1, 1]. The baseline is uniform attention: 1 / (visible keys). It is also what two
      heads have that look at unrelated places, however sharply.

    References:
      Li et al. 2018, section 3.2, equation 7 (before their sign and mean; theirs sums over queries).
    """
    weights, visible = _pattern("overlaps", weights, visible)
    weights = jnp.where(visible[..., None, :, :], weights, 0)
    total = jnp.einsum("...nts,...mts->...nm", weights, weights, precision=_HIGHEST)
    keys = jnp.sum(visible, axis=-1)
    baseline = jnp.sum(jnp.where(keys > 0, 1 / jnp.maximum(keys, 1), 0), axis=-1)[..., None, None]
    return Tally(total, jnp.sum(keys > 0, axis=-1)[..., None, None], jnp.broadcast_to(baseline, total.shape))


def jensen_shannon(weights: ArrayLike, visible: ArrayLike, *, key: Array | None = None) -> Tally:
    """Jensen–Shannon divergence between where two heads look, in bits: 0 the same, 1 no key in common.

    H((p + q) / 2) - (H(p) + H(q)) / 2 for every query, summed over queries.

    Args:
      weights: attention after the softmax, [..., N, T, S].
      visible: bool, broadcasts to [..., N, T, S]; 1 or absent on the axis of heads.
      key: PRNG key of the baseline.

    Returns:
      Tally [..., N, N], count [..., 1, 1]. The baseline is the same heads after the visible keys of one of the two were
      shuffled: as sharp, but looking at unrelated places. Heads that share what they look at lie below it.

    References:
      Lin 1991, "Divergence Measures Based on the Shannon Entropy", section IV; between heads: Clark et al. 2019, "What
      Does BERT Look At?", section 6.
    """
    weights, visible = _pattern("jensen_shannon", weights, visible)
    weights = jnp.where(visible[..., None, :, :], weights, 0)
    key = jax.random.key(0) if key is None else key
    shuffled = _shuffled(key, weights, jnp.broadcast_to(visible[..., None, :, :], weights.shape))
    heads = jnp.moveaxis(weights, -3, 0)

    def to_all(one: Array, others: Array) -> Array:
        """From a head [..., T, S] to others [..., N, T, S]: [..., N]."""
        one = one[..., None, :, :]
        each = _bits((one + others) / 2) - (_bits(one) + _bits(others)) / 2
        return jnp.sum(jnp.maximum(each, 0), axis=-1)

    total, baseline = jax.lax.map(lambda one: (to_all(one, weights), to_all(one, shuffled)), heads)
    total, baseline = (jnp.moveaxis(pairs, 0, -2) for pairs in (total, baseline))
    return Tally(total, jnp.sum(jnp.any(visible, axis=-1), axis=-1)[..., None, None], baseline)


def disagreement(pairs: Tally) -> Tally:
    """Minus the mean over all pairs of heads, those of a head with itself included: what Li et al. maximise.

    Args:
      pairs: of `cosines` or `overlaps`, [..., N, N].

    Returns:
      Tally [...].

    References:
      Li et al. 2018, section 3.2.
    """
    return Tally(-_mean(pairs.total), _dropped(pairs), -_mean(pairs.baseline))


def between(pairs: Tally) -> Tally:
    """The mean over pairs of different heads, [...] of [..., N, N]."""
    heads = jnp.shape(pairs.total)[-1]
    off = 1 - jnp.eye(heads)
    share = 1 / max(heads * (heads - 1), 1)
    total, baseline = (jnp.sum(jnp.asarray(a) * off, axis=(-2, -1)) * share for a in (pairs.total, pairs.baseline))
    return Tally(total, _dropped(pairs), baseline)


def linear_cka(outputs: ArrayLike, real: ArrayLike | None = None) -> Tally:
    """Similarity of what heads write, whatever its rotation and scale: 1 is the same, ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖).

    Args:
      outputs: of heads over many tokens, [..., N, T, H]: put the tokens of all sentences on one axis.
      real: which tokens count, bool, broadcasts to [..., T] (without the axis of heads).

    Returns:
      Tally [..., N, N] of count 1. The baseline is exact: the mean over all ways to pair the tokens at random (of the
      numerator), tr(XXᵀ) tr(YYᵀ) / (tokens - 1). It is far from 0 for few tokens; `debiased_cka` has 0.

    References:
      Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", section 3.
    """
    x, squares, tokens = _centred("linear_cka", outputs, real)
    cross = _cross(x)
    trace = jnp.sum(squares, axis=-1)  # [..., N]
    size = jnp.sqrt(jnp.diagonal(cross, axis1=-2, axis2=-1))
    chance = _pairs(trace) / jnp.maximum(tokens - 1, 1)[..., None, None]
    return Tally(_over(cross, _pairs(size)), jnp.ones_like(cross), _over(chance, _pairs(size)))


def debiased_cka(outputs: ArrayLike, real: ArrayLike | None = None) -> Tally:
    """`linear_cka` with the unbiased estimate of each term, for more than 3 tokens; unrelated heads have 0, not more.

    Args:
      outputs, real: as in `linear_cka`.

    Returns:
      Tally [..., N, N] of count 1; the baseline, tokens paired at random, is 0.

    References:
      Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?", equation 3; Song et al. 2012, "Feature
      Selection via Dependence Maximization", theorem 5.
    """
    x, squares, tokens = _centred("debiased_cka", outputs, real)
    n = jnp.maximum(tokens, 4)[..., None, None].astype(x.dtype)
    # With a diagonal of zeros, K - diag(K): its products and sums from those of the features.
    rows = -squares  # K's rows sum to 0 after centring: [..., N, T]
    dot = lambda a, b: jnp.einsum("...nt,...mt->...nm", a, b, precision=_HIGHEST)  # noqa: E731
    sums = jnp.sum(rows, axis=-1)
    unbiased = _cross(x) - dot(squares, squares) + _pairs(sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * dot(rows, rows)
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(unbiased, axis1=-2, axis2=-1), 0))
    cka = _over(unbiased, _pairs(size))
    return Tally(cka, jnp.ones_like(cka), jnp.zeros_like(cka))


def _mean(pairs: ArrayLike) -> Array:
    return jnp.mean(jnp.asarray(pairs), axis=(-2, -1))


def _dropped(pairs: Tally) -> Array:
    """The count without the two axes of heads."""
    return jnp.asarray(pairs.count)[..., 0, 0]


def _pairs(x: Array) -> Array:
    """x_n x_m, [..., N, N]."""
    return x[..., :, None] * x[..., None, :]


def _over(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def _bits(weights: Array) -> Array:
    """Entropy over the last axis."""
    return -jnp.sum(weights * jnp.log2(jnp.where(weights > 0, weights, 1)), axis=-1)


def _shuffled(key: Array, weights: Array, visible: Array) -> Array:
    """The visible weights of every row in random order, at visible keys."""
    places = jnp.argsort(~visible, axis=-1, stable=True)  # visible keys first, in order
    drawn = jnp.argsort(jnp.where(visible, jax.random.uniform(key, visible.shape), 2), axis=-1)  # and in random order
    back = jnp.argsort(drawn, axis=-1)
    return jnp.take_along_axis(jnp.take_along_axis(weights, places, axis=-1), back, axis=-1)


def _cross(x: Array) -> Array:
    """‖X_nᵀ X_m‖² for every pair of heads of [..., N, T, H]."""
    products = jnp.einsum("...nth,...mtg->...nmhg", x, x, precision=_HIGHEST)
    return jnp.sum(jnp.square(products), axis=(-2, -1))


def _centred(name: str, outputs: ArrayLike, real: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Outputs minus their mean over real tokens (0 elsewhere), their squared lengths [..., N, T], how many tokens."""
    x = _floating(name, "outputs [..., N, T, H]", outputs, 3)
    real = _real(real, (*x.shape[:-3], x.shape[-2]))
    tokens = jnp.sum(real, axis=-1)
    where = real[..., None, :, None]
    x = jnp.where(where, x, 0)
    mean = jnp.sum(x, axis=-2, keepdims=True) / jnp.maximum(tokens, 1)[..., None, None, None]
    x = jnp.where(where, x - mean, 0)
    return x, jnp.sum(jnp.square(x), axis=-1), tokens


def _floating(name: str, what: str, x: ArrayLike, axes: int) -> Array:
    x = jnp.asarray(x)
    if x.ndim < axes or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"diversity.{name}: must get {what}, floating point, got {x.dtype} {x.shape}.")
    return x


def _real(real: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """[..., T]; all of them if None."""
    return jnp.broadcast_to(True if real is None else jnp.asarray(real), shape)


def _pattern(name: str, weights: ArrayLike, visible: ArrayLike) -> tuple[Array, Array]:
    """Weights [..., N, T, S], and visible [..., T, S] without the axis of heads."""
    weights, visible = _floating(name, "weights [..., N, T, S]", weights, 3), jnp.asarray(visible)
    if visible.ndim > 2:
        if visible.shape[-3] != 1:
            raise ValueError(
                f"diversity.{name}: visible must have 1 on the axis of heads, [..., 1, T, S], or be [T, S], got "
                f"{visible.shape}; heads that see different keys cannot be compared."
            )
        visible = jnp.squeeze(visible, -3)
    return weights, jnp.broadcast_to(visible, (*weights.shape[:-3], *weights.shape[-2:]))
