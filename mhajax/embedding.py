"""Tokens in, logits out: a table of vectors, and how they say where a token stands.

One table serves both, as in Press & Wolf 2017, "Using the Output Embedding", unless a model has another for its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import arguments, norm, precision
from mhajax import positions as places

Positions = Literal["rotary", "sinusoidal", "learned", "none"]


@dataclass(frozen=True, kw_only=True)
class Config(norm.Config):
    """The vectors of tokens. (`norm` and `norm_epsilon` are of their normalisation, where there is one.)

    Attributes:
      vocab_size: V. An experiment fills it in from its data.
      positions: "rotary" (in every attention of a text to itself), "sinusoidal" or "learned" (added to the vectors), or
        "none".
      rotary_base: base of the rotary angles, as in `positions.rotary`.
      rotary_frequencies: radians per token of each pair, instead of a base: what `positions.llama3` and its siblings
        give, as a tuple of numbers.
      rotary_magnitude: factor of the rotated channels, such as `positions.yarn_magnitude`.
      max_positions: P, how many learned positions there are.
      token_types: kinds of tokens that have a learned vector each, such as BERT's two segments. None: there are none.
      embedding_norm: normalise the vectors.
      embedding_width: E, if tokens have narrower vectors than D, which a linear map widens (ALBERT). None: D.
      scale_embedding: multiply the vectors of tokens by the square root of their width.
    """

    vocab_size: int | None = None
    positions: Positions = "rotary"
    rotary_base: float = 10_000.0
    rotary_frequencies: tuple[float, ...] | None = None
    rotary_magnitude: float = 1.0
    max_positions: int | None = None
    token_types: int | None = None
    embedding_norm: bool = False
    embedding_width: int | None = None
    scale_embedding: bool = True

    def __post_init__(self):
        norm.Config.__post_init__(self)
        arguments.integers(self, "vocab_size", "max_positions", "token_types", "embedding_width", optional=True)
        arguments.booleans(self, "embedding_norm", "scale_embedding")
        arguments.positive(self, "rotary_base", "rotary_magnitude")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {self.positions!r}.")
        if (self.positions == "learned") != (self.max_positions is not None):
            raise ValueError(
                f'max_positions must be a number for positions="learned" and only for them, got {self.max_positions} '
                f"for {self.positions!r}."
            )

    @property
    def token_width(self) -> int:
        """E, of the vectors in the table."""
        return self.d_model if self.embedding_width is None else self.embedding_width


class Params(NamedTuple):
    """The table, and what the config asks for besides."""

    tokens: Array  # [V, E]
    positions: Array | None = None  # [P, E]
    types: Array | None = None  # [kinds, E]
    norm: norm.Params | None = None  # of E channels
    projection: Array | None = None  # [E, D]
    projection_bias: Array | None = None  # [D]


def check_width(config: Config, head_dim: int) -> None:
    """Raise a ValueError if heads of this width have a channel without a partner to be rotated with."""
    if config.positions == "rotary" and config.rotary_frequencies is None and head_dim % 2:
        raise ValueError(
            f'head_dim must be even for positions="rotary", which rotates pairs of channels, got {head_dim}; give an '
            'even head_dim (d_model / num_heads if it is left out), or positions="sinusoidal".'
        )


def init_params(key: Array, config: Config) -> Params:
    """Rows of unit length on average; positions and types are as long as tokens are when they are added.

    Raises:
      TypeError: if key is no PRNG key.
      ValueError: if config.vocab_size is not set.
    """
    arguments.init("embedding.init_params", key, config, Config)
    if config.vocab_size is None:
        raise ValueError("embedding.init_params: config.vocab_size must be a number, got None; set it.")
    width, scale = config.token_width, 1.0 if config.scale_embedding else config.token_width**-0.5
    own = partial(jax.random.fold_in, key)  # tokens are drawn as if there were nothing else
    narrow = config.embedding_width is not None
    return Params(
        jax.random.normal(key, (config.vocab_size, width)) * width**-0.5,
        jax.random.normal(own(1), (config.max_positions, width)) * scale if config.max_positions else None,
        jax.random.normal(own(2), (config.token_types, width)) * scale if config.token_types else None,
        norm.Params(jnp.ones(width), jnp.zeros(width) if config.norm == "layer" else None)
        if config.embedding_norm
        else None,
        jax.random.normal(own(3), (width, config.d_model)) * width**-0.5 if narrow else None,
        jnp.zeros(config.d_model) if narrow else None,
    )


def apply(
    params: Params, tokens: Array, config: Config, *, positions: Array | None = None, types: Array | None = None
) -> Array:
    """The vectors of tokens: [..., T, D].

    An id that is not in the table is none of its rows: negative ones are not counted from the end, too large ones are
    not the last. Under jit, where ids are not known, such a token gets NaN, as a cache that is full does. The same goes
    for learned positions and for types.

    Args:
      params: from `init_params`.
      tokens: integers [..., T].
      config: the shape; static under jit.
      positions: integers [T] or [..., T]; 0, 1, 2, … if None.
      types: integers [..., T], the kinds of tokens; all 0 if None.

    Raises:
      TypeError: if tokens are not integers, or types are given to a model that knows none.
      ValueError: for an id that is known not to be in its table.
    """
    vocabulary = "tokens in the vocabulary, V"
    x = _rows("tokens", params.tokens, tokens, vocabulary)
    if config.scale_embedding:
        x = x * params.tokens.shape[-1] ** 0.5
    where = jnp.arange(tokens.shape[-1]) if positions is None else positions
    if config.positions == "sinusoidal":
        x = x + places.sinusoids(where, x.shape[-1]).astype(x.dtype)
    if params.positions is not None:
        x = x + _rows("positions", params.positions, where, "learned positions")
    if params.types is not None:
        kinds = jnp.zeros(tokens.shape, int) if types is None else types
        x = x + _rows("types", params.types, kinds, "types of tokens")
    elif types is not None:
        raise TypeError("embedding.apply: types must be None for a model without token_types.")
    if params.norm is not None:
        x = norm.apply(params.norm, x, config)
    if params.projection is not None:
        x = x @ params.projection.astype(x.dtype)
    return x if params.projection_bias is None else x + params.projection_bias.astype(x.dtype)


def logits(table: Array, features: Array) -> Array:
    """Similarity of features [..., E] to every row of a table [V, E]: float32 [..., V]."""
    table = table.astype(features.dtype)
    if math.prod(features.shape[:-1]) == 1:
        # The next token of one text: XLA on CPU is several times as slow the other way.
        return precision.einsum("vd,d->v", table, features.reshape(-1)).reshape(*features.shape[:-1], -1)
    return precision.einsum("...d,vd->...v", features, table)


def rotation(config: Config) -> Callable[[Array, Array], Array] | None:
    """The function that attention applies to queries and keys, or None."""
    if config.positions != "rotary":
        return None
    options = {}
    if config.rotary_frequencies is not None:
        options["frequencies"] = jnp.asarray(config.rotary_frequencies, jnp.float32)
    elif config.rotary_base != Config.rotary_base:
        options["base"] = config.rotary_base
    if config.rotary_magnitude != 1.0:
        options["magnitude"] = config.rotary_magnitude
    return partial(places.rotary, **options) if options else places.rotary


def _rows(name: str, table: Array, indices: Array, what: str) -> Array:
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"embedding.apply: {name} must be integers [..., T], got {indices.dtype} {indices.shape}.")
    arguments.below("embedding.apply", name, indices, table.shape[0], what)
    return jnp.asarray(table).at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
