"""Dropout from a counter: cheap, and the same wherever it is computed.

`jax.random.bernoulli` runs twenty rounds of Threefry for each element, which on a CPU costs more than the layer it
regularises. Dropout needs no cryptography: here the JAX key is expanded once, and each element's bits are a hash of the
key and of the element's own index. The bits can so be computed inside any fused loop, and a kernel that works block by
block draws the same mask as one that works on the whole array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.arguments import kind_of, known


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Set elements to 0 with probability `rate` and scale the others by 1 / (1 - rate).

    Args:
      x: any shape.
      rate: probability in [0, 1), a Python number. 0 leaves no trace in the compiled program.
      key: PRNG key, or None: no dropout (evaluation).
    """
    if rate == 0.0 or key is None:
        return x
    return jnp.where(keep(key, rate, x.shape), x * (1 / (1 - rate)), 0).astype(x.dtype)


def keep(key: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """Which elements stay: bool of this shape, True with probability 1 - rate (to 1 part in 2³²).

    References:
      The mixing function is "lowbias32" of C. Wellons' hash-prospector (public domain), applied twice, each time after
      one word of the key is added.
    """
    counter = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        counter += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return keep_at(words(key), rate, counter)


def words(key: Array) -> Array:
    """The two words that a key is expanded to, uint32 [2], for `keep_at`."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_at(words: Array, rate: float, index: Array) -> Array:
    """`keep` for the elements with these indices (uint32, of the flattened array), wherever they are computed."""
    bits = _mix(_mix(index + words[0]) + words[1])
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def check_rate(who: str, name: str, rate: float) -> None:
    """Raise unless the rate is a probability below 1, a number that is there (static under jit)."""
    if isinstance(rate, bool) or not known(rate) or not isinstance(rate, int | float | np.number | Array):
        raise TypeError(f"{who}: {name} must be a number in [0, 1), static under jit, got {kind_of(rate)}.")
    if not 0.0 <= rate < 1.0 or np.float32(rate) == 1:  # which float32 makes of 1 - 1e-12
        raise ValueError(f"{who}: {name} must be in [0, 1), got {rate}; it is the share that is set to zero.")


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
