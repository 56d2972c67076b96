"""Functions of one query and one key, lifted over the pairs of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core


def hoist(score: Callable, dtype: Any) -> tuple[Callable, tuple[Array, ...]]:
    """A score function as one of (score, head, q_position, k_position, *constants), and the arrays it closes over.

    A custom derivative sees only its arguments, so what a user's function closes over has to become one of them.

    Raises:
      ValueError: if the function does not give one number.
    """
    example = (jax.ShapeDtypeStruct((), dtype), *[jax.ShapeDtypeStruct((), jnp.int32)] * 3)
    traced, out = jax.make_jaxpr(score, return_shape=True)(*example)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.number):
        raise ValueError(
            "kernels: score must give one number for (score, head, q_position, k_position), which are single numbers, "
            f"got {jax.tree.map(lambda a: f'{a.dtype}{list(a.shape)}', out)}; index arrays by head and positions."
        )
    constants = tuple(jnp.asarray(constant) for constant in traced.consts)

    def pure(x: Array, head: Array, q_position: Array, k_position: Array, *constants: Array) -> Array:
        function = core.jaxpr_as_fun(core.ClosedJaxpr(traced.jaxpr, constants))
        places = (jnp.asarray(place, jnp.int32) for place in (head, q_position, k_position))
        return function(x, *places)[0].astype(x.dtype)

    return pure, constants


def lift(score: Callable) -> Callable:
    """A score function of one pair, for logits [t, s], one head, positions [t] and [s]; constants are shared."""

    def lifted(scores: Array, head: Array, q_position: Array, k_position: Array, *constants: Array) -> Array:
        one_query = jax.vmap(lambda x, q, k: score(x, head, q, k, *constants), in_axes=(0, None, 0))
        return jax.vmap(one_query, in_axes=(0, 0, None))(scores, q_position, k_position)

    return lifted
