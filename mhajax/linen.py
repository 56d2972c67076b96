"""Flax Linen modules: thin adapters over the functions, with the same numbers.

The parameters in the `variables` are nested dicts with the names of the functions' NamedTuples, so that the heads stay
a visible axis: `variables["params"]["w_q"]` is [N, D, H]. `functional(module, variables)` turns them into the
NamedTuples that every function of this library takes.

`attention_fn` is for the layers that Flax has itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Unpack

import jax
from flax import linen as nn
from flax.linen import dtypes
from jax import Array

from mhajax import arguments, attention, drop_in
from mhajax.block import ModelOptions
from mhajax.options import LayerOptions
from mhajax.tree import from_dict, to_dict


class MultiHeadAttention(nn.Module):
    """`attention.apply` as a layer, to be used inside any Linen model.

    Attributes:
      config: the shape.
      dropout_rate: share of the attention weights that is dropped when `deterministic` is False; takes the rng
        "dropout".

    >>> layer = MultiHeadAttention(attention.Config(d_model=16, num_heads=4))
    >>> variables = layer.init(jax.random.key(0), jax.numpy.ones((2, 5, 16)))
    >>> variables["params"]["w_q"].shape
    (4, 16, 4)
    """

    functions = attention
    config: attention.Config
    dropout_rate: float = 0.0

    @nn.compact
    @arguments.shown
    def __call__(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        deterministic: bool = True,
        **options: Unpack[LayerOptions],
    ) -> Array:
        """x [..., T, D] attends to itself or to memory [..., S, D]; the options are those of `attention.apply`."""
        arguments.instance(
            "linen.MultiHeadAttention", "config", self.config, attention.Config,
            "linen.MultiHeadAttention(attention.Config(…))",
        )  # fmt: skip
        dropout = {}
        if self.dropout_rate and not deterministic:
            dropout = {"dropout_rate": self.dropout_rate, "dropout_key": self.make_rng("dropout")}
        return attention.apply(_params(self), x, self.config, memory=memory, **dropout, **options)


class Model(nn.Module):
    """A whole model as a module: `language_model`, `encoder`, `translator`, or one of your own.

    It runs the functions beside the config's class, `init_params(key, config)`, `apply(params, *inputs, config,
    **options)` and `features(…)`; what they take and return, those say.

    Attributes:
      config: of the model, such as `language_model.Config(…)`; its `dropout` and `attention_dropout` take the rng
        "dropout".

    >>> from mhajax import language_model
    >>> model = Model(language_model.Config(d_model=16, num_heads=4, num_layers=2, vocab_size=11))
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((3, 5), int))
    >>> variables["params"]["stack"]["layers"]["attention"]["w_q"].shape  # [L, N, D, H]
    (2, 4, 16, 4)
    """

    config: Any

    @property
    def functions(self) -> ModuleType:
        """The module of the model's functions."""
        return arguments.home("linen.Model", self.config, "init_params", "apply", "features")

    def setup(self) -> None:
        self.functional_params = _params(self)

    @arguments.shown
    def __call__(self, *inputs: Array, deterministic: bool = True, **options: Unpack[ModelOptions]) -> Array:
        """What the model's `apply` gives for the inputs, with its options: the logits [..., T, V]."""
        dropout = _dropout(self, deterministic)
        return self.functions.apply(self.functional_params, *inputs, self.config, **dropout, **options)

    @arguments.shown
    def features(self, *inputs: Array, deterministic: bool = True, **options: Unpack[ModelOptions]) -> Array:
        """What the logits are computed from, [..., T, D]."""
        dropout = _dropout(self, deterministic)
        return self.functions.features(self.functional_params, *inputs, self.config, **dropout, **options)

    def parameters(self) -> Any:
        """The parameters as the functions take them; `model.init(key, method="parameters")` needs no inputs."""
        return self.functional_params


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
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
) -> Array:
    """`flax.linen.dot_product_attention`, computed by our kernels: an `attention_fn` for Linen's own layers.

    The layer stays the same (parameters, cache, options), and its memory grows with T, not with T × S, as long as
    nobody asks for the weights and its mask is not written out. What else differs: `mhajax.drop_in`.

    Linen hands over only what the signature names, so every argument is here, and what cannot be done is refused.

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
      module: where the weights are sown, as "attention_weights" in "intermediates"; they hold T × S numbers.
      force_fp32_for_softmax: the weights that are sown are float32; the softmax is so anyway.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: refused.

    Returns:
      [..., T, N, Hv].

    Raises:
      ValueError: for sizes that do not belong together, a mask or bias that could be read in two ways, dropout without
        a key, and products of one's own.

    >>> layer = nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn)
    >>> layer.init_with_output(jax.random.key(0), jax.numpy.ones((2, 5, 16)))[0].shape
    (2, 5, 16)
    """
    del broadcast_dropout
    own = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, function in own.items():
        if function is not None:
            raise ValueError(
                f"linen.attention_fn: {name} must be None, got {function}: the kernels have products of their own; "
                "leave it out, or use flax's attention_fn."
            )
    query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
    out, weights = drop_in.of_flax(
        "linen.attention_fn", query, key, value, bias, mask,
        is_causal=False, dropout_key=dropout_rng, dropout_rate=0.0 if deterministic else dropout_rate,
        precision=precision, weights=module is not None,
    )  # fmt: skip
    if module is not None:
        shown = weights if force_fp32_for_softmax else weights.astype(query.dtype)
        module.sow("intermediates", "attention_weights", shown)
    return out


def functional(module: Any, variables: Mapping[str, Any]) -> Any:
    """The parameters in a module's variables (or in `variables["params"]`) as the NamedTuples of the functions.

    Raises:
      ValueError: if a parameter is missing or unknown, with its path.
    """
    return from_dict(variables.get("params", variables), _template(module))


def _template(module: Any) -> Any:
    return jax.eval_shape(lambda: module.functions.init_params(jax.random.key(0), module.config))


def _params(module: Any) -> Any:
    """The module's parameters, made when it is initialised, in the form that the functions take."""
    template = _template(module)
    make = lambda key, name: to_dict(module.functions.init_params(key, module.config))[name]  # noqa: E731
    params = {name: module.param(name, make, name) for name in to_dict(template)}
    # Flax does not mind parameters that nobody asks for; biases that the config does not have are another config's.
    unused = {name: None for name in template._fields if name not in params and module.has_variable("params", name)}
    return from_dict(params | unused, template)


def _dropout(module: Any, deterministic: bool) -> dict[str, Any]:
    drops = getattr(module.config, "dropout", 0) or getattr(module.config, "attention_dropout", 0)
    return {} if deterministic or not drops else {"dropout_key": module.make_rng("dropout")}
