"""GPT-2: learned positions, layer norms, one projection for queries, keys and values.

References:
  Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import numpy as np

from mhajax import language_model
from mhajax.pretrained.families.activations import PLAIN
from mhajax.pretrained.families.keys import Keys
from mhajax.pretrained.families.leaves import Layers, Leaf, as_shape, single
from mhajax.pretrained.source import Source

MODEL = language_model
TYPES = ("gpt2",)
IGNORED = ("*.attn.bias", "*.attn.masked_bias", "lm_head.weight")
CONSTANTS: dict[str, float] = {}


def read_config(source: Source, length: int | None = None) -> language_model.Config:
    """Our config of the model.

    Raises:
      UnreadableFile: for what a config.json asks that is not done here.
    """
    del length
    keys = Keys(source)
    keys.take("model_type")
    keys.must("scale_attn_weights", True)
    keys.must("scale_attn_by_inverse_layer_idx", False)
    keys.must("reorder_and_upcast_attn", False, True)  # logits are float32 in any case
    keys.take("n_ctx", None)
    d_model = keys.number("n_embd")
    config = language_model.Config(
        d_model=d_model,
        num_heads=keys.number("n_head"),
        head_dim=keys.number("head_dim", None),  # only of models whose heads were removed here
        num_layers=keys.number("n_layer"),
        d_ff=keys.number("n_inner", None) or 4 * d_model,
        vocab_size=keys.number("vocab_size"),
        use_bias=True,
        norm="layer",
        norm_epsilon=keys.real("layer_norm_epsilon", 1e-5),
        activation=keys.one_of("activation_function", PLAIN, "gelu_new"),
        positions="learned",
        max_positions=keys.number("n_positions"),
        scale_embedding=False,
        tied=keys.flag("tie_word_embeddings", True),
    )
    keys.done()
    return config


def leaves(source: Source, config: language_model.Config) -> list[Leaf]:
    """Where each tensor stands. Its matrices are [in, out]."""
    prefix = "transformer." if any(name.startswith("transformer.") for name in source.names) else ""
    d, n, h, f = config.d_model, config.num_heads, config.width, config.hidden
    assert config.vocab_size is not None and config.max_positions is not None
    table = (config.vocab_size, d)
    found = [
        single("embedding.tokens", f"{prefix}wte.weight", table),
        single("embedding.positions", f"{prefix}wpe.weight", (config.max_positions, d)),
        single("stack.norm.scale", f"{prefix}ln_f.weight", (d,)),
        single("stack.norm.shift", f"{prefix}ln_f.bias", (d,)),
    ]
    if not config.tied:
        found.append(single("output", "lm_head.weight", table))
    layers = Layers("stack.layers", f"{prefix}h.{{}}", range(config.num_layers))
    for index, letter in enumerate("qkv"):
        part = slice(index * n * h, (index + 1) * n * h)
        layers.add(
            f"attention.w_{letter}", "attn.c_attn.weight", (d, 3 * n * h),
            lambda w: w.reshape(d, n, h).swapaxes(0, 1), lambda w: w.swapaxes(0, 1).reshape(d, n * h),
            part=np.s_[:, part],
        )  # fmt: skip
        layers.add(f"attention.b_{letter}", "attn.c_attn.bias", (3 * n * h,), *as_shape((n, h)), part=part)
    layers.add(
        "attention.w_o", "attn.c_proj.weight", (n * h, d), *as_shape((n, h, d))[:1], lambda w: w.reshape(n * h, d)
    )
    layers.add("attention.b_o", "attn.c_proj.bias", (d,))
    layers.norm("attention_norm", "ln_1", d, shift=True)
    layers.norm("mlp_norm", "ln_2", d, shift=True)
    for leaf, bias, tensor, into, out in (("w_in", "b_in", "mlp.c_fc", d, f), ("w_out", "b_out", "mlp.c_proj", f, d)):
        layers.add(f"mlp.{leaf}", f"{tensor}.weight", (into, out))
        layers.add(f"mlp.{bias}", f"{tensor}.bias", (out,))
    return found + layers.leaves
