"""A language model of a long text: a window, and the first tokens for all. No T × T array is made, forward or backward.

python recipes/long_context.py --length 16384
python recipes/long_context.py                  # 512 tokens
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from mhajax import kernels, language_model, masks

parser = argparse.ArgumentParser()
for name, default in {"length": 512, "window": 64, "sinks": 4, "steps": 3, "width": 32, "heads": 4}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
o = parser.parse_args()

config = language_model.Config(vocab_size=64, d_model=o.width, num_heads=o.heads, num_layers=2)
params = language_model.init_params(jax.random.key(0), config)
mask = masks.window(o.window - 1) | masks.prefix(o.sinks)  # a language model adds causal() to it
head = jax.ShapeDtypeStruct((1, o.heads, o.length, config.width), jnp.float32)
print(kernels.explain(head, head, head, mask=masks.causal() & mask))
optimizer = optax.adam(3e-3)
state = optimizer.init(params)


@jax.jit
def step(params, state, tokens):
    def loss(params):
        logits = language_model.apply(params, tokens[:, :-1], config, mask=mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value


period = jax.random.randint(jax.random.key(1), (1, 16), 0, 64)
tokens = jnp.tile(period, o.length // 16 + 1)[:, : o.length + 1]  # a text with something to learn
used = step.lower(params, state, tokens).compile().memory_analysis()
if used is not None:
    print(f"temporary memory {used.temp_size_in_bytes / 2**20:.0f} MiB for {o.length:,} tokens")
for number in range(o.steps):
    params, state, value = step(params, state, tokens)
    print(f"step {number + 1}: {float(value):.3f} nats per token")

# One token after another, in a cache of the window alone: memory stays as it is, however long the text.
cache = language_model.init_cache((1,), o.window, config, rolling=True)
extend = jax.jit(lambda token, cache: language_model.extend(params, token, cache, config))
for place in range(2 * o.window):
    logits, cache = extend(tokens[:, place : place + 1], cache)
print(f"after {2 * o.window} tokens the next one is likeliest {logits[0, -1].argmax().item()}")
