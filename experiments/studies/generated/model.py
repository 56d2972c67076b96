"""A small model of attention alone: features → one linear map → attention, layer by layer → one linear map.

    x ← features w_in,   x ← x + attention(x) for every layer,   outputs = x w_out + b_out

No normalisation and no feed-forward network, so that what is reached, attention has reached. Where tokens stand is
among the features if the task wants it known. Queries attend to keys at their position and before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import attention, masks
from mhajax.variants import gated, sigmoid, sinks


class Variant(NamedTuple):
    """A kind of attention.

    Attributes:
      module: its `init_params` and `apply`.
      weights: (parameters of a layer, logits [..., N, T, S], -inf where hidden) → weights of the same shape.
    """

    module: Any
    weights: Callable[[Any, Array], Array]


def _with_sink(params: sinks.Params, logits: Array) -> Array:
    column = jnp.broadcast_to(params.sinks[:, None, None], (*logits.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([logits, column], axis=-1), axis=-1)[..., :-1]


def _softmax(_: Any, logits: Array) -> Array:
    hidden = jnp.all(logits == -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(hidden, 0.0, jax.nn.softmax(jnp.where(hidden, 0.0, logits), axis=-1))


VARIANTS: dict[str, Variant] = {
    "softmax": Variant(attention, _softmax),
    "gated": Variant(gated, _softmax),  # the gate is on what the weights give
    "sinks": Variant(sinks, _with_sink),
    "sigmoid": Variant(sigmoid, lambda _, logits: jax.nn.sigmoid(logits - jnp.log(logits.shape[-1]))),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model.

    Attributes:
      features: F, of every token.
      outputs: C, of every token that is read.
      width: D.
      num_heads: N.
      head_dim: H; None: D/N.
      layers: L.
      variant: of the attention, one of VARIANTS.
      residual: whether a layer adds to x; else its output takes the place of x.
      reads: whether the outputs of the last token are wanted, or those of all.
      hide_first: whether the first token is no key.
      untrained: whether w_q and w_k stay as they were drawn; what they are given, w_in, is trained all the same.
    """

    features: int
    outputs: int
    width: int
    num_heads: int = 1
    head_dim: int | None = None
    layers: int = 1
    variant: str = "softmax"
    residual: bool = True
    reads: Literal["last", "all"] = "last"
    hide_first: bool = False
    untrained: bool = False

    @property
    def attention(self) -> attention.Config:
        """The shape of a layer."""
        return attention.Config(d_model=self.width, num_heads=self.num_heads, head_dim=self.head_dim)


class Params(NamedTuple):
    """The parameters."""

    w_in: Array  # [F, D]
    layers: Any  # of the variant, every leaf [L, ...]
    w_out: Array  # [D, C]
    b_out: Array  # [C]


def init_params(key: Array, config: Config, size: Array | float = 1.0) -> Params:
    """Parameters with which x has about unit variance.

    Args:
      key: PRNG key.
      config: the shape.
      size: root of the mean squared norm of a token's features.
    """
    key_in, key_layers, key_out = jax.random.split(key, 3)
    new = VARIANTS[config.variant].module.init_params
    return Params(
        jax.random.normal(key_in, (config.features, config.width)) / size,
        jax.vmap(lambda key: new(key, config.attention))(jax.random.split(key_layers, config.layers)),
        jax.random.normal(key_out, (config.width, config.outputs)) * config.width**-0.5,
        jnp.zeros(config.outputs),
    )


def count(params: Any) -> int:
    """How many parameters there are."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def apply(params: Params, features: Array, config: Config) -> Array:
    """Outputs of features [B, T, F]: [B, C] of the last token, or [B, T, C] of all, as `config.reads` says."""
    x = features @ params.w_in
    for layer in range(config.layers):
        own = _layer(params, layer, config)
        asking, options = _asked(x, layer, config)
        changed = VARIANTS[config.variant].module.apply(own, asking, config.attention, **options)
        x = asking + changed if config.residual else changed
    outputs = x @ params.w_out + params.b_out
    return outputs[:, -1] if config.reads == "last" else outputs


def first_weights(params: Params, features: Array, config: Config) -> Array:
    """The weights of the first layer, [B, N, T, S]; T is 1 if it is the only one and the last token is read.

    Those of the learned sinks and of the sigmoid do not sum to 1.
    """
    own = _layer(params, 0, config)
    asking, options = _asked(features @ params.w_in, 0, config)
    inner = own if config.variant == "softmax" else own.attention
    _, seen = attention.apply_captured(inner, asking, config.attention, capture=("logits",), **options)
    return VARIANTS[config.variant].weights(own, seen["logits"])


def _layer(params: Params, layer: int, config: Config) -> Any:
    own = jax.tree.map(lambda leaf: leaf[layer], params.layers)
    if not config.untrained:
        return own
    inner = own if config.variant == "softmax" else own.attention
    inner = inner._replace(w_q=jax.lax.stop_gradient(inner.w_q), w_k=jax.lax.stop_gradient(inner.w_k))
    return inner if config.variant == "softmax" else own._replace(attention=inner)


def _asked(x: Array, layer: int, config: Config) -> tuple[Array, dict[str, Any]]:
    """The tokens whose queries are needed in a layer, and how they attend to x."""
    hidden = masks.function(lambda query, key: key > 0) if config.hide_first else None
    if config.reads == "last" and layer == config.layers - 1:  # which may attend to all
        last = x.shape[-2] - 1
        return x[..., last:, :], {"memory": x, "positions": jnp.array([last]), "mask": hidden}
    causal = masks.causal()
    return x, {"mask": causal if hidden is None else causal & hidden}
