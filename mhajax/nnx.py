"""Flax NNX modules: thin adapters over the functions, with the same numbers.

The parameters are attributes with the names of the functions' NamedTuples, so that the heads stay a visible axis:
`layer.w_q` is an `nnx.Param` [N, D, H], and `model.stack.layers.attention.w_q` one of [L, N, D, H].
`functional(module)` turns them into the NamedTuples that every function of this library takes (to see the weights of
the heads: `attention.apply_captured(functional(layer), x, layer.config)`); `nnx.update(module, tree.to_dict(params))`
puts such a NamedTuple back.

`attention_fn` is for the layer that Flax has itself.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, Unpack

from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array

from mhajax import arguments, attention, drop_in, language_model, translator
from mhajax.options import LayerOptions


class _Parameters(nnx.Module):
    """The arrays of a NamedTuple as `nnx.Param`s of the same names, nested as they are; None stays None."""

    def __init__(self, params: Any):
        self.named_tuple = type(params)
        for name, value in params._asdict().items():
            if value is not None:
                value = _Parameters(value) if hasattr(value, "_asdict") else nnx.Param(value)
            setattr(self, name, value)


class _Adapter(_Parameters):
    """Parameters, and what the functions need besides them."""

    functions: ClassVar[ModuleType]

    def __init__(self, config: Any, *, dropout_rate: float | None = None, deterministic: bool, rngs: nnx.Rngs):
        who = f"nnx.{type(self).__name__}"
        arguments.instance(who, "config", config, self.functions.Config, f"{self.functions.__name__[7:]}.Config(…)")
        arguments.instance(who, "rngs", rngs, nnx.Rngs, "nnx.Rngs(0)")
        super().__init__(self.functions.init_params(rngs.params(), config))
        self.config = config
        self.deterministic = deterministic
        if dropout_rate is None:  # a model, whose config says it
            dropout_rate = config.dropout or config.attention_dropout
        self.rngs = rngs.dropout.fork() if dropout_rate else None

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view`.

        Args:
          deterministic: True is evaluation, without dropout.
        """
        self.deterministic = self.deterministic if deterministic is None else deterministic

    def _dropout(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> dict[str, Any]:
        if self.rngs is None or (self.deterministic if deterministic is None else deterministic):
            return {}
        return {"dropout_key": self.rngs() if rngs is None else rngs.dropout()}


class MultiHeadAttention(_Adapter):
    """`attention.apply` as a layer, to be used inside any NNX model.

    Args:
      config: the shape.
      dropout_rate: share of the attention weights that is dropped unless `deterministic`.
      deterministic: True is evaluation, without dropout; `train()` and `eval()` set it, and a call may override it.
      rngs: takes the stream "params" and, if anything is dropped, "dropout"; a call may bring other `rngs`.

    >>> import jax.numpy as jnp
    >>> layer = MultiHeadAttention(attention.Config(d_model=16, num_heads=4), rngs=nnx.Rngs(0))
    >>> layer.w_q.shape
    (4, 16, 4)
    >>> layer(jnp.ones((2, 5, 16))).shape
    (2, 5, 16)
    """

    functions = attention
    w_q: nnx.Param  # [N, D, H]
    w_k: nnx.Param  # [K, D, H]
    w_v: nnx.Param  # [K, D, Hv]
    w_o: nnx.Param  # [N, Hv, D]

    def __init__(
        self, config: attention.Config, *, dropout_rate: float = 0.0, deterministic: bool = False, rngs: nnx.Rngs
    ):
        super().__init__(config, dropout_rate=dropout_rate, deterministic=deterministic, rngs=rngs)
        self.dropout_rate = dropout_rate

    @arguments.shown
    def __call__(
        self, x: Array, memory: Array | None = None, *,
        deterministic: bool | None = None, rngs: nnx.Rngs | None = None, **options: Unpack[LayerOptions],
    ) -> Array:  # fmt: skip
        """x [..., T, D] attends to itself or to memory [..., S, D]; the options are those of `attention.apply`."""
        dropout = self._dropout(deterministic, rngs)
        if dropout:
            dropout["dropout_rate"] = self.dropout_rate
        return attention.apply(functional(self), x, self.config, memory=memory, **dropout, **options)


class LanguageModel(_Adapter):
    """`language_model` as a module; `config.dropout` and `config.attention_dropout` apply unless `deterministic`.

    Args:
      config, deterministic, rngs: as in `MultiHeadAttention`.

    >>> import jax.numpy as jnp
    >>> config = language_model.Config(d_model=16, num_heads=4, num_layers=2, vocab_size=11)
    >>> model = LanguageModel(config, rngs=nnx.Rngs(0))
    >>> model.stack.layers.attention.w_q.shape  # [L, N, D, H]
    (2, 4, 16, 4)
    >>> model(jnp.ones((3, 5), int)).shape
    (3, 5, 11)
    """

    functions = language_model
    embedding: Any  # embedding.tokens is an nnx.Param [V, D]
    stack: Any  # every leaf of stack.layers is [L, ...]

    def __init__(self, config: language_model.Config, *, deterministic: bool = False, rngs: nnx.Rngs):
        super().__init__(config, deterministic=deterministic, rngs=rngs)

    @arguments.shown
    def __call__(
        self,
        tokens: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[language_model.Options],
    ) -> Array:
        """Logits [..., T, V] of tokens [..., T]; the options are those of `language_model.apply`."""
        dropout = self._dropout(deterministic, rngs)
        return language_model.apply(functional(self), tokens, self.config, **dropout, **options)

    @arguments.shown
    def features(
        self,
        tokens: Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[language_model.Options],
    ) -> Array:
        """What the logits are computed from, [..., T, D]."""
        dropout = self._dropout(deterministic, rngs)
        return language_model.features(functional(self), tokens, self.config, **dropout, **options)


class Translator(_Adapter):
    """`translator` as a module; `config.dropout` and `config.attention_dropout` apply unless `deterministic`.

    Args:
      config, deterministic, rngs: as in `MultiHeadAttention`.

    >>> import jax.numpy as jnp
    >>> config = translator.Config(d_model=16, num_heads=4, encoder_layers=2, decoder_layers=1, vocab_size=11)
    >>> model = Translator(config, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((3, 7), int), jnp.ones((3, 5), int)).shape
    (3, 5, 11)
    """

    functions = translator
    embedding: Any  # embedding.tokens is an nnx.Param [V, D]
    encoder: Any  # every leaf of encoder.layers is [L, ...]
    decoder: Any

    def __init__(self, config: translator.Config, *, deterministic: bool = False, rngs: nnx.Rngs):
        super().__init__(config, deterministic=deterministic, rngs=rngs)

    @arguments.shown
    def __call__(
        self, source: Array, target: Array, *,
        deterministic: bool | None = None, rngs: nnx.Rngs | None = None, **options: Unpack[translator.Options],
    ) -> Array:  # fmt: skip
        """Logits [..., T, V] of sources [..., S], targets [..., T]; the options are those of `translator.apply`."""
        dropout = self._dropout(deterministic, rngs)
        return translator.apply(functional(self), source, target, self.config, **dropout, **options)

    @arguments.shown
    def features(
        self, source: Array, target: Array, *,
        deterministic: bool | None = None, rngs: nnx.Rngs | None = None, **options: Unpack[translator.Options],
    ) -> Array:  # fmt: skip
        """What the logits are computed from, [..., T, D]."""
        dropout = self._dropout(deterministic, rngs)
        return translator.features(functional(self), source, target, self.config, **dropout, **options)


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable = dtypes.promote_dtype,
    is_causal: bool = False,
) -> Array:
    """`flax.nnx.dot_product_attention`, computed by our kernels: an `attention_fn` for NNX's own layer.

    The layer stays the same (parameters, cache, options), and its memory grows with T, not with T × S, as long as
    nobody asks for the weights and its mask is not written out. What else differs: `mhajax.drop_in`.

    Args:
      query: [..., T, N, H].
      key: [..., S, K, H]; K may be less than N.
      value: [..., S, K, Hv].
      bias: broadcasts to [..., N, T, S].
      mask: broadcasts to [..., N, T, S]; booleans, or numbers of which 0 masks, as Flax makes them.
      broadcast_dropout: not followed, although True is Flax's default: every weight of every example and head draws
        for itself.
      dropout_rng: PRNG key of the dropout.
      dropout_rate: share of the weights that is dropped unless `deterministic`.
      deterministic: no dropout.
      dtype: of the computation; what query, key and value promote to if None. Logits are at least float32.
      precision: of the products; other than None and DEFAULT it takes the dense path, except on a CPU, where
        there is only one.
      module: where the weights are sown, as an `nnx.Intermediate`, "attention_weights"; they hold T × S numbers.
      promote_dtype: function (arrays, dtype=) → arrays of one dtype.
      is_causal: a query sees keys of its own index and before; no T × S booleans. Refused for one query of several keys
        (a layer of an older Flax in decode mode, whose fault it is): that query would see key 0 only. The layer masks
        what is not yet there itself, so leave it out there.

    Returns:
      [..., T, N, Hv].

    Raises:
      ValueError: for sizes that do not belong together, a mask or bias that could be read in two ways, and dropout
        without a key.

    >>> import jax.numpy as jnp
    >>> shape = {"num_heads": 8, "in_features": 16, "decode": False}
    >>> layer = nnx.MultiHeadAttention(**shape, attention_fn=attention_fn, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 16))).shape
    (2, 5, 16)
    """
    del broadcast_dropout
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    out, weights = drop_in.of_flax(
        "nnx.attention_fn", query, key, value, bias, mask,
        is_causal=is_causal, dropout_key=dropout_rng, dropout_rate=0.0 if deterministic else dropout_rate,
        precision=precision, weights=module is not None,
    )  # fmt: skip
    if module is not None:
        module.sow(nnx.Intermediate, "attention_weights", weights.astype(query.dtype))
    return out


def functional(module: Any) -> Any:
    """The parameters in a module, or in a part of one, as the NamedTuples of the functions.

    >>> layer = MultiHeadAttention(attention.Config(d_model=16, num_heads=4), rngs=nnx.Rngs(0))
    >>> functional(layer).w_q.shape
    (4, 16, 4)
    """
    if isinstance(module, _Parameters):
        return module.named_tuple(*(functional(getattr(module, name)) for name in module.named_tuple._fields))
    return module[...] if isinstance(module, nnx.Variable) else module
