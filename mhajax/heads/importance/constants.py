"""Heads that always say the same: zero, their mean, or the constant that costs least (optimal ablation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mhajax.heads.gates import Optimizer
from mhajax.heads.importance.losses import by_head

Constant = Callable[[Any, Any], Array]


def replacements(loss: Constant, amounts: Any, constants: Any, *, batch_size: int | None = None) -> Any:
    """The losses when each head, one at a time, gives a constant instead of its output.

    Args:
      loss: from amounts and constants to losses [B]: amounts, leaves [..., N], say how far each head is replaced, as in
        `interventions.Patch`; constants, leaves [..., N, Hv], by what. For a stack of layers
        `interventions.patched("heads", constants[:, None, :, None, :], amounts)` is such an intervention.
      amounts: zeros, in the structure of the heads; 1 for heads that are replaced anyway.
      constants: zeros is zero ablation, the mean output of every head mean ablation, `optimal_constants` optimal
        ablation.
      batch_size: as in `ablations`.

    Returns:
      [..., B, N] for every leaf [..., N]; `lost` makes it Tallies.

    Raises:
      ValueError: amounts and constants do not fit, or loss is no number for every sentence.
    """
    leaves, structure = _fitting("replacements", loss, amounts, constants)
    rows = []
    for number, (amount, _) in enumerate(leaves):
        flat = amount.ravel()

        def one(head: Array, number: int = number, flat: Array = flat, shape: tuple = amount.shape) -> Array:
            given = [a for a, _ in leaves]
            given[number] = flat.at[head].set(1).reshape(shape)
            return loss(structure.unflatten(given), constants)

        rows.append(jax.lax.map(one, jnp.arange(flat.size), batch_size=batch_size))
    return by_head(jnp.concatenate(rows), amounts)


def optimal_constants(
    loss: Constant, amounts: Any, constants: Any, optimizer: Optimizer, *, steps: int, batch_size: int | None = None
) -> Any:
    """For every head the constant that costs least instead of its output, by gradient descent, all heads at once.

    a*_h = argmin_a E_x loss(x, head h := a)

    Zero and mean ablation put a head where the layers above were never trained to find it, and so cost more than the
    head is worth: each is an upper bound of optimal ablation, which is what the head's dependence on its input is
    worth. Kept is the best constant on the way: it costs no more than the start and no more than zero *on the
    sentences of the fit*; give `replacements` others to judge it.

    Args:
      loss: as in `replacements`.
      amounts: zeros, as in `replacements`.
      constants: where to begin; best the mean outputs.
      optimizer: as `optax.adam(0.01)`.
      steps: of descent.
      batch_size: heads that are fitted together: None is all of a leaf, in one `vmap`.

    Returns:
      In the structure of constants.

    Raises:
      ValueError: as `replacements`, or steps is below 0.

    References:
      Li & Janson 2024, "Optimal Ablation for Interpretability", section 2.2 (arXiv 2409.09951).
    """
    if steps < 0:
        raise ValueError(f"importance.optimal_constants: steps must be at least 0, got {steps}.")
    leaves, structure = _fitting("optimal_constants", loss, amounts, constants)
    found = []
    for number, (amount, begin) in enumerate(leaves):
        flat, starts = amount.ravel(), begin.reshape(-1, begin.shape[-1])  # [M], [M, Hv]

        def mean_loss(constant: Array, head: Array, number: int = number, flat: Array = flat) -> Array:
            some, those = ([pair[side] for pair in leaves] for side in (0, 1))
            some[number] = flat.at[head].set(1).reshape(some[number].shape)
            width = those[number].shape
            those[number] = those[number].reshape(-1, width[-1]).at[head].set(constant).reshape(width)
            return jnp.mean(loss(structure.unflatten(some), structure.unflatten(those)))

        def fitted(each: tuple[Array, Array], mean_loss: Callable = mean_loss) -> Array:
            head, begin = each
            return _descended(lambda constant: mean_loss(constant, head), begin, optimizer, steps)

        best = jax.lax.map(fitted, (jnp.arange(flat.size), starts), batch_size=batch_size or flat.size)
        found.append(best.reshape(begin.shape))
    return structure.unflatten(found)


def _descended(objective: Callable[[Array], Array], begin: Array, optimizer: Optimizer, steps: int) -> Array:
    """The best of the start, of 0, and of what gradient descent came by."""

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        here, state, best, least = carry
        value, slope = jax.value_and_grad(objective)(here)
        best, least = jnp.where(value < least, here, best), jnp.minimum(value, least)
        updates, state = optimizer.update(slope, state, here)
        return (here + updates, state, best, least), None

    zero = jnp.zeros_like(begin)
    start = (begin, optimizer.init(begin), zero, objective(zero))
    (here, _, best, least), _ = jax.lax.scan(step, start, length=steps)
    for last in (begin, here):  # the start where there are no steps; what the last step came by
        value = objective(last)
        best, least = jnp.where(value < least, last, best), jnp.minimum(value, least)
    return best


def _fitting(who: str, loss: Constant, amounts: Any, constants: Any) -> tuple[list[tuple[Array, Array]], Any]:
    """Pairs of leaves, [..., N] and [..., N, Hv]."""
    some, structure = jax.tree.flatten(amounts)
    those, other = jax.tree.flatten(constants)
    shapes = [jnp.shape(leaf) for leaf in some], [jnp.shape(leaf) for leaf in those]
    if structure != other or any(a != c[:-1] for a, c in zip(*shapes, strict=True)):
        raise ValueError(
            f"importance.{who}: constants must be [..., N, Hv] for amounts [..., N], in one structure, got "
            f"{shapes[1]} for {shapes[0]}."
        )
    shape = jax.eval_shape(loss, amounts, constants).shape
    if len(shape) != 1:
        raise ValueError(
            f"importance.{who}: loss must give a number for every sentence, [B], got shape {shape}; "
            "sum over tokens, not over sentences."
        )
    return [(jnp.asarray(a, float), jnp.asarray(c, float)) for a, c in zip(some, those, strict=True)], structure
