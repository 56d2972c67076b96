"""What heads could do, by their weights alone: the directions they read and write, of what rank, and for which head.

A head reads where it looks through w_q w_kᵀ (its QK circuit, [D, D]) and writes what it finds through w_v w_o (its OV
circuit). Neither is ever formed: everything follows from factors with H columns.

All measures are Tallies of count 1 with the value for random weights of the same shapes beside it; models (seeds) and
layers are axes in front. Normalisation before the attention is left out: scale w_q, w_k and w_v by it if you like.

References:
  Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax.statistics import Tally

_HIGHEST = jax.lax.Precision.HIGHEST


def principal_angles(weights: ArrayLike, *, key: Array | None = None, draws: int = 32) -> Tally:
    """Angles between the subspaces of the residual stream that two heads use, in radians, smallest first.

    Args:
      weights: [..., N, D, H] with H ≤ D: w_q, w_k, w_v, or w_o with its last two axes swapped. Columns that depend on
        each other span less than H dimensions; the rest of the H directions is then arbitrary.
      key: PRNG key of the baseline.
      draws: pairs of random subspaces for the baseline.

    Returns:
      Tally [..., N, N, H]. The baseline is the mean of the angles between random subspaces of this size: where D is
      much larger than H these are nearly orthogonal already.

    Raises:
      ValueError: if H > D.

    References:
      Björck & Golub 1973, "Numerical Methods for Computing Angles Between Linear Subspaces" (cosines, and sines for
      small angles).
    """
    bases = _bases("principal_angles", weights)
    key = jax.random.key(0) if key is None else key
    random = jnp.linalg.qr(jax.random.normal(key, (2, draws, *bases.shape[-2:]), bases.dtype))[0]
    baseline = jnp.mean(_angles(random[0], random[1]), axis=0)
    angles = _angles(bases[..., :, None, :, :], bases[..., None, :, :, :])
    return Tally(angles, jnp.ones_like(angles), jnp.broadcast_to(baseline, angles.shape))


def subspace_overlap(weights: ArrayLike) -> Tally:
    """Mean squared cosine of the principal angles, ‖QᵀQ'‖² / H: 1 is the same subspace, 0 orthogonal ones.

    Args:
      weights: as in `principal_angles`.

    Returns:
      Tally [..., N, N]. The baseline is exact: H/D for random subspaces, 1 for a head with itself.
    """
    bases = _bases("subspace_overlap", weights)
    count, width, size = bases.shape[-3:]
    products = jnp.einsum("...ndh,...mdg->...nmhg", bases, bases, precision=_HIGHEST)
    total = jnp.sum(jnp.square(products), axis=(-2, -1)) / size
    chance = jnp.where(jnp.eye(count, dtype=bool), 1, size / width)
    return Tally(total, jnp.ones_like(total), jnp.broadcast_to(chance, total.shape))


def effective_rank(left: ArrayLike, right: ArrayLike, *, key: Array | None = None, draws: int = 32) -> Tally:
    """How many directions a circuit uses: exp of the entropy of its normalised singular values, from 1 to H.

    Args:
      left: [..., N, D, H]: w_v for OV circuits, w_q for QK circuits; or K heads, each shared by N/K.
      right: [..., N, H, D]: w_o for OV, w_k with its last two axes swapped for QK; likewise.
      key: PRNG key of the baseline.
      draws: random circuits for the baseline.

    Returns:
      Tally [..., N]; a circuit of zeros has 0. The baseline is the mean for factors of independent normal numbers.

    Raises:
      ValueError: if the shapes do not fit together.

    References:
      Roy & Vetterli 2007, "The Effective Rank: A Measure of Effective Dimensionality", section 2.
    """
    left, right = _factors("effective_rank", left, right)
    key_left, key_right = jax.random.split(jax.random.key(0) if key is None else key)
    random = (
        jax.random.normal(key_left, (draws, *left.shape[-2:]), left.dtype),
        jax.random.normal(key_right, (draws, *right.shape[-2:]), right.dtype),
    )
    total = _effective_rank(left, right)
    return Tally(total, jnp.ones_like(total), jnp.full_like(total, jnp.mean(_effective_rank(*random))))


class Composition(NamedTuple):
    """How much later heads read of what earlier ones write, each a Tally [..., N earlier, N later]."""

    queries: Tally
    keys: Tally
    values: Tally


def composition(earlier: Any, later: Any) -> Composition:
    """Q-, K- and V-composition: ‖OV₁ X₂‖ / (‖OV₁‖ ‖X₂‖) in Frobenius norms, X₂ being QK₂, QK₂ᵀ and OV₂.

    Of a stack: `composition(jax.tree.map(lambda w: w[:-1], p), jax.tree.map(lambda w: w[1:], p))` for layers in a row.

    Args:
      earlier: `attention.Params` (w_q, w_k, w_v, w_o) of a layer, axes in front allowed.
      later: of a layer after it; the same, or broadcasting, axes in front. Biases are left out.

    Returns:
      Three Tallies. The baseline is 1/√D: the root mean square of the measure when one of the two is turned at random
      in the residual stream, exactly; so it is for random matrices too.

    Raises:
      ValueError: if the two do not have the same D.

    References:
      Elhage et al. 2021, section "Two-Layer Attention-Only Transformers" (their matrices act on columns, ours on rows).
    """
    w_v, w_o = _factors("composition", earlier.w_v, earlier.w_o)
    later_q, later_k = _factors("composition", later.w_q, jnp.swapaxes(jnp.asarray(later.w_k), -1, -2))
    later_v, later_o = _factors("composition", later.w_v, later.w_o)
    if w_o.shape[-1] != later_q.shape[-2]:
        raise ValueError(
            f"circuits.composition: both layers must have the same D, got {w_o.shape[-1]} and {later_q.shape[-2]}."
        )

    def score(left: Array, right: Array) -> Tally:
        """Of the circuit left · right, [..., N, D, H] and [..., N, H, D], that reads what earlier heads write."""
        middle = jnp.einsum("...nhd,...mdg->...nmhg", w_o, left, precision=_HIGHEST)
        whole = _norm(_triangle(w_v)[..., :, None, :, :], middle, _triangle(right.swapaxes(-1, -2))[..., None, :, :, :])
        alone = jnp.linalg.norm(_core(w_v, w_o), axis=(-2, -1))[..., :, None]
        other = jnp.linalg.norm(_core(left, right), axis=(-2, -1))[..., None, :]
        value = jnp.where(alone * other > 0, whole / jnp.where(alone * other > 0, alone * other, 1), 0)
        return Tally(value, jnp.ones_like(value), jnp.full_like(value, w_o.shape[-1] ** -0.5))

    turned = jnp.swapaxes(later_k, -1, -2), jnp.swapaxes(later_q, -1, -2)
    return Composition(score(later_q, later_k), score(*turned), score(later_v, later_o))


def _bases(name: str, weights: ArrayLike) -> Array:
    """Orthonormal columns that span the same, [..., N, D, H]."""
    weights = jnp.asarray(weights)
    if weights.ndim < 3 or weights.shape[-1] > weights.shape[-2]:
        raise ValueError(
            f"circuits.{name}: weights must be [..., N, D, H] with H ≤ D, got {weights.shape}; "
            "swap the last two axes of w_o."
        )
    return jnp.linalg.qr(weights)[0]


def _angles(a: Array, b: Array) -> Array:
    """Principal angles between orthonormal [..., D, H], ascending [..., H]."""
    inner = jnp.einsum("...dh,...dg->...hg", a, b, precision=_HIGHEST)
    beside = b - jnp.einsum("...dh,...hg->...dg", a, inner, precision=_HIGHEST)
    cosines = jnp.linalg.svd(inner, compute_uv=False)  # descending
    sines = jnp.linalg.svd(beside, compute_uv=False)[..., ::-1]  # ascending
    near = jnp.square(cosines) > 0.5
    return jnp.where(near, jnp.arcsin(jnp.clip(sines, 0, 1)), jnp.arccos(jnp.clip(cosines, 0, 1)))


def _factors(name: str, left: ArrayLike, right: ArrayLike) -> tuple[Array, Array]:
    """[..., N, D, H] and [..., N, H, D], shared heads repeated."""
    left, right = jnp.asarray(left), jnp.asarray(right)
    if min(left.ndim, right.ndim) < 3 or left.shape[-1] != right.shape[-2]:
        raise ValueError(
            f"circuits.{name}: a circuit must have factors [..., N, D, H] and [..., N, H, D], got {left.shape} and "
            f"{right.shape}; swap the last two axes of w_k."
        )
    heads = max(left.shape[-3], right.shape[-3])
    if heads % left.shape[-3] or heads % right.shape[-3]:
        raise ValueError(
            f"circuits.{name}: {left.shape[-3]} heads cannot be shared by {right.shape[-3]}: one must be a multiple."
        )
    return (
        jnp.repeat(left, heads // left.shape[-3], axis=-3),
        jnp.repeat(right, heads // right.shape[-3], axis=-3),
    )


def _triangle(weights: Array) -> Array:
    """R of [..., D, H], which has the same singular values whatever is to its right."""
    return jnp.linalg.qr(weights)[1]


def _core(left: Array, right: Array) -> Array:
    """A small matrix with the singular values of left · right other than 0."""
    return jnp.matmul(_triangle(left), _triangle(right.swapaxes(-1, -2)).swapaxes(-1, -2), precision=_HIGHEST)


def _norm(left: Array, middle: Array, right: Array) -> Array:
    """‖left · middle · rightᵀ‖."""
    product = jnp.matmul(jnp.matmul(left, middle, precision=_HIGHEST), right.swapaxes(-1, -2), precision=_HIGHEST)
    return jnp.linalg.norm(product, axis=(-2, -1))


def _effective_rank(left: Array, right: Array) -> Array:
    values = jnp.linalg.svd(_core(left, right), compute_uv=False)
    whole = jnp.sum(values, axis=-1, keepdims=True)
    shares = values / jnp.where(whole > 0, whole, 1)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1)), axis=-1)
    return jnp.where(whole[..., 0] > 0, jnp.exp(entropy), 0)
