"""Where heads look: distance, spread, and whether they hit what they should."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


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


def hits(weights: ArrayLike, gold: ArrayLike) -> Array:
    """Whether the key that gets most attention is a right one.

    Args:
      weights: [..., T, S].
      gold: which keys would be right, bool, broadcasts to [..., T, S].

    Returns:
      bool [..., T].
    """
    weights = jnp.asarray(weights)
    gold = jnp.broadcast_to(gold, weights.shape)
    return jnp.take_along_axis(gold, jnp.argmax(weights, axis=-1, keepdims=True), axis=-1)[..., 0]
