"""Derivatives of a loss with respect to gates: what a small change of a head does, and of two heads together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from mhajax.heads.importance.losses import Loss, flat_by_sentence, of_sentences, sentences, tally, tally_of_sentences
from mhajax.statistics import Tally


def michel(loss: Loss, gates: Any, *, tokens: ArrayLike | None = None) -> Any:
    """Importance I_h = E_x |∂L(x)/∂gate_h|, the absolute value taken for every sentence, in one backward pass.

    The derivative of the mean loss is not that: at a minimum it is small because sentences that want more of a head
    and sentences that want less of it cancel. Baseline: 0, a head that no sentence's loss depends on.

    Args:
      loss: from gates [..., N] or [..., B, N] to losses [B].
      gates: where the derivative is taken; ones.
      tokens: as in `lost`; the loss is a sum over tokens, so that this makes the value independent of length.

    Returns:
      For every leaf [..., N] a Tally with total [..., B, N].

    >>> loss = lambda gates: jnp.sum(jnp.array([[1.0, 2, 3], [-1, 2, 0]]) * gates, axis=-1)  # mean slope 0, 2, 1.5
    >>> michel(loss, jnp.ones(3)).total
    Array([[1., 2., 3.],
           [1., 2., 0.]], dtype=float32)

    References:
      Michel et al. 2019, section 4.1 (their ξ is our gate; they also divide by the l2 norm of a layer, as Molchanov et
      al. 2017 do; we do not).
    """
    slopes = _gradient(loss, of_sentences("michel", loss, gates))
    return jax.tree.map(lambda slope: tally(jnp.abs(slope), tokens), slopes)


def attribution(loss: Loss, amounts: Any, *, tokens: ArrayLike | None = None) -> Any:
    """Attribution patching: the derivative of the loss with respect to the amount of every patch, in one backward pass.

    An estimate to first order of what the whole patch (amount 1) would change: exact if the loss is linear in the
    amounts. Above 0 the patch raises the loss. Baseline: 0, a patch that changes nothing.

    Args:
      loss: from amounts [..., N] or [..., B, N] to losses [B]: any function, such as a model with an
        `interventions.Patch` of these amounts, or of gates 1 - amounts, which is removal.
      amounts: where the derivative is taken; zeros.
      tokens: as in `lost`.

    Returns:
      For every leaf [..., N] a Tally with total [..., B, N].

    References:
      Nanda 2023, "Attribution Patching"; Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit
      Discovery", section 2.
    """
    slopes = _gradient(loss, of_sentences("attribution", loss, amounts))
    return jax.tree.map(lambda slope: tally(slope, tokens), slopes)


def attribution_along(loss: Loss, amounts: Any, directions: Any, *, tokens: ArrayLike | None = None) -> Tally:
    """`attribution` of a few patches or groups of patches, one forward-mode derivative each; nothing is kept in memory.

    Cheaper than `attribution` for one or two directions, and for what has no backward pass. Forward mode needs
    kernel="dense" in the models, which is also what short inputs take.

    Args:
      loss, amounts, tokens: as in `attribution`.
      directions: the structure of amounts with one more axis in front, [R, ..., N]; a row of ones is all patches
        together.

    Returns:
      A Tally with total [R, B]; baseline 0.
    """
    sentences("attribution_along", loss, amounts)
    one = lambda direction: jax.jvp(loss, (amounts,), (direction,))[1]  # noqa: E731
    slopes = jax.lax.map(one, directions)
    return tally_of_sentences(slopes, tokens)


def interactions(loss: Loss, gates: Any, *, tokens: ArrayLike | None = None, batch_size: int | None = None) -> Tally:
    """How heads depend on one another: ∂²L(x)/∂gate_i ∂gate_j for every sentence.

    To second order, removing i and j together costs this much more than the sum of both alone. Above 0 they can stand
    in for one another: duplicates that add c each to what a convex loss ℓ is a function of have c² ℓ″. Below 0 the
    second removal is cheaper after the first. The diagonal is the curvature of each alone. Baseline: 0, losses that
    add up.

    Both derivatives are reverse mode, so it works with every kernel whose backward pass can be differentiated again:
    dense and blockwise.

    Args:
      loss: from gates [..., N] or [..., B, N] to losses [B].
      gates: where the derivatives are taken; ones.
      tokens: as in `lost`.
      batch_size: rows of the matrix that are computed together, as in `ablations`.

    Returns:
      A Tally with total [B, heads, heads], the heads in the order of `ravel_pytree(gates)`: leaf after leaf, layer
      after layer.

    >>> loss = lambda gates: gates[..., 0] * gates[..., 1] * jnp.array([5.0, 7])
    >>> interactions(loss, jnp.ones(2)).total[1]
    Array([[0., 7.],
           [7., 0.]], dtype=float32)
    """
    wide = of_sentences("interactions", loss, gates)
    flat, rebuild = ravel_pytree(gates)

    def row(direction: Array) -> Array:
        along = rebuild(direction)
        slope = lambda wide: sum(  # noqa: E731
            jnp.vdot(jnp.broadcast_to(d[..., None, :], s.shape), s)
            for d, s in zip(jax.tree.leaves(along), jax.tree.leaves(_gradient(loss, wide)), strict=True)
        )
        return flat_by_sentence(jax.grad(slope)(wide))  # [B, heads]

    rows = jax.lax.map(row, jnp.eye(flat.size, dtype=flat.dtype), batch_size=batch_size)
    total = jnp.swapaxes(rows, 0, 1)
    count = jnp.ones(total.shape[0]) if tokens is None else jnp.asarray(tokens)
    return Tally(total, count[:, None, None], jnp.zeros_like(total))


def _gradient(loss: Loss, gates: Any) -> Any:
    return jax.grad(lambda gates: jnp.sum(loss(gates)))(gates)
