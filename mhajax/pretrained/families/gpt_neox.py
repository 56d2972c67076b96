"""GPT-NeoX and Pythia: attention and feed-forward network beside each other, rotary positions of some channels.

References:
  Black et al. 2022, "GPT-NeoX-20B"; Biderman et al. 2023, "Pythia".
"""

from __future__ import annotations

import numpy as np

from mhajax import language_model
from mhajax.pretrained.families import rotary
from mhajax.pretrained.families.activations import PLAIN
from mhajax.pretrained.families.keys import Keys
from mhajax.pretrained.families.leaves import Layers, Leaf, single
from mhajax.pretrained.source import Source

MODEL = language_model
TYPES = ("gpt_neox",)
IGNORED = ("*.attention.bias", "*.attention.masked_bias", "*.attention.rotary_emb.inv_freq", "embed_out.weight")
CONSTANTS: dict[str, float] = {}


def read_config(source: Source, length: int | None = None) -> language_model.Config:
    """Our config of the model; `length` as in `rotary.read`.

    Raises:
      UnreadableFile: for what a config.json asks that is not done here.
    """
    keys = Keys(source)
    keys.take("model_type")
    keys.must("attention_bias", True)
    d_model, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    head_dim = keys.number("head_dim", None) or d_model // heads  # given if heads were removed here
    parallel = keys.flag("use_parallel_residual", True)
    fraction = keys.real("rotary_pct", 0.25)
    config = language_model.Config(
        d_model=d_model,
        num_heads=heads,
        head_dim=head_dim,
        num_layers=keys.number("num_hidden_layers"),
        d_ff=keys.number("intermediate_size"),
        vocab_size=keys.number("vocab_size"),
        use_bias=True,
        placement="parallel" if parallel else "pre",
        norm="layer",
        norm_epsilon=keys.real("layer_norm_eps", 1e-5),
        activation=keys.one_of("hidden_act", PLAIN, "gelu"),
        scale_embedding=False,
        tied=keys.flag("tie_word_embeddings", False),
        **rotary.read(keys, head_dim, keys.number("max_position_embeddings", 2048), length, fraction),
    )
    keys.done()
    return config


def leaves(source: Source, config: language_model.Config) -> list[Leaf]:
    """Where each tensor stands; queries, keys and values of a head are neighbours, [N, 3, H, D]."""
    del source
    d, n, h = config.d_model, config.num_heads, config.width
    assert config.vocab_size is not None
    table = (config.vocab_size, d)
    found = [
        single("embedding.tokens", "gpt_neox.embed_in.weight", table),
        single("stack.norm.scale", "gpt_neox.final_layer_norm.weight", (d,)),
        single("stack.norm.shift", "gpt_neox.final_layer_norm.bias", (d,)),
    ]
    if not config.tied:
        found.append(single("output", "embed_out.weight", table))
    layers = Layers("stack.layers", "gpt_neox.layers.{}", range(config.num_layers))
    for index, letter in enumerate("qkv"):
        rows = np.arange(3 * n * h).reshape(n, 3, h)[:, index].ravel()
        layers.add(
            f"attention.w_{letter}", "attention.query_key_value.weight", (3 * n * h, d),
            lambda w: w.reshape(n, h, d).swapaxes(1, 2), lambda w: w.swapaxes(1, 2).reshape(n * h, d), part=rows,
        )  # fmt: skip
        layers.add(
            f"attention.b_{letter}", "attention.query_key_value.bias", (3 * n * h,),
            lambda b: b.reshape(n, h), lambda b: b.reshape(n * h), part=rows,
        )  # fmt: skip
    layers.output("attention", "attention.dense", n, h, d, bias=True)
    layers.norm("attention_norm", "input_layernorm", d, shift=True)
    layers.norm("mlp_norm", "post_attention_layernorm", d, shift=True)
    layers.matrix("mlp.w_in", "mlp.b_in", "mlp.dense_h_to_4h", d, config.hidden)
    layers.matrix("mlp.w_out", "mlp.b_out", "mlp.dense_4h_to_h", config.hidden, d)
    return found + layers.leaves
