"""A decoder-only Transformer: the next token from the tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import cache as caches
from mhajax import embedding, masks, transformer
from mhajax.block import Captures, Gates, Interventions, Seen
from mhajax.dropout import dropout
from mhajax.interventions import Capture
from mhajax.transformer import Caches


@dataclass(frozen=True, kw_only=True)
class Config(transformer.Config):
    """A stack of layers, and the words it is about.

    Attributes:
      vocab_size: V. An experiment fills it in from its data.
      positions: "rotary" (in every attention), "sinusoidal" (added to the embedding) or "none" (causality alone).
    """

    vocab_size: int | None = None
    positions: embedding.Positions = "rotary"

    def __post_init__(self):
        transformer.Config.__post_init__(self)
        embedding.check_kind(self.positions)
        embedding.check_width(self.positions, self.width)


class Params(NamedTuple):
    """The table of embeddings, which also gives the logits, and the layers."""

    embedding: Array  # [V, D]
    stack: transformer.Params


def init_params(key: Array, config: Config) -> Params:
    """Parameters of the model.

    Raises:
      ValueError: if config.vocab_size is not set.
    """
    if config.vocab_size is None:
        raise ValueError("language_model.init_params: config.vocab_size must be a number, got None; set it.")
    key_embedding, key_stack = jax.random.split(key)
    return Params(
        embedding.init_params(key_embedding, config.vocab_size, config.d_model),
        transformer.init_params(key_stack, config),
    )


def apply(params: Params, tokens: Array, config: Config, **options: Any) -> Array:
    """Logits of the next token at every place.

    Args:
      params: from `init_params`.
      tokens: integers [..., T].
      config: the shape; static under jit.
      **options: mask (combined with the causal one), positions, gates (of `block.Gates`, [L, N] or [L, ..., N]),
        interventions (of `block.Interventions`, every leaf [L, ...]), kernel (as in `attention.apply`), dropout_key.

    Returns:
      float32 [..., T, V].
    """
    return embedding.logits(params.embedding, features(params, tokens, config, **options))


def apply_captured(
    params: Params,
    tokens: Array,
    config: Config,
    *,
    capture: Sequence[str] | Capture | Captures = ("weights",),
    **options: Any,
) -> tuple[Array, Seen]:
    """`apply`, and the arrays named in `attention.CAPTURES`, [L, ..., N, …].

    Names are of every layer, head and row; an `interventions.Capture` chooses some, and nothing else is computed.
    """
    x, _, seen = run(params, tokens, config, capture=capture, **options)
    return embedding.logits(params.embedding, x), seen


def features(
    params: Params,
    tokens: Array,
    config: Config,
    *,
    mask: masks.Mask | None = None,
    positions: Array | None = None,
    gates: Gates = Gates(),  # noqa: B008 - an immutable tuple
    interventions: Interventions = Interventions(),  # noqa: B008
    kernel: str = "auto",
    dropout_key: Array | None = None,
) -> Array:
    """What the logits are computed from, [..., T, D]: for losses that never hold [..., T, V]. Options as in `apply`."""
    options = {"mask": mask, "positions": positions, "gates": gates, "interventions": interventions}
    return run(params, tokens, config, kernel=kernel, dropout_key=dropout_key, **options)[0]


def init_cache(
    leading: tuple[int, ...], capacity: int, config: Config, dtype: Any = jnp.float32, *, rolling: bool = False
) -> Caches:
    """Room for `capacity` tokens in every layer; dtype is best that of the parameters. `rolling` as in `cache.init`."""
    return transformer.init_cache(leading, capacity, config, dtype, rolling=rolling)


def extend(params: Params, tokens: Array, cache: Caches, config: Config, **options: Any) -> tuple[Array, Caches]:
    """Logits [..., t, V] of t more tokens [..., t] after those in the cache, and the cache with them.

    Prompt and single tokens are the same call; the logits equal those of `apply` on the whole text (with
    `masks.window(capacity - 1)` if the cache is rolling).

    Args:
      params, tokens, config: as in `apply`.
      cache: from `init_cache`, or of the last call.
      **options: mask, gates and interventions as in `apply`; real, bool [..., t], False for padding, as in
        `cache.extend`: prompts of different lengths, rows that stand still.
    """
    x, cache, _ = run(params, tokens, config, cache=cache, **options)
    return embedding.logits(params.embedding, x), cache


def run(
    params: Params,
    tokens: Array,
    config: Config,
    *,
    mask: masks.Mask | None = None,
    positions: Array | None = None,
    gates: Gates = Gates(),  # noqa: B008 - an immutable tuple
    dropout_key: Array | None = None,
    cache: Caches | None = None,
    real: Array | None = None,
    **options: Any,
) -> tuple[Array, Any, Seen]:
    """Features, cache and captured arrays; `apply`, `apply_captured`, `features` and `extend` are views of it."""
    key_embedding, key_stack = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    if cache is not None:
        places = caches.positions(cache[0], tokens.shape[-1], real)
    else:
        places = positions = jnp.arange(tokens.shape[-1]) if positions is None else positions
    x = dropout(embedding.embed(params.embedding, tokens, places, config.positions), config.dropout, key_embedding)
    causal = masks.causal()
    return transformer.run(
        params.stack, x, config,
        mask=causal if mask is None else causal & mask, positions=positions,
        rotate=embedding.rotation(config.positions), gates=gates, dropout_key=key_stack, cache=cache, real=real,
        **options,
    )  # fmt: skip
