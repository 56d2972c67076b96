"""The log-sum-exp of every query in two parts, its largest logit and the logarithm of what is left.

Their sum is one number, which is what is captured; but where a row's logits are all about -1e9 (a bias that hides
padding, say), log S is less than the rounding of that number, and exp(logit - log-sum-exp) would be 1 for every key.
So whoever computes weights again keeps the two apart: exp((logit - largest) - rest).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LogSumExp(NamedTuple):
    """log Σ exp(logit) = top + log_total. A fully masked query has 0 and -inf, a non-finite one NaN in log_total.

    Only log_total has a gradient, that of the whole: subtracting the largest logit changes nothing.
    """

    top: Array  # [..., T], the largest logit, or any number near it
    log_total: Array  # [..., T], log Σ exp(logit - top)

    @property
    def whole(self) -> Array:
        """The one number, [..., T]; -inf for a fully masked query."""
        return jax.lax.stop_gradient(self.top) + self.log_total


def merge(a: LogSumExp, b: LogSumExp) -> LogSumExp:
    """That of the keys of both."""
    lowest = lambda c: jnp.where(c.log_total == -jnp.inf, -jnp.inf, c.top)  # noqa: E731
    top = jnp.maximum(lowest(a), lowest(b))
    top = jnp.where(top == -jnp.inf, 0, top)
    return LogSumExp(top, jnp.logaddexp(a.log_total + (a.top - top), b.log_total + (b.top - top)))


def share(part: LogSumExp, whole: LogSumExp) -> Array:
    """exp(part - whole), [..., T]: what some of the keys receive of all; 0 where nothing is visible."""
    nothing = whole.log_total == -jnp.inf
    return jnp.exp((part.top - whole.top) + (part.log_total - jnp.where(nothing, 0, whole.log_total)))
