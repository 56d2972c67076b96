"""What a GGUF calls things, and what Hugging Face does: keys of the config, names of tensors, order of their rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mhajax.pretrained.gguf.container import Contents
from mhajax.pretrained.source import UnreadableFile


class Architecture(NamedTuple):
    """How a kind of model is written.

    Attributes:
      model: of "architectures" in config.json.
      permuted: rows of q and k are interleaved, see `half_split`.
      attention_bias: whether config.json says that q, k and v have a bias, which the names of the tensors tell.
    """

    model: str
    permuted: bool = False
    attention_bias: bool = True


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", permuted=True),  # Llama, Mistral, SmolLM
    "qwen2": Architecture("Qwen2ForCausalLM", attention_bias=False),  # they always have it
    "qwen3": Architecture("Qwen3ForCausalLM"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"  # Llama 3: what the wave length of every pair is multiplied by
_INTEGERS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id", "unknown": "unk_token_id"}
_READ = {
    *_INTEGERS, "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.freq_base", "attention.layer_norm_rms_epsilon", "vocab_size", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scale_linear", "rope.scaling.finetuned", "expert_count",
}  # fmt: skip


def config_of(contents: Contents) -> dict[str, Any]:
    """The config.json that a file's metadata amount to.

    Args:
      contents: of the file.

    Returns:
      The keys of `transformers`, those that its defaults would not give.

    Raises:
      UnreadableFile: the architecture is not read here, or a key is missing, is no number, or unknown: it could change
        what the model computes.
    """
    architecture = _architecture(contents)
    metadata = _Metadata(contents, architecture)
    unknown = [key for key in metadata.keys if key not in _READ]
    if unknown or metadata.number("expert_count", int, 0):
        raise UnreadableFile(
            f"{contents.path}: {architecture}.{unknown[0] if unknown else 'expert_count'} is not read here, and could "
            "change what the model computes."
        )
    config: dict[str, Any] = {"model_type": architecture, "architectures": [ARCHITECTURES[architecture].model]}
    config |= {name: metadata.number(key, int) for key, name in _INTEGERS.items()}
    heads, d_model = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = metadata.number("attention.head_count_kv", int, heads)
    rotated = metadata.number("rope.dimension_count", int, d_model // heads)
    width = metadata.number("attention.key_length", int, rotated)
    value_width = metadata.number("attention.value_length", int, width)
    if not width == value_width == rotated or heads % config["num_key_value_heads"]:
        raise UnreadableFile(
            f"{contents.path}: heads must be rotated as a whole, as wide in values as in keys, and shared evenly; got "
            f"key_length {width}, value_length {value_width}, rope.dimension_count {rotated}, {heads} heads and "
            f"{config['num_key_value_heads']} key heads."
        )
    config["head_dim"] = width
    config["rms_norm_eps"] = metadata.number("attention.layer_norm_rms_epsilon", float)
    config["rope_theta"] = metadata.number("rope.freq_base", float, 10_000.0)
    if scaling := _scaling(metadata, config):
        config["rope_scaling"] = scaling
    names = contents.tensors
    tokens = contents.metadata.get("tokenizer.ggml.tokens")
    rows = names["token_embd.weight"].shape[0] if "token_embd.weight" in names else None
    config["vocab_size"] = metadata.number("vocab_size", int, rows or len(tokens or ()))
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = "output.weight" not in names
    if ARCHITECTURES[architecture].attention_bias:
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    for key, name in _IDS.items():
        if (token := contents.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if not isinstance(token, int) or not 0 <= token < config["vocab_size"]:
                raise UnreadableFile(
                    f"{contents.path}: tokenizer.ggml.{key}_token_id must be one of {config['vocab_size']} tokens, got "
                    f"{token!r:.60}."
                )
            config[name] = token
    return config


def tensor_names(contents: Contents) -> dict[str, str]:
    """The file's names by those of Hugging Face, in the order of the file.

    Raises:
      UnreadableFile: a tensor has a name that no part of these models has.
    """
    return {_hugging_face(contents, name): name for name in contents.tensors if name != FREQUENCIES}


def _hugging_face(contents: Contents, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    if match:
        layer, part, kind = match.groups()
        if layer is None and part in _TOP:
            return f"{_TOP[part]}.{kind}"
        if layer is not None and part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    raise UnreadableFile(
        f"{contents.path}: {name} is a tensor that {' and '.join(ARCHITECTURES)} models do not have, as they are read "
        "here; without it their answers would be others."
    )


def rows_order(contents: Contents, config: dict[str, Any], name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """What the rows of a tensor of the file need to be in Hugging Face's order; None: nothing.

    Args:
      contents: of the file.
      config: as `config_of` gives it.
      name: as the file calls it.

    Raises:
      UnreadableFile: the rows are not those of the heads of the config.
    """
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k") or not ARCHITECTURES[config["model_type"]].permuted:
        return None
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    rows = contents.tensors[name].shape[0]
    if rows != heads * config["head_dim"] or config["head_dim"] % 2:
        raise UnreadableFile(
            f"{contents.path}: {name} must have {heads} heads × {config['head_dim']} rows, an even number each, got "
            f"{rows}."
        )
    return lambda array: half_split(array, heads)


def half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as rotation by halves wants them, of rows as rotation of neighbours does.

    llama.cpp's Llama rotates rows 2i and 2i + 1 of a head together, `transformers` rows i and i + H/2. Both are the
    same model with its rows in another order; the wrong order gives finite logits and nonsense.

    Args:
      array: [heads · H, ...], the file's.
      heads: N for queries, K for keys.

    Returns:
      [heads · H, ...].

    >>> half_split(np.arange(8), 2)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    rows = array.reshape(heads, -1, 2, *array.shape[1:])  # [heads, H/2, 2, ...]
    return rows.swapaxes(1, 2).reshape(array.shape)


class _Metadata:
    """The numbers under an architecture's name."""

    def __init__(self, contents: Contents, prefix: str):
        self.contents, self.prefix = contents, prefix
        start = prefix + "."
        self.keys = [key.removeprefix(start) for key in contents.metadata if key.startswith(start)]

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.contents.metadata.get(f"{self.prefix}.{key}", default)
        what = f"{self.contents.path}: {self.prefix}.{key}"
        if value is None:
            raise UnreadableFile(f"{what} is missing in the metadata; the file is not whole.")
        if kind is float and isinstance(value, float):
            if not 0 < value < float("inf"):
                raise UnreadableFile(f"{what} must be above 0 and finite, got {value}.")
            return float(str(np.float32(value)))  # 1e-05, which float32 made 9.999999747378752e-06
        least = 0 if default == 0 else 1
        if kind is not int or not isinstance(value, int) or isinstance(value, bool) or value < least:
            expected = "number" if kind is float else f"integer of at least {least}"
            raise UnreadableFile(f"{what} must be one {expected}, got {value!r:.60}.")
        return value


def _architecture(contents: Contents) -> str:
    name = contents.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnreadableFile(
            f"{contents.path}: general.architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r:.60}; other "
            "models are not read from GGUF here."
        )
    return name


def _scaling(metadata: _Metadata, config: dict[str, Any]) -> dict[str, Any] | None:
    """The rope_scaling of `transformers`.

    A file of Llama 3 has the factors of the frequencies and not what they were computed from; "longrope" takes factors.
    """
    contents = metadata.contents
    kind = contents.metadata.get(f"{metadata.prefix}.rope.scaling.type")
    if FREQUENCIES in contents.tensors:
        shape, expected = contents.tensors[FREQUENCIES].shape, (config["head_dim"] // 2,)
        if kind not in (None, "none") or shape != expected or contents.tensors[FREQUENCIES].kind != "F32":
            raise UnreadableFile(
                f"{contents.path}: {FREQUENCIES} must be {expected} in F32, without rope.scaling.type, got {shape} in "
                f"{contents.tensors[FREQUENCIES].kind} and {kind!r:.60}."
            )
        factors = contents.read(FREQUENCIES)
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise UnreadableFile(f"{contents.path}: {FREQUENCIES} must be above 0 and finite; the file is damaged.")
        length = config["max_position_embeddings"]
        same = {"short_factor": factors.tolist(), "long_factor": factors.tolist()}
        alike = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": length}
        return {"rope_type": "longrope"} | same | alike
    if kind is None and "rope.scale_linear" in metadata.keys:
        kind, key = "linear", "rope.scale_linear"
    else:
        key = "rope.scaling.factor"
    if kind is None or kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnreadableFile(
            f"{contents.path}: {metadata.prefix}.rope.scaling.type must be none, linear or yarn, got {kind!r:.60}."
        )
    scaling = {"rope_type": kind, "factor": metadata.number(key, float)}
    if kind == "yarn":
        length = metadata.number("rope.scaling.original_context_length", int)
        scaling["original_max_position_embeddings"] = length
    return scaling
