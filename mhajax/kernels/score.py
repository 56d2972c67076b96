"""Functions of one query and one key, lifted over the pairs of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.extend import core

from mhajax import scores
from mhajax.kernels import varying


def hoist(score: Callable, dtype: Any, num_heads: int, *others: Any) -> tuple[Callable, tuple[Array, ...]]:
    """A score function as one of (score, head, q_position, k_position, *constants), and the constants.

    A custom derivative sees only its arguments, so the traced arrays that a user's function closes over have to become
    arguments. Those whose numbers are there need no gradient and stay where they are.

    Args:
      score: the function.
      dtype: of the scores.
      num_heads: N, for which the library's own score functions are checked.
      *others: what the scores are made from.

    Raises:
      ValueError: if the function does not give one number, or holds something for another number of heads. If, inside
        `shard_map`, a traced array is the same on all devices and the others are not: its gradient would be summed over
        them in every tile.
    """
    example = (jax.ShapeDtypeStruct((), dtype), *[jax.ShapeDtypeStruct((), jnp.int32)] * 3)
    checked = lambda *pair: score(*pair)  # noqa: E731 - a new function, which JAX has not traced for another N
    with scores.for_heads(num_heads):
        traced, out = jax.make_jaxpr(checked, return_shape=True)(*example)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.number):
        raise ValueError(
            "kernels: score must give one number for (score, head, q_position, k_position), which are single numbers, "
            f"got {jax.tree.map(lambda a: f'{a.dtype}{list(a.shape)}', out)}; index arrays by head and positions."
        )
    axes = varying.axes(others, traced.consts)
    if axes:
        traced = jax.make_jaxpr(score)(*varying.over(axes, [jnp.zeros((), a.dtype) for a in example]))
    slots = [constant if isinstance(constant, Tracer) else None for constant in traced.consts]
    constants = tuple(constant for constant in slots if constant is not None)
    for constant in constants:
        if missing := axes - varying.axes(constant):
            raise ValueError(
                f"kernels: score closes over an array {constant.dtype}{list(constant.shape)} that is the same on all "
                f"devices along {sorted(missing)}, and what it scores is not; make it vary with jax.lax.pcast(array, "
                f"{tuple(sorted(missing))}, to='varying') (jax.lax.pvary before JAX 0.8), or give shard_map "
                "check_vma=False."
            )

    def pure(x: Array, head: Array, q_position: Array, k_position: Array, *constants: Array) -> Array:
        arguments = iter(constants)
        filled = [
            constant if slot is None else _from_bits(next(arguments), slot.dtype)
            for slot, constant in zip(slots, traced.consts, strict=True)
        ]
        function = core.jaxpr_as_fun(core.ClosedJaxpr(traced.jaxpr, filled))  # pyright: ignore[reportPrivateImportUsage]
        indices = [jnp.asarray(index, jnp.int32) for index in (head, q_position, k_position)]
        return function(*varying.over(axes, [x, *indices]))[0].astype(x.dtype)

    return pure, tuple(map(_as_bits, constants))


def _as_bits(constant: Array) -> Array:
    """An array that a custom derivative takes: integers and booleans go as floats with their bits."""
    if not jnp.issubdtype(constant.dtype, jnp.integer) and constant.dtype != bool:
        return constant
    whole, floating = (jnp.int64, jnp.float64) if constant.dtype.itemsize == 8 else (jnp.int32, jnp.float32)
    return jax.lax.bitcast_convert_type(constant.astype(whole), floating)


def _from_bits(array: Array, dtype: Any) -> Array:
    if array.dtype == dtype:
        return array
    return jax.lax.bitcast_convert_type(array, jnp.int64 if array.dtype.itemsize == 8 else jnp.int32).astype(dtype)


def lift(score: Callable) -> Callable:
    """A score function of one pair, for logits [t, s], one head, positions [t] and [s]; constants are shared."""

    def lifted(scores: Array, head: Array, q_position: Array, k_position: Array, *constants: Array) -> Array:
        one_query = jax.vmap(lambda x, q, k: score(x, head, q, k, *constants), in_axes=(0, None, 0))
        return jax.vmap(one_query, in_axes=(0, 0, None))(scores, q_position, k_position)

    return lifted
