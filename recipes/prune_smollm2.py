"""Heads of SmolLM2 removed in the order of Michel's importance, against as many at random of the same layers.

python -m experiments fetch smollm2
python recipes/prune_smollm2.py book.txt --windows 16 --remove 60
python recipes/prune_smollm2.py                 # two short windows of a text of its own
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.pretrained_files import locate
from experiments.errors import DataError
from mhajax import PerAttention, pretrained
from mhajax.heads import importance

parser = argparse.ArgumentParser()
parser.add_argument("text", nargs="?")
for name, default in {"windows": 2, "length": 12, "remove": 20, "draws": 2}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
o = parser.parse_args()
try:
    path = locate("smollm2")
except DataError as error:
    print(f"skipped: {error}")
    sys.exit()

params, config, tokenizer, model, _ = pretrained.load(path)
text = (
    Path(o.text).read_text(encoding="utf-8") if o.text else "The river bank was steep, and the bank lent money. " * 40
)
ids = np.asarray(tokenizer.encode(text).ids)
if len(ids) < 2 * o.windows * o.length:
    sys.exit(f"the text has {len(ids)} tokens, and {2 * o.windows * o.length} are asked for; give a longer one.")
choose, judge = jnp.asarray(ids[: 2 * o.windows * o.length].reshape(2, o.windows, o.length))


def loss(params, gates, tokens):  # nats of every window, [B]
    logits = model.apply(params, tokens[:, :-1], config, gates=PerAttention(attention=gates))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).sum(-1)


ones = jnp.ones((config.num_layers, config.num_heads))
michel = jax.jit(lambda params, gates: importance.michel(lambda gates: loss(params, gates, choose), gates))
measured = michel(params, ones)
order = np.asarray(importance.ranking(measured))[: o.remove]  # the least important of one half of the windows
kept = np.ones(ones.shape, np.float32)
kept.flat[order] = 0
random = np.random.default_rng(0)
judged = jax.jit(lambda params, gates: loss(params, gates, judge).mean() / (o.length - 1))  # by the other half
print(f"all heads: {judged(params, ones):.3f} nats per token")
print(f"without the {o.remove} least important: {judged(params, kept):.3f}")
for _ in range(o.draws):
    other = random.permuted(kept, axis=1)  # as many of every layer
    print(f"without {o.remove} of the same layers at random: {judged(params, other):.3f}")
