"""A small language model in NNX, in the manner of nanoGPT, whose attention is ours: characters of any text file.

python recipes/nano_lm.py book.txt --steps 2000; without a file it takes a text of its own, and some seconds.
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as nats

from mhajax import AttentionConfig, masks, positions
from mhajax.nnx import MultiHeadAttention


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.first, self.second = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = MultiHeadAttention(AttentionConfig(d_model=width, num_heads=heads), rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.first(x), mask=masks.causal(), rotate=positions.rotary)
        return x + self.down(nnx.gelu(self.up(self.second(x))))


class Model(nnx.Module):
    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, rngs: nnx.Rngs):
        self.embed, self.norm = nnx.Embed(vocabulary, width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(width, heads, rngs) for _ in range(layers)))

    def __call__(self, tokens):
        return self.embed.attend(
            self.norm(self.blocks(self.embed(tokens)))
        )  # the table of the tokens also gives the logits


@nnx.jit
def step(model, optimizer, tokens):
    value, grads = nnx.value_and_grad(lambda model: nats(model(tokens[:, :-1]), tokens[:, 1:]).mean())(model)
    optimizer.update(model, grads)
    return value


parser = argparse.ArgumentParser()
parser.add_argument("text", nargs="?")
for name, default in {"steps": 30, "width": 32, "heads": 4, "layers": 2, "length": 32, "batch": 8}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
o = parser.parse_args()
text = open(o.text, encoding="utf-8").read() if o.text else "the cat sat on the mat. " * 200
letters, ids = np.unique(list(text), return_inverse=True)
model = Model(len(letters), o.width, o.heads, o.layers, nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for number in range(o.steps):
    start = np.random.default_rng(number).integers(0, len(ids) - o.length, (o.batch, 1))
    loss = step(model, optimizer, jnp.asarray(ids[start + np.arange(o.length + 1)]))
    if (number + 1) % max(1, o.steps // 10) == 0:
        print(f"step {number + 1}: {float(loss):.3f} nats per character")
