"""How far predictions are from the words that came."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


class Sums(NamedTuple):
    """Sums over tokens, so that batches can be added before anything is divided.

    Attributes:
      loss: what is trained on, nats, label smoothing included.
      cross_entropy: -log p(target), nats.
      correct: targets that greedy decoding would choose: the highest logit, the first of several that are equal.
      weight: sum of the weights; a loss divided by it is a mean per token.
    """

    loss: Array
    cross_entropy: Array
    correct: Array
    weight: Array


def linear_cross_entropy(
    features: Array,
    table: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    chunk: int = 512,
) -> Sums:
    """Cross-entropy of the logits `features tableᵀ`, without ever holding the logits of all tokens.

    Loss and gradient of `chunk` tokens at a time are computed together, so memory is chunk × V, and the logits are
    computed once, not again in the backward pass.

    Args:
      features: [..., D].
      table: [V, D].
      targets: integers [...] in [0, V).
      weights: of every token, [...]; 0 for padding. None is 1.
      ignore_index: a target that stands for "no target", such as the -100 of other libraries: its token is in no sum,
        that of the weights included. None: every target counts.
      label_smoothing: ε: the target has probability 1 - ε + ε/V, every other word ε/V.
      chunk: tokens at a time.

    Returns:
      Float32 sums over all tokens. Only `loss` has a gradient, with respect to features and table. All four and the
      gradient are NaN if a target outside [0, V) weighs anything and was not known when this was traced.

    Raises:
      ValueError: if the shapes do not fit, ε is not in [0, 1), or a target outside [0, V) weighs anything.
      TypeError: if targets are not integers.

    References:
      Label smoothing: Szegedy et al. 2016, section 7.
    """
    if features.shape[:-1] != targets.shape or features.shape[-1] != table.shape[-1]:
        raise ValueError(
            "losses.linear_cross_entropy: features [..., D], targets [...] and table [V, D] must fit, got "
            f"{features.shape}, {targets.shape} and {table.shape}."
        )
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(
            "losses.linear_cross_entropy: weights must have the shape of targets, "
            f"{targets.shape}, got {weights.shape}; one weight per token."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"losses.linear_cross_entropy: label_smoothing must be in [0, 1), got {label_smoothing}.")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"losses.linear_cross_entropy: targets must be integers [...], got {targets.dtype}.")
    count = targets.size
    if count == 0 or chunk < 1:
        raise ValueError(
            f"losses.linear_cross_entropy: there must be a token and chunk at least 1, got targets {targets.shape}, "
            f"chunk={chunk}."
        )
    targets, weights = _counted(targets, weights, ignore_index, table.shape[0])
    # What weighs nothing may be anything, even NaN.
    features = jnp.where((weights != 0)[..., None], features, 0)
    chunk = min(chunk, count)
    padding = -count % chunk

    def chunks(a: Array, *width: int) -> Array:
        flat = a.reshape(count, *width)
        return jnp.pad(flat, ((0, padding), *((0, 0) for _ in width))).reshape(-1, chunk, *width)

    flat = (chunks(features, features.shape[-1]), table, chunks(targets), chunks(weights))
    sums = Sums(*_chunked(float(label_smoothing), *flat))  # pyright: ignore
    # XLA makes `where(is correct, weight, 0)` of a product, which would lose the NaN of a target outside.
    return sums._replace(correct=jnp.where(jnp.isnan(sums.weight), jnp.nan, sums.correct))


def _counted(targets: Any, weights: Any, ignore_index: int | None, vocab_size: int) -> tuple[Array, Array]:
    """Targets inside [0, V), and float32 weights: 0 where there is no target, NaN where it is outside and counts."""
    if _known(targets) and _known(weights):
        _refuse_outside(np.asarray(targets), weights, ignore_index, vocab_size)
    labels = jnp.asarray(targets)
    if labels.dtype.itemsize < 4 or jnp.issubdtype(labels.dtype, jnp.unsignedinteger):
        # Few bits, or bits without a sign, could not be compared with V or -100; 2³¹ and more become negative.
        labels = labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)
    weights = jnp.ones(labels.shape, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    if ignore_index is not None:
        weights = jnp.where(labels == ignore_index, 0, weights)
    inside = (labels >= 0) & (labels < vocab_size)
    weights = jnp.where(inside | (weights == 0), weights, jnp.nan)
    return jnp.where(inside, labels, 0), weights


def _known(value: Any) -> bool:
    """Whether numbers can be looked at here and now."""
    return not isinstance(value, Tracer) and (not isinstance(value, jax.Array) or value.is_fully_addressable)


def _refuse_outside(targets: np.ndarray, weights: Any, ignore_index: int | None, vocab_size: int) -> None:
    """Raise a ValueError for a target outside [0, V) that weighs anything and is not to be ignored."""
    outside = (targets < 0) | (targets >= vocab_size)
    if ignore_index is not None:
        outside &= targets != ignore_index
    if weights is not None:
        outside &= np.asarray(weights) != 0
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        label = int(targets[where])
        raise ValueError(
            f"losses.linear_cross_entropy: targets must be in [0, V={vocab_size}), got {label} at {where}, one of "
            f"{int(outside.sum())} outside; weigh padding 0, or say ignore_index={label} if it stands for no target."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(smoothing, features, table, targets, weights):
    def one_chunk(sums, chunk):
        return jax.tree.map(jnp.add, sums, _sums(smoothing, _logits(chunk[0], table), *chunk[1:])), None

    return jax.lax.scan(one_chunk, (jnp.float32(0),) * 4, (features, targets, weights))[0]


def _logits(features, table):
    return jnp.einsum("md,vd->mv", features, table, preferred_element_type=jnp.float32)


def _sums(smoothing, logits, targets, weights):
    top = jnp.max(logits, axis=-1)
    log_sum = top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1))
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    cross_entropy = log_sum - target
    loss = cross_entropy
    if smoothing:
        loss = (1 - smoothing) * cross_entropy + smoothing * (log_sum - jnp.mean(logits, axis=-1))
    # The first of equal logits counts, as for argmax, which would be slower here.
    before = jnp.arange(logits.shape[-1]) < targets[:, None]
    correct = (target >= top) & ~jnp.any(before & (logits >= top[:, None]), axis=-1)
    return tuple(jnp.sum(weights * a) for a in (loss, cross_entropy, correct)) + (jnp.sum(weights),)


def _forward(smoothing, features, table, targets, weights):
    def one_chunk(carry, chunk):
        sums, d_table = carry
        f, y, w = chunk
        logits = _logits(f, table)
        new = _sums(smoothing, logits, y, w)
        probability = jax.nn.softmax(logits, axis=-1)
        is_target = y[:, None] == jnp.arange(table.shape[0])
        wanted = jnp.where(is_target, 1 - smoothing, 0.0) + smoothing / table.shape[0]
        d_logits = (w[:, None] * (probability - wanted)).astype(f.dtype)
        # A product whose left side is transposed is slow on CPU: turn the thin side, not the wide one.
        turned = jax.lax.optimization_barrier(f.T)  # [D, chunk]
        d_table = d_table + jnp.einsum("dm,mv->dv", turned, d_logits, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, new), d_table), d_logits @ table.astype(f.dtype)

    start = ((jnp.float32(0),) * 4, jnp.zeros(table.shape[::-1], jnp.float32))
    (sums, d_table), d_features = jax.lax.scan(one_chunk, start, (features, targets, weights))
    return sums, (d_features, d_table.T.astype(table.dtype), targets)


def _backward(smoothing, kept, cotangents):
    d_features, d_table, targets = kept
    scale = cotangents[0]
    return (
        (scale * d_features).astype(d_features.dtype),
        (scale * d_table).astype(d_table.dtype),
        np.zeros(targets.shape, jax.dtypes.float0),
        jnp.zeros(targets.shape, jnp.float32),
    )


_chunked.defvjp(_forward, _backward)
