"""Multi-head attention as pure functions: use it, train it, and measure what its heads do.

    config = mhajax.AttentionConfig(d_model=64, num_heads=8)
    params = mhajax.init_params(jax.random.key(0), config)
    y = mhajax.apply(params, x, config, mask=mhajax.masks.causal())

A map of the package:

    attention       project → attend → concatenate → combine: Config, Params, init_params, apply
    masks           which query may attend to which key: causal, window, segments, lengths, dense, your own; & | ~
    scores          what happens to a logit before the softmax: ALiBi, T5 and relative biases, soft cap, your own
    positions       rotary and its scalings, sinusoids: functions handed to attention or added to embeddings
    kernels         softmax(q kᵀ) v for given q, k, v: `attend`, and `explain`, which says how it is computed here
    attentions      `PerAttention`: gates, changes and captures by the names of a model's attentions
    interventions   what is changed in heads (ablations, patches, cut edges), and what of them is looked at
    cache           keys and values already seen
    variants        QK norm, gated output, sinks, differential, talking heads, sigmoid
    convert         parameters from and to Flax, Haiku, Equinox and torch
    drop_in         `jax.nn.dot_product_attention`, by our kernels
    norm, mlp, block, transformer, embedding, language_model, encoder, translator
                    the models, each with Config, Params, init_params, apply
    decoding        greedy, sampling and beam search
    pretrained      files of others, safetensors and GGUF, to arrays
    linen, nnx      Flax modules over the same functions
    losses, training  Optax training of any loss
    accumulation, weight_decay  what of it knows tokens and names of parameters
    checkpoints     saved states, each with its digest
    heads           what heads do, from arrays:
      importance, ablation, gates       what a loss loses without them, and which are enough
      patterns, roles, copying          where they look, and what they are for
      circuits, diversity, alignment    what their weights could do, how they differ, which words they align
      surgery                           heads cut out, moved, merged and grouped
      matching                          which head of one training is which of another
    statistics      intervals, paired tests, many hypotheses at once
    figures         pictures from arrays, for paper (needs matplotlib)
    view            heads to point at, in a notebook or a page
    report          what the heads of a model do, or of plain arrays: one page, and its numbers

`import mhajax` is light: what needs Flax, Optax or matplotlib is imported when it is first named, `mhajax.linen`.

Notation, everywhere: B batch, T queries, S keys, N query heads, K key/value heads, H width of a head, D model width,
V vocabulary, L layers. H is not "heads".
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhajax import (
    attention,
    attentions,
    block,
    cache,
    convert,
    decoding,
    drop_in,
    embedding,
    encoder,
    interventions,
    kernels,
    language_model,
    losses,
    masks,
    mlp,
    norm,
    positions,
    scores,
    transformer,
    translator,
    tree,
)
from mhajax.attention import Config as AttentionConfig
from mhajax.attention import Params as AttentionParams
from mhajax.attention import apply, apply_captured, init_params
from mhajax.attentions import PerAttention
from mhajax.version import __version__

if TYPE_CHECKING:  # the others are imported when they are named, below
    from mhajax import (
        accumulation,
        checkpoints,
        figures,
        heads,
        linen,
        nnx,
        pretrained,
        report,
        statistics,
        training,
        variants,
        view,
        weight_decay,
    )

__all__ = [
    "__version__",
    "AttentionConfig",
    "AttentionParams",
    "PerAttention",
    "accumulation",
    "apply",
    "apply_captured",
    "attention",
    "attentions",
    "block",
    "cache",
    "checkpoints",
    "convert",
    "decoding",
    "drop_in",
    "embedding",
    "encoder",
    "figures",
    "heads",
    "init_params",
    "interventions",
    "kernels",
    "language_model",
    "linen",
    "losses",
    "masks",
    "mlp",
    "nnx",
    "norm",
    "positions",
    "pretrained",
    "report",
    "scores",
    "statistics",
    "training",
    "transformer",
    "translator",
    "tree",
    "variants",
    "view",
    "weight_decay",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"mhajax.{name}")
    raise AttributeError(f"module 'mhajax' has no attribute {name!r}; dir(mhajax) names what it has.")


def __dir__() -> list[str]:
    return list(__all__)
