"""Pruning curves: the loss while more and more heads are removed, beside random orders of the same layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mhajax.heads.importance import losses
from mhajax.heads.importance.losses import Heads, Loss, sentences, tally_of_sentences
from mhajax.statistics import Tally


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
    gone = jnp.tril(jnp.ones((len(order) + 1, len(order)), bool), -1)  # row r: the first r of the order
    sentences("curve", loss, gates)
    removed = jnp.zeros((len(order) + 1, losses.count(gates)), bool).at[:, order].set(gone)
    found = losses.without(loss, gates, removed, batch_size)
    return tally_of_sentences(found, tokens)._replace(baseline=found[:1])


def curves(
    loss: Loss, gates: Any, orders: Heads, counts: Heads, *, tokens: ArrayLike | None = None,
    batch_size: int | None = None,
) -> Tally:  # fmt: skip
    """Pruning curves of several orders at some numbers of removed heads: a ranking, and random orders beside it.

    Args:
      loss: from gates to losses [B].
      gates: the model that heads are removed from; ones.
      orders: which goes first, second, … in each order, integers [R, removals], as `ranking` and `random_orders` give
        them; best from other sentences than those of the loss.
      counts: how many heads are removed at each point of a curve, integers [P], none above `removals`.
      tokens: as in `lost`.
      batch_size: points that are computed together, as in `ablations`.

    Returns:
      A Tally with total [R, P, B]; the baseline, [B], is the loss with nothing removed.

    Raises:
      ValueError: orders are not [R, removals], or a count is not from 0 to removals.

    >>> loss = lambda gates: jnp.array([[1.0, 2, 4], [10, 20, 40]]) @ (1 - gates)
    >>> curves(loss, jnp.ones(3), [[0, 1, 2], [2, 1, 0]], [1, 2]).total[:, :, 0]
    Array([[1., 3.],
           [4., 6.]], dtype=float32)
    """
    sentences("curves", loss, gates)
    orders, points = _orders("curves", orders, gates), counts if isinstance(counts, Array) else np.asarray(counts)
    if points.ndim != 1 or not jnp.issubdtype(points.dtype, jnp.integer):
        raise ValueError(f"importance.curves: counts must be integers [P], got {points.dtype} {points.shape}.")
    if losses.known(points) and not 0 <= np.min(points) <= np.max(points) <= orders.shape[1]:
        raise ValueError(
            f"importance.curves: counts must be from 0 to {orders.shape[1]}, the heads in an order, got "
            f"{np.asarray(points).tolist()}."
        )
    points = jnp.asarray(points)
    place = jnp.full((len(orders), losses.count(gates)), orders.shape[1])  # when each head goes; the others never
    place = place.at[jnp.arange(len(orders))[:, None], orders].set(jnp.arange(orders.shape[1]))
    removed = (place[:, None] < points[:, None]).reshape(-1, place.shape[1])  # [R·P, heads]
    nothing = jnp.zeros((1, place.shape[1]), bool)
    found = losses.without(loss, gates, jnp.concatenate([nothing, removed]), batch_size)
    total = found[1:].reshape(len(orders), len(points), -1)
    return tally_of_sentences(total, tokens)._replace(baseline=found[0])


def random_orders(key: Array, gates: Any, order: Heads, draws: int) -> Array:
    """Random orders of removal that take, at every step, a head of the same layer as a given order does.

    After any number of removals each layer has lost as many heads as in the given order, so what is left to compare is
    which heads of a layer go, not which layers lose them.

    Args:
      key: PRNG key.
      gates: of the model; only its shapes count.
      order: integers [removals], from `ranking`.
      draws: how many.

    Returns:
      Integers [draws, removals].

    Raises:
      ValueError: order has a head that does not exist, or one twice.

    >>> random_orders(jax.random.key(0), jnp.ones((2, 3)), [5, 0, 4], 1)[0] // 3  # layers of heads
    Array([1, 0, 1], dtype=int32)
    """
    (order,) = _orders(
        "random_orders", np.expand_dims(order, 0) if losses.known(order) else jnp.asarray(order)[None], gates
    )
    layer = jnp.asarray(losses.layer_of_head(gates))  # [heads]
    losing = layer[order]  # [removals]
    first = jnp.searchsorted(layer, losing)  # head of that layer
    earlier = jnp.sum(jnp.tril(losing[:, None] == losing, -1), axis=1)  # heads that the layer has lost before

    def draw(key: Array) -> Array:
        shuffled = jnp.lexsort((jax.random.uniform(key, layer.shape), layer))  # heads of each layer in another order
        return shuffled[first + earlier]

    return jax.vmap(draw)(jax.random.split(key, draws))


def _orders(who: str, given: Heads, gates: Any) -> Array:
    """Integers [R, removals], checked if they are known."""
    found = losses.numbers(who, "orders", given, 2, losses.count(gates))
    if losses.known(given):
        ordered = np.sort(np.asarray(given), axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"importance.{who}: an order must name each head once, got one that names a head twice.")
    return found
