"""Tokens in, logits out: one table for both, as in Press & Wolf 2017, "Using the Output Embedding"."""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments, precision
from mhajax import positions as places

Positions = Literal["rotary", "sinusoidal", "none"]


def check_kind(kind: str) -> None:
    """Raise a ValueError unless this is a kind of positions."""
    if kind not in get_args(Positions):
        raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {kind!r}.")


def check_width(kind: str, head_dim: int) -> None:
    """Raise a ValueError if heads of this width have a channel without a partner to be rotated with."""
    if kind == "rotary" and head_dim % 2:
        raise ValueError(
            f'head_dim must be even for positions="rotary", which rotates pairs of channels, got {head_dim}; give an '
            'even head_dim (d_model / num_heads if it is left out), or positions="sinusoidal".'
        )


def init_params(key: Array, vocab_size: int, width: int) -> Array:
    """A table [V, D] whose rows have unit length on average."""
    return jax.random.normal(key, (vocab_size, width)) * width**-0.5


def embed(table: Array, tokens: Array, positions: Array, kind: Positions) -> Array:
    """The vectors of tokens [..., T], scaled to unit variance: [..., T, D]; with sinusoids added if `kind` says so.

    An id that is not in the table is none of its rows: negative ones are not counted from the end, too large ones are
    not the last. Under jit, where ids are not known, such a token gets NaN, as a cache that is full does.

    Raises:
      TypeError: if tokens are not integers.
      ValueError: for an id that is known not to be in the table.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"embedding.embed: tokens must be integers [..., T], got {tokens.dtype} {tokens.shape}.")
    vocab_size, width = table.shape
    arguments.below("embedding.embed", "tokens", tokens, vocab_size, "tokens in the vocabulary, V")
    rows = jnp.asarray(table).at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    x = rows * width**0.5
    return x + places.sinusoids(positions, width).astype(x.dtype) if kind == "sinusoidal" else x


def logits(table: Array, features: Array) -> Array:
    """Similarity of features [..., D] to every row of the table: float32 [..., V]."""
    table = table.astype(features.dtype)
    if (
        math.prod(features.shape[:-1]) == 1
    ):  # the next token of one text: XLA on CPU is several times as slow the other way
        return precision.einsum("vd,d->v", table, features.reshape(-1)).reshape(*features.shape[:-1], -1)
    return precision.einsum("...d,vd->...v", features, table)


def rotation(kind: Positions):
    """The function that attention applies to queries and keys, or None."""
    return places.rotary if kind == "rotary" else None
