"""Is a set of heads enough: faithful, complete, and without a head too many."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax.heads.importance import losses
from mhajax.heads.importance.losses import Heads, Loss, by_head, sentences, tally, tally_of_sentences
from mhajax.statistics import Tally


def faithfulness(loss: Loss, gates: Any, kept: Heads, *, batch_size: int | None = None) -> Tally:
    """The share of what all heads do that each of some sets does alone: 1 for all heads, 0 for none.

    (loss(none) - loss(kept)) / (loss(none) - loss(all)), summed over sentences before it is divided. Above 1 the set is
    better than all heads.

    Args:
      loss: from gates to losses [B].
      gates: the model; ones.
      kept: the sets, bool [R, heads]; all heads that are not in one are removed.
      batch_size: as in `ablations`.

    Returns:
      A Tally with total [R, B] and count [B], what all heads do; `statistics.estimate` over the last axis is the share.

    Raises:
      ValueError: kept is not [R, heads], or loss is no number for every sentence.

    >>> loss = lambda gates: jnp.array([[3.0, 1, 0], [6, 1, 1]]) @ (1 - gates)
    >>> found = faithfulness(loss, jnp.ones(3), [[True, False, False]])
    >>> found.total, found.count
    (Array([[3., 6.]], dtype=float32), Array([4., 8.], dtype=float32))

    References:
      Wang et al. 2022, "Interpretability in the Wild", section 4 (there the difference, not the share). Marks et al.
      2024, "Sparse Feature Circuits", section 3.1 (the share).
    """
    sentences("faithfulness", loss, gates)
    kept = losses.sets("faithfulness", "kept", kept, gates)
    ends = jnp.array([False, True])[:, None] & jnp.ones(kept.shape[1], bool)  # nothing removed, everything removed
    found = losses.without(loss, gates, jnp.concatenate([ends, ~kept]), batch_size)
    full, none = found[:2]
    total = none - found[2:]
    return Tally(total, none - full, jnp.zeros_like(total))


def completeness(
    loss: Loss, gates: Any, kept: Heads, subsets: Heads, *, tokens: ArrayLike | None = None,
    batch_size: int | None = None,
) -> Tally:  # fmt: skip
    """Whether a set and the whole model still agree when the same heads are taken from both: 0 where it is complete.

    loss(kept without K) - loss(all without K) for every K. A backup outside of the set shows in the K whose work it
    takes over: then the whole model is better than the set.

    Args:
      loss: from gates to losses [B].
      gates: the model; ones.
      kept: numbers of the heads in the set, integers [heads].
      subsets: every K, bool [R, heads]; what of it is not kept is left alone.
      tokens: as in `lost`.
      batch_size: as in `ablations`.

    Returns:
      A Tally with total [R, B]; baseline 0.

    Raises:
      ValueError: kept has a head that does not exist, or subsets are not [R, heads].

    References:
      Wang et al. 2022, section 4.1 (incompleteness score, its absolute value).
    """
    sentences("completeness", loss, gates)
    inside = losses.members("completeness", "kept", kept, gates)
    gone = losses.sets("completeness", "subsets", subsets, gates) & inside
    found = losses.without(loss, gates, jnp.concatenate([gone | ~inside, gone]), batch_size)
    return tally_of_sentences(found[: len(gone)] - found[len(gone) :], tokens)


def minimality(
    loss: Loss, gates: Any, kept: Heads, *, gone: Heads = (), tokens: ArrayLike | None = None,
    batch_size: int | None = None,
) -> Any:  # fmt: skip
    """What the set loses with each of its heads: about 0 for one that it does not need.

    loss(kept without K and h) - loss(kept without K), for one K; a head with a backup in the set needs a K with that
    backup, and is needed if any K says so.

    Args:
      loss: from gates to losses [B].
      gates: the model; ones.
      kept: numbers of the heads in the set, integers [heads].
      gone: K, numbers of heads of the set; none.
      tokens: as in `lost`.
      batch_size: as in `ablations`.

    Returns:
      For every leaf [..., N] a Tally with total [..., B, N]; 0 for heads that are not in the set or in K. Baseline 0.

    Raises:
      ValueError: kept or gone has a head that does not exist.

    References:
      Wang et al. 2022, section 4.2 (minimality score, its absolute value at the best K).
    """
    sentences("minimality", loss, gates)
    inside = losses.members("minimality", "kept", kept, gates)
    base = ~inside | losses.members("minimality", "gone", gone, gates)
    heads = base.size
    rows = jnp.concatenate([jnp.eye(heads, dtype=bool) | base, base[None]])
    found = losses.without(loss, gates, rows, batch_size)
    off = jnp.where(base[:, None], 0, found[:-1] - found[-1])
    return jax.tree.map(lambda total: tally(total, tokens), by_head(off, gates))


def random_subsets(key: Array, kept: Heads, heads: int, draws: int) -> Array:
    """Random subsets K of a set for `completeness`, bool [draws, heads]: each head of it with probability ½."""
    inside = jnp.zeros(heads, bool).at[jnp.asarray(kept)].set(True)
    return jax.random.bernoulli(key, 0.5, (draws, heads)) & inside
