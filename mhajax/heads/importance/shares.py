"""Shapley shares: what each head brings, on average over all orders in which heads could go."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from mhajax.heads.importance import losses
from mhajax.heads.importance.losses import Heads, Loss, by_head, sentences, tally


class Shapley(NamedTuple):
    """Shares of heads, each part in the structure of the gates.

    Attributes:
      shares: Tallies with total [..., B, N]: the mean over all orders; baseline 0, a head that no set needs.
      error: standard errors [..., N] of the shares per token, from the orders that were drawn; NaN for one unit. It
        says nothing of other sentences: `statistics.estimate` of `shares` does.
      by_order: shares per token in each unit of orders, [P, ..., N]; each sums to loss(none) - loss(all) per token.
    """

    shares: Any
    error: Any
    by_order: Any


def antithetic(key: Array, heads: int, pairs: int) -> Array:
    """Random orders of heads and the same ones from behind, integers [pairs, 2, heads], for `shapley`.

    A head that goes early in an order goes late in its reverse, so that the error of a pair is smaller than that of two
    orders where effects change with how much is gone already: to second order it vanishes.

    Args:
      key: PRNG key.
      heads: how many there are.
      pairs: how many pairs.

    References:
      Mitchell et al. 2022, "Sampling Permutations for Shapley Value Estimation", section 4.1.
    """
    orders = jax.vmap(lambda key: jax.random.permutation(key, heads))(jax.random.split(key, pairs))
    return jnp.stack([orders, orders[:, ::-1]], axis=1)


def shapley(
    loss: Loss, gates: Any, orders: Heads, *, tokens: ArrayLike | None = None, batch_size: int | None = None
) -> Shapley:
    """Each head's share of loss(none) - loss(all): what its removal costs, averaged over orders of removal.

    φ_h = E_π [loss(without π up to and with h) - loss(without π up to h)]

    Heads that can stand in for one another cost nothing alone and share what both are worth; a head that no set of
    heads needs has 0; if the loss adds up over heads, φ_h is the effect of h alone. An order is walked one gate at a
    time, so one order of M heads takes M - 1 losses (the ends are shared by all) and its shares telescope to
    loss(none) - loss(all).

    Args:
      loss: from gates to losses [B].
      gates: the model; ones, 0 for heads that are gone already, whose share is 0.
      orders: integers [P, heads], P independent orders of all heads, in the numbers of `ravel_pytree(gates)`; or
        [P, R, heads], P independent units of R orders each, as `antithetic` gives them. All orders there are, each
        once: exact.
      tokens: as in `lost`.
      batch_size: losses that are computed together, as in `ablations`.

    Returns:
      A Shapley.

    Raises:
      ValueError: orders are no permutations of all heads, or loss is no number for every sentence.

    >>> loss = lambda gates: jnp.array([6.0]) * (1 - jnp.maximum(gates[0], gates[1])) - gates[2]
    >>> shapley(loss, jnp.ones(3), antithetic(jax.random.key(0), 3, 2)).shares.total
    Array([[3., 3., 1.]], dtype=float32)

    References:
      Shapley 1953. Castro et al. 2009, "Polynomial calculation of the Shapley value based on sampling". Held & Yang
      2023, "Shapley Head Pruning: Identifying and Removing Interference in Multilingual Transformers".
    """
    sentences("shapley", loss, gates)
    units = _permutations(orders, losses.count(gates))  # [P, R, M]
    flat, rebuild = ravel_pytree(gates)
    heads = flat.size
    walks = units.reshape(-1, heads)
    place = jnp.argsort(walks, axis=1)  # when each head goes
    full, none = loss(gates), loss(rebuild(jnp.zeros_like(flat)))  # [B]

    def after(index: Array) -> Array:
        walk, gone = jnp.divmod(index, heads - 1)
        return loss(rebuild(jnp.where(place[walk] <= gone, 0, flat)))

    inner = jax.lax.map(after, jnp.arange(len(walks) * (heads - 1)), batch_size=batch_size)
    inner = inner.reshape(len(walks), heads - 1, full.size)
    ends = [jnp.broadcast_to(end, (len(walks), 1, full.size)) for end in (full, none)]
    steps = jnp.diff(jnp.concatenate([ends[0], inner, ends[1]], axis=1), axis=1)  # [walks, M, B], as they went
    marginal = jnp.take_along_axis(steps, place[..., None], axis=1).reshape(*units.shape, full.size)
    of_unit = jnp.mean(marginal, axis=1)  # [P, M, B]
    weight = jnp.sum(jnp.ones(full.size) if tokens is None else jnp.asarray(tokens, full.dtype))
    by_order = jnp.sum(of_unit, axis=-1) / weight  # [P, M]
    count = len(units)
    error = jnp.std(by_order, axis=0, ddof=1) / count**0.5 if count > 1 else jnp.full(heads, jnp.nan)
    shares = jax.tree.map(lambda total: tally(total, tokens), by_head(jnp.mean(of_unit, axis=0), gates))
    return Shapley(shares, rebuild(error), jax.vmap(rebuild)(by_order))


def _permutations(given: Heads, heads: int) -> Array:
    found = given if isinstance(given, Array) else np.asarray(given)
    good = found.ndim in (2, 3) and found.shape[-1] == heads and found.size and jnp.issubdtype(found.dtype, jnp.integer)
    if good and losses.known(found):
        good = bool((np.sort(np.asarray(found), axis=-1) == np.arange(heads)).all())
    if not good or heads < 2:
        raise ValueError(
            f"importance.shapley: orders must be permutations of the {heads} heads (two or more), integers "
            f"[P, {heads}] or [P, R, {heads}], got {found.dtype} {found.shape}; `antithetic` draws some."
        )
    return jnp.asarray(found if found.ndim == 3 else found[:, None])
