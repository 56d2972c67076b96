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

    @linen.compact
    def __call__(self, x, mask):
        attention = linen.MultiHeadDotProductAttention(self.heads, use_bias=False, deterministic=True, name="attention")
        x = x + attention(linen.LayerNorm(epsilon=EPSILON, name="attention_norm")(x), mask=mask)
        hidden = linen.Dense(4 * x.shape[-1], name="in")(linen.LayerNorm(epsilon=EPSILON, name="mlp_norm")(x))
        return x + linen.Dense(x.shape[-1], name="out")(linen.gelu(hidden))


class _Model(linen.Module):
    size: Size
    positions: Any

    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(self.size.vocabulary, self.size.d_model, name="embedding")
        x = table(tokens) * self.size.d_model**0.5 + self.positions
        mask = linen.make_causal_mask(tokens)
        for number in range(self.size.layers):
            x = _Block(self.size.heads, name=f"layer_{number}")(x, mask)
        return table.attend(linen.LayerNorm(epsilon=EPSILON, name="norm")(x))


def program(size: Size, arrays: dict) -> tuple[Callable, Any]:
    """The training step, (state, tokens) → (loss, state), not yet compiled, and its first state."""
    model = _Model(size, jnp.asarray(arrays["positions"]))
    params = dict(jax.jit(model.init)(jax.random.key(0), arrays["tokens"][:, :-1])["params"])
    params["embedding"] = {"embedding": arrays["embedding"]}
    for number in range(size.layers):
        layer = params[f"layer_{number}"]
        params[f"layer_{number}"] = {
            **layer,
            "attention": flax_kernels({name: arrays[name][number] for name in ("w_q", "w_k", "w_v", "w_o")}),
            "in": {**layer["in"], "kernel": arrays["w_in"][number]},
            "out": {**layer["out"], "kernel": arrays["w_out"][number]},
        }
    optimiser = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss(params, tokens):
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def step(state, tokens):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimiser.update(gradient, moments, params)
        return value, (optax.apply_updates(params, updates), moments)

    return step, (params, optimiser.init(params))
