"""The language model in Flax Linen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen

from experiments.bench.layer import flax_kernels
from experiments.bench.models import EPSILON, LEARNING_RATE, WEIGHT_DECAY, Size


class _Block(linen.Module):
    heads: int
    decode: bool = False

    @linen.compact
    def __call__(self, x, mask):
        attention = linen.MultiHeadDotProductAttention(
            self.heads, use_bias=False, deterministic=True, decode=self.decode, name="attention"
        )
        x = x + attention(linen.LayerNorm(epsilon=EPSILON, name="attention_norm")(x), mask=mask)
        hidden = linen.Dense(4 * x.shape[-1], name="in")(linen.LayerNorm(epsilon=EPSILON, name="mlp_norm")(x))
        return x + linen.Dense(x.shape[-1], name="out")(linen.gelu(hidden))


class _Model(linen.Module):
    size: Size
    decode: bool = False

    @linen.compact
    def __call__(self, tokens, positions):
        table = linen.Embed(self.size.vocabulary, self.size.d_model, name="embedding")
        x = table(tokens) * self.size.d_model**0.5 + positions
        mask = None if self.decode else linen.make_causal_mask(tokens)
        for number in range(self.size.layers):
            x = _Block(self.size.heads, self.decode, name=f"layer_{number}")(x, mask)
        return table.attend(linen.LayerNorm(epsilon=EPSILON, name="norm")(x))


def _variables(model: _Model, arrays: dict) -> tuple[dict, Any]:
    """Parameters from these weights, and an empty cache if the model has one."""
    size = model.size
    shape, places = jnp.zeros((size.batch, size.length), jnp.int32), jnp.asarray(arrays["positions"])
    variables = jax.jit(model.init)(jax.random.key(0), shape, places)
    params = dict(variables["params"])
    params["embedding"] = {"embedding": arrays["embedding"]}
    for number in range(size.layers):
        layer = params[f"layer_{number}"]
        params[f"layer_{number}"] = {
            **layer,
            "attention": flax_kernels({name: arrays[name][number] for name in ("w_q", "w_k", "w_v", "w_o")}),
            "in": {**layer["in"], "kernel": arrays["w_in"][number]},
            "out": {**layer["out"], "kernel": arrays["w_out"][number]},
        }
    return params, variables.get("cache")


def program(size: Size, arrays: dict) -> tuple[Callable, Any]:
    """The training step, (state, tokens) → (loss, state), not yet compiled, and its first state."""
    model, positions = _Model(size), jnp.asarray(arrays["positions"])
    params, _ = _variables(model, arrays)
    optimiser = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss(params, tokens):
        logits: Any = model.apply({"params": params}, tokens[:, :-1], positions)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def step(state, tokens):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimiser.update(gradient, moments, params)
        return value, (optax.apply_updates(params, updates), moments)

    return step, (params, optimiser.init(params))


def writer(size: Size, arrays: dict) -> tuple[Callable, Any]:
    """(params, first tokens [B]) → tokens [B, T], the likeliest one after the other, and the params."""
    model, positions = _Model(size, decode=True), jnp.asarray(arrays["positions"])
    params, empty = _variables(model, arrays)

    def write(params, first):
        def one_more(state, position):
            last, cache = state
            given = {"params": params, "cache": cache}
            logits, changed = model.apply(given, last[:, None], position[None], mutable=["cache"])
            token = jnp.argmax(logits[:, 0], axis=-1).astype(first.dtype)
            return (token, changed["cache"]), token

        _, tokens = jax.lax.scan(one_more, (first, empty), positions)
        return tokens.T

    return write, params
