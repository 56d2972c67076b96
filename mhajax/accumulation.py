"""Gradients of several batches as those of one large batch, for any Optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class Accumulated(NamedTuple):
    """What is kept between the batches of a group."""

    batches: Array  # [], int32, seen so far
    weight: Array  # [], float32, of the group so far
    gradient: Any  # their mean by weight, at least float32
    inner: optax.OptState


def accumulate(
    optimizer: optax.GradientTransformation, every: int, *, steps: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Change the parameters once for `every` batches, by the mean of their gradients, each counted by its weight.

    `update(gradient, state, params, weight=tokens)` takes the gradient of a mean over so many tokens, so that a group
    gives the mean per token of all its batches; without a weight every batch counts alike.

    Args:
      optimizer: what is done with the mean.
      every: batches of a group.
      steps: batches in all; the last group is applied with it even if it has fewer. None: it waits for more.

    Returns:
      An Optax transformation whose updates are zeros in between.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Accumulated:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
        return Accumulated(jnp.int32(0), jnp.float32(0), zeros, optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None, *, weight: Any = 1.0, **extra: Any) -> tuple[Any, Any]:
        batches, total = state.batches + 1, state.weight + jnp.asarray(weight, jnp.float32)
        part = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)
        mean = jax.tree.map(lambda a, g: a + (g - a) * part.astype(a.dtype), state.gradient, updates)

        def apply() -> tuple[Any, Accumulated]:
            typed = jax.tree.map(lambda a, g: a.astype(g.dtype), mean, updates)
            changes, inner = optimizer.update(typed, state.inner, params, **extra)
            return changes, Accumulated(batches, jnp.zeros_like(total), jax.tree.map(jnp.zeros_like, mean), inner)

        def wait() -> tuple[Any, Accumulated]:
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(apply)[0])
            return nothing, Accumulated(batches, total, mean, state.inner)

        return jax.lax.cond(is_last(batches, every, steps), apply, wait)

    return optax.GradientTransformationExtraArgs(init, update)


def is_last(batches: Any, every: int, steps: int | None) -> Any:
    """Whether this many batches end a group."""
    full = batches % every == 0
    return full if steps is None else full | (batches == steps)


def accumulates(state: optax.OptState) -> bool:
    """Whether this is the state of an optimizer that collects gradients: of `accumulate` or of `optax.MultiSteps`."""
    kinds = (Accumulated, optax.MultiStepsState)
    found = jax.tree.leaves(state, is_leaf=lambda part: isinstance(part, kinds))
    return any(isinstance(part, kinds) for part in found)
