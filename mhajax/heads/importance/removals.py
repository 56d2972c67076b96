"""Heads removed: one at a time, in groups, and after others are gone already."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from mhajax.heads.importance import losses
from mhajax.heads.importance.losses import Heads, Loss, by_head, sentences, tally
from mhajax.statistics import Tally


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
    sentences("ablations", loss, gates)
    flat, rebuild = ravel_pytree(gates)
    without = lambda head: loss(rebuild(flat.at[head].set(0)))  # noqa: E731
    return by_head(jax.lax.map(without, jnp.arange(flat.size), batch_size=batch_size), gates)


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
    return jax.tree.map(lambda one: tally(one - full[:, None], tokens), without)


def ranking(measured: Any) -> Array:
    """Heads from the least important to the most, integers [heads] in the order of `ravel_pytree(gates)`.

    Args:
      measured: Tallies with total [..., B, N] in the structure of the gates, from `lost` or `michel`.
    """
    values = [
        jnp.sum(t.total, axis=-2) / jnp.sum(jnp.broadcast_to(t.count, t.total.shape), axis=-2)
        for t in _tallies(measured)
    ]
    return jnp.argsort(jnp.concatenate([value.ravel() for value in values]))


def joint(
    loss: Loss, gates: Any, groups: Heads, *, single: Any = None, tokens: ArrayLike | None = None,
    batch_size: int | None = None,
) -> Tally:  # fmt: skip
    """What it costs to remove whole groups of heads, beside the sum of what their heads cost one at a time.

    The joint effect of a group S is loss(without S) - loss; the baseline is Σ_{h in S} (loss(without h) - loss). Where
    the joint effect is larger, heads of the group stand in for one another, and single effects understate them; where
    it is smaller, they need one another. `statistics.difference` gives the excess with its interval. To second order it
    is the sum of `interactions` over pairs of the group.

    Args:
      loss: from gates to losses [B].
      gates: the model that heads are removed from; ones.
      groups: bool [R, heads] in the order of `ravel_pytree(gates)`; `layers(gates)` has one for each layer.
      single: Tallies with total [..., B, N] in the structure of the gates, from `lost`; None: the baseline is 0.
      tokens: as in `lost`.
      batch_size: groups that are removed together, as in `ablations`.

    Returns:
      A Tally with total [R, B].

    Raises:
      ValueError: groups are not [R, heads], or loss is no number for every sentence.

    >>> loss = lambda gates: jnp.array([3.0, 5]) * (1 - jnp.maximum(gates[0], gates[1]))  # one of the two is enough
    >>> single = lost(ablations(loss, jnp.ones(2)), loss(jnp.ones(2)))
    >>> found = joint(loss, jnp.ones(2), jnp.ones((1, 2), bool), single=single)
    >>> found.total, found.baseline
    (Array([[3., 5.]], dtype=float32), Array([[0., 0.]], dtype=float32))
    """
    sentences("joint", loss, gates)
    groups = losses.sets("joint", "groups", groups, gates)
    total = losses.without(loss, gates, groups, batch_size) - loss(gates)
    found = losses.tally_of_sentences(total, tokens)
    if single is None:
        return found
    alone = losses.flat_by_sentence([one.total for one in _tallies(single)])  # [B, heads]
    return found._replace(baseline=jnp.where(groups, 1.0, 0.0) @ alone.T)


def conditional(
    loss: Loss, gates: Any, gone: Heads, *, tokens: ArrayLike | None = None, batch_size: int | None = None
) -> Any:
    """What each head costs when others are gone already, beside what it costs alone: who takes over.

    The effect of h given S is loss(without S and h) - loss(without S); the baseline is loss(without h) - loss. A head
    whose effect rises far above its baseline does the work of S when S is gone: a backup. `statistics.difference` gives
    the rise with its interval, `statistics.select_and_report` the head with the largest one.

    Args:
      loss: from gates to losses [B].
      gates: the model; ones.
      gone: numbers of the heads in S, integers [heads] as in `ranking`.
      tokens: as in `lost`.
      batch_size: as in `ablations`.

    Returns:
      For every leaf [..., N] a Tally with total and baseline [..., B, N]; both are 0 for heads of S.

    Raises:
      ValueError: gone has a head that does not exist.

    >>> loss = lambda gates: jnp.array([3.0, 5]) * (1 - jnp.maximum(gates[0], gates[1])) + gates[2]
    >>> found = conditional(loss, jnp.ones(3), [0])
    >>> found.total[0], found.baseline[0]
    (Array([ 0.,  3., -1.], dtype=float32), Array([ 0.,  0., -1.], dtype=float32))

    References:
      Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
      section 3.3 (backup name movers). McGrath et al. 2023, "The Hydra Effect".
    """
    sentences("conditional", loss, gates)
    taken = losses.members("conditional", "gone", gone, gates)
    flat, rebuild = ravel_pytree(gates)
    heads = flat.size
    each = jnp.eye(heads, dtype=bool)
    rows = jnp.concatenate([each, each | taken, taken[None], jnp.zeros((1, heads), bool)])
    found = losses.without(loss, gates, rows, batch_size)
    alone, after, base, full = found[:heads], found[heads:-2], found[-2], found[-1]
    zero = taken[:, None]
    baseline = by_head(jnp.where(zero, 0, alone - full), gates)
    after = by_head(jnp.where(zero, 0, after - base), gates)
    return jax.tree.map(lambda total, alone: tally(total, tokens)._replace(baseline=alone), after, baseline)


def _tallies(measured: Any) -> list[Tally]:
    return jax.tree.leaves(measured, is_leaf=lambda node: isinstance(node, Tally))
