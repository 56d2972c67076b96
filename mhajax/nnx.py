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
from typing import TYPE_CHECKING, Any, Unpack

from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array

from mhajax import arguments, attention, drop_in
from mhajax.block import ModelOptions
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

    def __init__(self, params: Any, config: Any, *, dropout_rate: float, deterministic: bool, rngs: nnx.Rngs):
        super().__init__(params)
        self.config = config
        self.deterministic = deterministic
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

    w_q: nnx.Param  # [N, D, H]
    w_k: nnx.Param  # [K, D, H]
    w_v: nnx.Param  # [K, D, Hv]
    w_o: nnx.Param  # [N, Hv, D]

    def __init__(
        self, config: attention.Config, *, dropout_rate: float = 0.0, deterministic: bool = False, rngs: nnx.Rngs
    ):
        who = "nnx.MultiHeadAttention"
        arguments.instance(who, "config", config, attention.Config, "attention.Config(…)")
        params = attention.init_params(_key(who, rngs), config)
        super().__init__(params, config, dropout_rate=dropout_rate, deterministic=deterministic, rngs=rngs)
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


class Model(_Adapter):
    """A whole model as a module: `language_model`, `encoder`, `translator`, or one of your own.

    It runs the functions beside the config's class, `init_params(key, config)`, `apply(params, *inputs, config,
    **options)` and `features(…)`; what they take and return, those say.

    Args:
      config: of the model, such as `language_model.Config(…)`; its `dropout` and `attention_dropout` apply unless
        `deterministic`.
      deterministic, rngs: as in `MultiHeadAttention`.

    >>> import jax.numpy as jnp
    >>> from mhajax import language_model
    >>> config = language_model.Config(d_model=16, num_heads=4, num_layers=2, vocab_size=11)
    >>> model = Model(config, rngs=nnx.Rngs(0))
    >>> model.stack.layers.attention.w_q.shape  # [L, N, D, H]
    (2, 4, 16, 4)
    >>> model(jnp.ones((3, 5), int)).shape
    (3, 5, 11)
    """

    def __init__(self, config: Any, *, deterministic: bool = False, rngs: nnx.Rngs):
        params = _functions(config).init_params(_key("nnx.Model", rngs), config)
        drops = getattr(config, "dropout", 0) or getattr(config, "attention_dropout", 0)
        super().__init__(params, config, dropout_rate=drops, deterministic=deterministic, rngs=rngs)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the model's own parameters

    @arguments.shown
    def __call__(
        self,
        *inputs: Array,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[ModelOptions],
    ) -> Array:
        """What the model's `apply` gives for the inputs, with its options: the logits [..., T, V]."""
        dropout = self._dropout(deterministic, rngs)
        return _functions(self.config).apply(functional(self), *inputs, self.config, **dropout, **options)

    @arguments.shown
    def features(
        self,
        *inputs: Array,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Unpack[ModelOptions],
    ) -> Array:
        """What the logits are computed from, [..., T, D]."""
        dropout = self._dropout(deterministic, rngs)
        return _functions(self.config).features(functional(self), *inputs, self.config, **dropout, **options)


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


def _functions(config: Any) -> ModuleType:
    return arguments.home("nnx.Model", config, "init_params", "apply", "features")


def _key(who: str, rngs: nnx.Rngs) -> Array:
    arguments.instance(who, "rngs", rngs, nnx.Rngs, "nnx.Rngs(0)")
    return rngs.params()


def functional(module: Any) -> Any:
    """The parameters in a module, or in a part of one, as the NamedTuples of the functions.

    >>> layer = MultiHeadAttention(attention.Config(d_model=16, num_heads=4), rngs=nnx.Rngs(0))
    >>> functional(layer).w_q.shape
    (4, 16, 4)
    """
    if isinstance(module, _Parameters):
        return module.named_tuple(*(functional(getattr(module, name)) for name in module.named_tuple._fields))
    return module[...] if isinstance(module, nnx.Variable) else module
