"""Llama and its relatives: Mistral, Qwen2, SmolLM. Grouped key heads, rotary positions, RMS norms, SwiGLU.

References:
  Touvron et al. 2023, "LLaMA"; Jiang et al. 2023, "Mistral 7B"; Yang et al. 2024, "Qwen2 Technical Report".
"""

from __future__ import annotations

from mhajax import language_model
from mhajax.pretrained.families import rotary
from mhajax.pretrained.families.activations import GATED
from mhajax.pretrained.families.keys import Keys
from mhajax.pretrained.families.leaves import Layers, Leaf, single
from mhajax.pretrained.source import Source

MODEL = language_model
TYPES = ("llama", "mistral", "qwen2")
_WINDOWS, _WHOLE_LAYERS = {"mistral": 4096, "qwen2": 4096}, 28  # what they are where a config.json does not say
IGNORED = ("*rotary_emb.inv_freq", "lm_head.weight")
CONSTANTS = {"stack.layers.attention.b_o": 0.0}  # of Qwen2, which has no bias there


def read_config(source: Source, length: int | None = None) -> language_model.Config:
    """Our config of the model; `length` as in `rotary.read`.

    Raises:
      UnreadableFile: for what a config.json asks that is not done here.
    """
    keys = Keys(source)
    kind = keys.take("model_type")
    d_model, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    head_dim = keys.number("head_dim", None) or d_model // heads
    longest = keys.number("max_position_embeddings", 2048)
    bias = kind == "qwen2" or keys.flag("attention_bias", False)
    window = keys.take("sliding_window", _WINDOWS.get(kind))
    whole = keys.take("max_window_layers", _WHOLE_LAYERS)  # of Qwen2: the layers before have no window
    if kind == "qwen2" and not keys.flag("use_sliding_window", False):
        window = None
    elif kind == "qwen2" and whole != 0:
        raise keys.refused("max_window_layers", whole, [0])
    kinds = keys.take("layer_types", None)
    wanted = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and set(kinds) != {wanted}:
        raise keys.refused("layer_types", kinds, [f"{wanted} in every layer"])
    config = language_model.Config(
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=keys.number("num_key_value_heads", None) or heads,
        head_dim=head_dim,
        num_layers=keys.number("num_hidden_layers"),
        d_ff=keys.number("intermediate_size"),
        vocab_size=keys.number("vocab_size"),
        use_bias=bias,
        norm="rms",
        norm_epsilon=keys.real("rms_norm_eps", 1e-6),
        activation=keys.one_of("hidden_act", GATED, "silu"),
        mlp_bias=keys.flag("mlp_bias", False),
        scale_embedding=False,
        tied=keys.flag("tie_word_embeddings", False),
        window=None if window is None else int(window) - 1,
        **rotary.read(keys, head_dim, longest, length),
    )
    keys.done()
    return config


def leaves(source: Source, config: language_model.Config) -> list[Leaf]:
    """Where each tensor stands."""
    d, n, k, h = config.d_model, config.num_heads, config.kv_heads, config.width
    assert config.vocab_size is not None
    table = (config.vocab_size, d)
    found = [
        single("embedding.tokens", "model.embed_tokens.weight", table),
        single("stack.norm.scale", "model.norm.weight", (d,)),
    ]
    if not config.tied:
        found.append(single("output", "lm_head.weight", table))
    layers = Layers("stack.layers", "model.layers.{}", range(config.num_layers))
    for letter, count in (("q", n), ("k", k), ("v", k)):
        layers.heads(f"attention.{letter}", f"self_attn.{letter}_proj", count, h, d, bias=config.use_bias)
    has_output_bias = config.use_bias and source.config["model_type"] != "qwen2"
    layers.output("attention", "self_attn.o_proj", n, h, d, bias=has_output_bias)
    layers.norm("attention_norm", "input_layernorm", d, shift=False)
    layers.norm("mlp_norm", "post_attention_layernorm", d, shift=False)
    bias = config.mlp_bias
    layers.matrix("mlp.w_in", "mlp.b_in" if bias else None, "mlp.gate_proj", d, config.hidden)
    layers.matrix("mlp.w_gate", "mlp.b_gate" if bias else None, "mlp.up_proj", d, config.hidden)
    layers.matrix("mlp.w_out", "mlp.b_out" if bias else None, "mlp.down_proj", config.hidden, d)
    return found + layers.leaves
