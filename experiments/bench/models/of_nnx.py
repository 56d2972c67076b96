"""The language model in Flax NNX, split once into arrays and structure, which costs least per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.bench.layer import flax_kernels
from experiments.bench.models import EPSILON, LEARNING_RATE, WEIGHT_DECAY, Size


class _Block(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        d = size.d_model
        self.attention_norm = nnx.LayerNorm(d, epsilon=EPSILON, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            size.heads, d, use_bias=False, deterministic=True, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.LayerNorm(d, epsilon=EPSILON, rngs=rngs)
        self.w_in = nnx.Linear(d, 4 * d, rngs=rngs)
        self.w_out = nnx.Linear(4 * d, d, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.w_out(nnx.gelu(self.w_in(self.mlp_norm(x))))


class _Model(nnx.Module):
    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.size = size
        self.embedding = nnx.Embed(size.vocabulary, size.d_model, rngs=rngs)
        for number in range(size.layers):  # attributes, as lists of modules changed between versions of Flax
            setattr(self, f"layer_{number}", _Block(size, rngs))
        self.norm = nnx.LayerNorm(size.d_model, epsilon=EPSILON, rngs=rngs)

    def __call__(self, tokens, positions):
        x = self.embedding(tokens) * self.size.d_model**0.5 + positions
        mask = nnx.make_causal_mask(tokens)
        for number in range(self.size.layers):
            x = getattr(self, f"layer_{number}")(x, mask)
        return self.embedding.attend(self.norm(x))


def program(size: Size, arrays: dict) -> tuple[Callable, Any]:
    """The training step, (state, tokens) → (loss, state), not yet compiled, and its first state."""
    graph, params, rest = nnx.split(_Model(size, nnx.Rngs(0)), nnx.Param, ...)
    positions = jnp.asarray(arrays["positions"])
    places, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [_given([str(getattr(key, "key", "")) for key in path], arrays, leaf) for path, leaf in places]
    params = jax.tree.unflatten(structure, leaves)
    optimiser = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss(params, tokens):
        logits = nnx.merge(graph, params, rest)(tokens[:, :-1], positions)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def step(state, tokens):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optimiser.update(gradient, moments, params)
        return value, (optax.apply_updates(params, updates), moments)

    return step, (params, optimiser.init(params))


def _given(path: list[str], arrays: dict, leaf: Any) -> Any:
    """The common weight that belongs to a place of the state; norms and biases stay."""
    if path[0] == "embedding":
        return arrays["embedding"]
    if "kernel" not in path:
        return leaf
    number = int(path[0].removeprefix("layer_"))
    if path[1] in ("w_in", "w_out"):
        return arrays[path[1]][number]
    return flax_kernels({name: arrays[name][number] for name in ("w_q", "w_k", "w_v", "w_o")})[path[2]]["kernel"]
