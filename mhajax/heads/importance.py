"""How much a loss depends on each head: removals, derivatives, and how heads depend on one another.

Every function asks a `loss`, which takes gates and gives the loss of every sentence, [B], summed over its tokens. Gates
are a pytree of factors of the heads' outputs with the heads on the last axis, such as a
`PerAttention` with leaves [L, N]: 1 leaves a head alone, 0 removes it. What the loss computes is its own affair:

    def loss(gates):
        logits = translator.apply(params, source, target[:, :-1], config, gates=gates)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target[:, 1:])
        return jnp.sum(nats * real, axis=-1)

Results have the structure of the gates with the sentences before the heads: [L, N] becomes [L, B, N].

Derivatives per sentence cost no more than derivatives of the mean: the loss of a sentence depends on no gate but its
own, so one backward pass with respect to gates [L, B, N] gives all of them. `loss` must take such gates, as all models
here do; one that takes [L, N] only is lifted by `jax.vmap(…)` over sentences and gates, as in Michel's formula.

A gradient at gates of 1 says what a small change does. A removal is a change of 1, so where they differ, believe it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from mhajax.statistics import Tally

Loss = Callable[[Any], Array]


def ablations(loss: Loss, gates: Any, *, batch_size: int | None = None) -> Any:
    """The losses without each head, one at a time, in one program: a Python loop over heads, lifted over their axis.

    For models with stages `ablation` gives the same in less than half of the time.

    Args:
      loss: from gates to losses [B].
      gates: the model that heads are removed from; ones for all of it, 0 for heads that are gone already.
      batch_size: heads that are computed together: 1 or None is one after the other, the number of heads is `vmap`.
        Memory grows with it.

    Returns:
      [..., B, N] for every leaf [..., N]: the loss of sentence b without that head. `lost` makes it a Tally.

    >>> loss = lambda gates: jnp.array([[1.0, 2, 3], [10, 20, 30]]) @ gates
    >>> ablations(loss, jnp.ones(3))
    Array([[ 5.,  4.,  3.],
           [50., 40., 30.]], dtype=float32)

    References:
      Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 3.2. Voita et al. 2019 remove heads too.
    """
    _sentences("ablations", loss, gates)
    flat, rebuild = ravel_pytree(gates)
    without = lambda head: loss(rebuild(flat.at[head].set(0)))  # noqa: E731
    return _by_head(jax.lax.map(without, jnp.arange(flat.size), batch_size=batch_size), gates)


def lost(without: Any, full: Array, *, tokens: ArrayLike | None = None) -> Any:
    """What each removal costs: the loss without the head minus the loss with all of them, nats per token.

    Above 0 the head is of use, below 0 the model is better without it. Baseline: 0, a head whose removal changes
    nothing.

    Args:
      without: [..., B, N], from `ablations` or `ablation.of_stages`.
      full: the losses with all heads, [B].
      tokens: how many tokens each loss is the sum over, [B]; None counts sentences, and the value is nats per sentence.

    Returns:
      For every leaf a Tally with total [..., B, N] and count [B, 1]; `statistics.estimate` over the axis of sentences.
    """
    return jax.tree.map(lambda losses: _tally(losses - full[:, None], tokens), without)


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
    slopes = _gradient(loss, _of_sentences("michel", loss, gates))
    return jax.tree.map(lambda slope: _tally(jnp.abs(slope), tokens), slopes)


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
    slopes = _gradient(loss, _of_sentences("attribution", loss, amounts))
    return jax.tree.map(lambda slope: _tally(slope, tokens), slopes)


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
    _sentences("attribution_along", loss, amounts)
    one = lambda direction: jax.jvp(loss, (amounts,), (direction,))[1]  # noqa: E731
    slopes = jax.lax.map(one, directions)
    return _tally_of_sentences(slopes, tokens)


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
    wide = _of_sentences("interactions", loss, gates)
    flat, rebuild = ravel_pytree(gates)

    def row(direction: Array) -> Array:
        along = rebuild(direction)
        slope = lambda wide: sum(  # noqa: E731
            jnp.vdot(jnp.broadcast_to(d[..., None, :], s.shape), s)
            for d, s in zip(jax.tree.leaves(along), jax.tree.leaves(_gradient(loss, wide)), strict=True)
        )
        return _flat_by_sentence(jax.grad(slope)(wide))  # [B, heads]

    rows = jax.lax.map(row, jnp.eye(flat.size, dtype=flat.dtype), batch_size=batch_size)
    total = jnp.swapaxes(rows, 0, 1)
    count = jnp.ones(total.shape[0]) if tokens is None else jnp.asarray(tokens)
    return Tally(total, count[:, None, None], jnp.zeros_like(total))


def ranking(measured: Any) -> Array:
    """Heads from the least important to the most, integers [heads] in the order of `ravel_pytree(gates)`.

    Args:
      measured: Tallies with total [..., B, N] in the structure of the gates, from `lost` or `michel`.
    """
    tallies = jax.tree.leaves(measured, is_leaf=lambda node: isinstance(node, Tally))
    values = [jnp.sum(t.total, axis=-2) / jnp.sum(jnp.broadcast_to(t.count, t.total.shape), axis=-2) for t in tallies]
    return jnp.argsort(jnp.concatenate([value.ravel() for value in values]))


def curve(
    loss: Loss, gates: Any, order: Array, *, tokens: ArrayLike | None = None, batch_size: int | None = None
) -> Tally:
    """A pruning curve: the losses after more and more heads are removed.

    Args:
      loss: from gates to losses [B].
      gates: the model that heads are removed from; ones.
      order: which goes first, second, …: integers [removals] as in `ranking`; best from other sentences than those of
        the loss.
      tokens: as in `lost`.
      batch_size: as in `ablations`.

    Returns:
      A Tally with total [removals + 1, B], the first with nothing removed, which is also the baseline of all.

    References:
      Michel et al. 2019, section 4.2 (figure 3).
    """
    _sentences("curve", loss, gates)
    flat, rebuild = ravel_pytree(gates)
    gone = jnp.tril(jnp.ones((len(order) + 1, len(order)), bool), -1)  # row r: the first r of the order
    without = lambda gone: loss(rebuild(flat.at[order].multiply(~gone)))  # noqa: E731
    losses = jax.lax.map(without, gone, batch_size=batch_size)
    return _tally_of_sentences(losses, tokens)._replace(baseline=losses[:1])


def _sentences(who: str, loss: Loss, gates: Any) -> int:
    """B, from what the loss gives."""
    shape = jax.eval_shape(loss, gates).shape
    if len(shape) != 1:
        raise ValueError(
            f"importance.{who}: loss must give a number for every sentence, [B], got shape {shape}; "
            "sum over tokens, not over sentences."
        )
    return shape[0]


def _of_sentences(who: str, loss: Loss, gates: Any) -> Any:
    """The same gates for every sentence, [..., N] to [..., B, N]."""
    count = _sentences(who, loss, gates)
    return jax.tree.map(lambda g: jnp.repeat(jnp.asarray(g, float)[..., None, :], count, axis=-2), gates)


def _gradient(loss: Loss, gates: Any) -> Any:
    return jax.grad(lambda gates: jnp.sum(loss(gates)))(gates)


def _by_head(losses: Array, gates: Any) -> Any:
    """[heads, B] in the structure of the gates: [..., B, N]."""
    leaves, structure = jax.tree.flatten(gates)
    found, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        found.append(jnp.swapaxes(losses[start : start + size].reshape(*leaf.shape, -1), -1, -2))
        start += size
    return jax.tree.unflatten(structure, found)


def _flat_by_sentence(tree: Any) -> Array:
    """Leaves [..., B, N] as [B, heads]."""
    turned = [jnp.moveaxis(leaf, -2, 0) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in turned], axis=-1)


def _tally(total: Array, tokens: ArrayLike | None) -> Tally:
    """total [..., B, N]; the baseline of everything here is 0."""
    count = jnp.ones(total.shape[-2]) if tokens is None else jnp.asarray(tokens)
    return Tally(total, count[:, None], jnp.zeros_like(total))


def _tally_of_sentences(total: Array, tokens: ArrayLike | None) -> Tally:
    """total [..., B]."""
    return Tally(total, jnp.ones(total.shape[-1]) if tokens is None else jnp.asarray(tokens), jnp.zeros_like(total))
