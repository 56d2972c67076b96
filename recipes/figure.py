"""A figure for a paper: what every head of a model looks at, and how sure that is; SVG, PDF, PNG and CSV.

python recipes/figure.py --to figures
"""

import argparse

import jax
import jax.numpy as jnp

from mhajax import figures, language_model, statistics
from mhajax.heads import roles

parser = argparse.ArgumentParser()
parser.add_argument("--to", default="figures")
o = parser.parse_args()

# A model of your own goes here, or of `pretrained.load`, or of a finished run: `experiments.load(RUN)`.
config = language_model.Config(vocab_size=40, d_model=32, num_heads=4, num_layers=2)
params = language_model.init_params(jax.random.key(0), config)
tokens = roles.repeated_tokens(jax.random.key(1), 40, sequences=8, length=8, repeats=2)

capture = jax.jit(language_model.apply_captured, static_argnames="config")
weights = capture(params, tokens, config)[1].attention["weights"]  # [L, B, N, T, T]
visible = jnp.tril(jnp.ones(weights.shape[-2:], bool))
found = statistics.estimate(roles.previous_token(weights, visible), axis=1)
table = figures.head_table(
    found.value,
    title="Attention to the previous token",
    label="share of the attention",
    interval=(found.low, found.high),
)
words = [str(token) for token in tokens[0].tolist()]
panels = figures.attention_patterns(weights[:, 0], words, words, title="The heads on one text")
for name, drawing in {"previous_token": table, "patterns": panels}.items():
    print(*figures.save(drawing, f"{o.to}/{name}"), sep="\n")
