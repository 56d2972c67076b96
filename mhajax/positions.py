"""Where a token stands: functions that are handed to attention or added to embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def rotary(x: Array, positions: Array, *, base: float = 10_000.0) -> Array:
    """Turn queries or keys by an angle that grows with their position, so that logits depend on distance only.

    Channel pairs (i, i + H/2) are turned by `position · base^(-2i/H)`: the halves convention of Llama and GPT-NeoX.
    Give it to attention as it is, `rotate=positions.rotary`, or with another base through `functools.partial`.

    Args:
      x: [..., T, H], H even.
      positions: [T] or [..., T], in tokens.
      base: the longest wavelength is 2π · base tokens.

    Returns:
      [..., T, H] in the dtype of x; the angles are computed in float32.

    Raises:
      ValueError: if H is odd.

    References:
      Su et al. 2021, "RoFormer", section 3.2.2 (which pairs neighbouring channels instead of halves).
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"positions.rotary: H must be even to form pairs, got H={width}; change head_dim.")
    wavelengths = base ** (jnp.arange(width // 2, dtype=jnp.float32) * (2 / width))
    angles = positions[..., None].astype(jnp.float32) / wavelengths  # [..., T, H/2]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def sinusoids(positions: Array, width: int, *, base: float = 10_000.0) -> Array:
    """A fixed vector for every position, to be added to embeddings.

    Args:
      positions: [...], in tokens.
      width: D, even; the first half are sines, the second cosines of the same angles.
      base: the longest wavelength is 2π · base tokens.

    Returns:
      float32 [..., D].

    Raises:
      ValueError: if the width is odd.

    References:
      Vaswani et al. 2017, section 3.5 (which interleaves sines and cosines; the order of channels is immaterial).
    """
    if width % 2:
        raise ValueError(f"positions.sinusoids: width must be even, got {width}; change d_model.")
    wavelengths = base ** (jnp.arange(width // 2, dtype=jnp.float32) * (2 / width))
    angles = positions[..., None].astype(jnp.float32) / wavelengths
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
