"""BERT, RoBERTa, DistilBERT and ALBERT: encoders whose layers are normalised after each part.

References:
  Devlin et al. 2019, "BERT"; Liu et al. 2019, "RoBERTa"; Sanh et al. 2019, "DistilBERT"; Lan et al. 2020, "ALBERT".
"""

from __future__ import annotations

from typing import NamedTuple

from mhajax import encoder
from mhajax.pretrained.families.activations import PLAIN
from mhajax.pretrained.families.keys import Keys
from mhajax.pretrained.families.leaves import Layers, Leaf, single, transposed
from mhajax.pretrained.source import Source, UnreadableFile

MODEL = encoder
TYPES = ("bert", "roberta", "distilbert", "albert")
IGNORED = (
    "*position_ids", "*token_type_ids", "cls.seq_relationship.*", "sop_classifier.*", "*predictions.decoder.*",
    "*lm_head.decoder.*", "*predictions.bias", "vocab_projector.weight", "classifier.*", "qa_outputs.*",
    "pre_classifier.*",
)  # fmt: skip
CONSTANTS: dict[str, float] = {}


class _Names(NamedTuple):
    """Of the parts in the file."""

    layer: str
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    widen: str
    narrow: str
    mlp_norm: str


_BERT = _Names(
    "encoder.layer.{}", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
_DISTILBERT = _Names(
    "transformer.layer.{}", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
    "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip
_ALBERT = _Names(
    "encoder.albert_layer_groups.0.albert_layers.{}", "attention.query", "attention.key", "attention.value",
    "attention.dense", "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm",
)  # fmt: skip
_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
# Head: the linear map, its normalisation, the bias of the logits.
_HEADS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    "albert": ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
}


def read_config(source: Source, length: int | None = None) -> encoder.Config:
    """Our config of the model.

    Raises:
      UnreadableFile: for what a config.json asks that is not done here.
    """
    del length
    keys = Keys(source)
    kind = keys.take("model_type")
    distilled = kind == "distilbert"
    sizes = ("dim", "n_heads", "n_layers", "hidden_dim") if distilled else _SIZES
    d_model, heads, layers, width = (keys.number(name) for name in sizes)
    usual = "gelu_new" if kind == "albert" else "gelu"
    head_dim = keys.number("head_dim", None)  # only of models whose heads were removed here
    positions = keys.number("max_position_embeddings")
    if kind == "roberta":
        positions -= _offset(source)
    keys.must("position_embedding_type", "absolute")
    keys.must("tie_word_embeddings", True)
    if distilled:
        keys.must("sinusoidal_pos_embds", False, True)  # they are stored, whichever they are
        keys.must("tie_weights_", True)
        for name in ("qa_dropout", "seq_classif_dropout", "dropout"):
            keys.take(name, None)
    if kind == "albert":
        for name in ("num_hidden_groups", "inner_group_num", "down_scale_factor"):
            keys.must(name, 1)
        for name in ("net_structure_type", "gap_size", "num_memory_blocks"):
            keys.must(name, 0)
    config = encoder.Config(
        d_model=d_model,
        num_heads=heads,
        head_dim=head_dim,
        num_layers=layers,
        d_ff=width,
        vocab_size=keys.number("vocab_size"),
        use_bias=True,
        placement="post",
        norm="layer",
        norm_epsilon=keys.real("layer_norm_eps", 1e-12),
        final_norm=False,
        activation=keys.one_of("activation", PLAIN, "gelu") if distilled else keys.one_of("hidden_act", PLAIN, usual),
        positions="learned",
        max_positions=positions,
        token_types=None if distilled else keys.number("type_vocab_size", 2),
        embedding_norm=True,
        embedding_width=keys.number("embedding_size") if kind == "albert" else None,
        scale_embedding=False,
        head=_HEADS[kind][0] + ".weight" in source.names,
        pooled=_pooler(source) is not None,
    )
    keys.done()
    return config


def leaves(source: Source, config: encoder.Config) -> list[Leaf]:
    """Where each tensor stands."""
    kind = source.config["model_type"]
    names = {"distilbert": _DISTILBERT, "albert": _ALBERT}.get(kind, _BERT)
    prefix, d, e = _prefix(source, kind), config.d_model, config.token_width
    assert config.vocab_size is not None and config.max_positions is not None
    table = f"{prefix}embeddings"
    offset = _offset(source) if kind == "roberta" else 0
    found = [
        single("embedding.tokens", f"{table}.word_embeddings.weight", (config.vocab_size, e)),
        single("embedding.norm.scale", f"{table}.LayerNorm.weight", (e,)),
        single("embedding.norm.shift", f"{table}.LayerNorm.bias", (e,)),
    ]
    positions = Leaf(
        "embedding.positions", (f"{table}.position_embeddings.weight",), (config.max_positions + offset, e),
        lambda w: w, lambda w: w, stacked=False, part=slice(offset, None) if offset else None,
    )  # fmt: skip
    found.append(positions)
    if config.token_types is not None:
        found.append(single("embedding.types", f"{table}.token_type_embeddings.weight", (config.token_types, e)))
    if kind == "albert":
        into = f"{prefix}encoder.embedding_hidden_mapping_in"
        found.append(single("embedding.projection", f"{into}.weight", (d, e), transposed, transposed))
        found.append(single("embedding.projection_bias", f"{into}.bias", (d,)))
    numbers = [0] * config.num_layers if kind == "albert" else range(config.num_layers)
    layers, n, h = Layers("stack.layers", prefix + names.layer, numbers), config.num_heads, config.width
    for letter, name in (("q", names.query), ("k", names.key), ("v", names.value)):
        layers.heads(f"attention.{letter}", name, n, h, d, bias=True)
    layers.output("attention", names.out, n, h, d, bias=True)
    layers.norm("attention_norm", names.attention_norm, d, shift=True)
    layers.matrix("mlp.w_in", "mlp.b_in", names.widen, d, config.hidden)
    layers.matrix("mlp.w_out", "mlp.b_out", names.narrow, config.hidden, d)
    layers.norm("mlp_norm", names.mlp_norm, d, shift=True)
    found += layers.leaves
    if config.head:
        dense, scaled, bias = _HEADS[kind]
        found += [
            single("head.w", f"{dense}.weight", (e, d), transposed, transposed),
            single("head.b", f"{dense}.bias", (e,)),
            single("head.norm.scale", f"{scaled}.weight", (e,)),
            single("head.norm.shift", f"{scaled}.bias", (e,)),
            single("head.output_bias", bias, (config.vocab_size,)),
        ]
    pooler = _pooler(source)
    if pooler is not None:
        found.append(single("pooler.w", f"{pooler}.weight", (d, d), transposed, transposed))
        found.append(single("pooler.b", f"{pooler}.bias", (d,)))
    return found


def _prefix(source: Source, kind: str) -> str:
    """What stands before the names of the parts: files of a bare model have nothing."""
    return f"{kind}." if any(name.startswith(f"{kind}.") for name in source.names) else ""


def _pooler(source: Source) -> str | None:
    """The name of the linear map of the pooled vector, if the file has it."""
    kind = source.config["model_type"]
    name = f"{_prefix(source, kind)}pooler" + ("" if kind == "albert" else ".dense")
    return name if f"{name}.weight" in source.names else None


def _offset(source: Source) -> int:
    """Rows of RoBERTa's positions that no real token has: those up to that of padding."""
    padding = source.config.get("pad_token_id", 1)
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise UnreadableFile(f"{source.path}: config.json must say pad_token_id as a number, got {padding!r}.")
    return padding + 1
