"""The language model in this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.bench.models import LEARNING_RATE, WEIGHT_DECAY, Size
from mhajax import decoding, embedding, language_model, losses


def model(size: Size, arrays: dict, *, unroll: int = 1) -> tuple[language_model.Config, language_model.Params]:
    """The model, and its parameters from these weights."""
    config = language_model.Config(
        d_model=size.d_model, num_heads=size.heads, num_layers=size.layers, vocab_size=size.vocabulary,
        norm="layer", positions="sinusoidal", unroll=unroll,
    )  # fmt: skip
    params = jax.eval_shape(lambda: language_model.init_params(jax.random.key(0), config))
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)
    ones = lambda norm: norm._replace(scale=jnp.ones_like(norm.scale))  # noqa: E731
    layers = params.stack.layers
    layers = layers._replace(
        attention_norm=ones(layers.attention_norm),
        mlp_norm=ones(layers.mlp_norm),
        attention=layers.attention._replace(**{name: arrays[name] for name in ("w_q", "w_k", "w_v", "w_o")}),
        mlp=layers.mlp._replace(w_in=arrays["w_in"], w_out=arrays["w_out"]),
    )
    stack = params.stack._replace(layers=layers, norm=ones(params.stack.norm))
    return config, language_model.Params(embedding.Params(arrays["embedding"]), stack)


def program(size: Size, arrays: dict, *, unroll: int = 1) -> tuple[Callable, Any]:
    """The training step, (state, tokens) → (loss, state), not yet compiled, and its first state."""
    config, params = model(size, arrays, unroll=unroll)
    optimiser = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss(params, tokens):
        features = language_model.features(params, tokens[:, :-1], config)
        return losses.linear_cross_entropy(features, params.table, tokens[:, 1:]).loss / tokens[:, 1:].size

    def step(state: Any, tokens):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimiser.update(gradient, moments, params)
        return value, (optax.apply_updates(params, updates), moments)

    state: Any = params
    return step, (params, optimiser.init(state))


def writer(size: Size, arrays: dict) -> tuple[Callable, Any]:
    """(params, first tokens [B]) → tokens [B, T], the likeliest one after the other, and the params."""
    config, params = model(size, arrays, unroll=size.layers)

    def write(params, first):
        params = language_model.unstack(params)

        def step(tokens, cache):
            logits, cache = language_model.extend(params, tokens[:, None], cache, config)
            return logits[:, 0], cache

        cache = language_model.init_cache(first.shape, size.length, config)
        return decoding.generate(step, cache, first, decoding.greedy, jax.random.key(0), length=size.length)

    return write, params
