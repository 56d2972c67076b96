"""Loops over 0 … count - 1 that are none where there is one round only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def times(body: Callable, count: int) -> Any:
    """`lax.map` of a function of the index over 0 … count - 1, without a loop if there is only one."""
    return accumulate(lambda state, index: (state, body(index)), None, count)[1]


def accumulate(body: Callable, state: Any, count: int) -> tuple[Any, Any]:
    """`lax.scan` over 0 … count - 1, without a loop if there is only one."""
    if count == 1:
        state, out = body(state, jnp.int32(0))
        return state, jax.tree.map(lambda a: a[None], out)
    return jax.lax.scan(body, state, jnp.arange(count, dtype=jnp.int32))
