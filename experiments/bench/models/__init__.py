"""The same small language model in several libraries, for `bench step` and `bench start`.

Four layers (or more), each x + attention(norm(x)) and then x + mlp(norm(x)); attention without biases, GELU (tanh
approximation) with a hidden width of 4 D and biases, layer normalisation with epsilon 1e-6, also after the last layer;
sinusoids added to embeddings that are scaled by √D; one table for embedding and logits; causal, no dropout, mean
cross-entropy, AdamW with the same settings. Everybody starts from the same weights, and the losses of the first steps
have to agree.

What differs: ours computes the cross-entropy in chunks (`losses.linear_cross_entropy`), the others hold all logits,
which is what their users write; the layers of ours are one scanned stack, unrolled or not; torch runs eagerly, with one
matrix for queries, keys and values, `scaled_dot_product_attention`, and its fused AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEARNING_RATE, WEIGHT_DECAY, EPSILON = 1e-3, 0.01, 1e-6
KINDS = ("ours", "ours-unrolled", "linen", "nnx", "torch")


@dataclass(frozen=True, kw_only=True)
class Size:
    """L, D, N, T, B and V."""

    layers: int = 4
    d_model: int = 256
    heads: int = 4
    length: int = 256
    batch: int = 16
    vocabulary: int = 4096

    @property
    def width(self) -> int:
        """H."""
        return self.d_model // self.heads


def arrays(size: Size) -> dict[str, np.ndarray]:
    """Weights of all layers [L, …], the table, the sinusoids [T, D], and tokens [B, T + 1]."""
    random, (l, n, d, h) = np.random.default_rng(0), (size.layers, size.heads, size.d_model, size.width)  # noqa: E741
    draw = lambda fan_in, *shape: random.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)  # noqa: E731
    angles = np.arange(size.length)[:, None] * 10_000.0 ** (-2 * np.arange(d // 2) / d)
    return {
        "embedding": draw(d, size.vocabulary, d),
        "w_q": draw(d, l, n, d, h), "w_k": draw(d, l, n, d, h), "w_v": draw(d, l, n, d, h), "w_o": draw(d, l, n, h, d),
        "w_in": draw(d, l, d, 4 * d), "w_out": draw(4 * d, l, 4 * d, d),
        "positions": np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32),
        "tokens": random.integers(0, size.vocabulary, (size.batch, size.length + 1)),
    }  # fmt: skip
