"""Flax Linen modules: thin adapters over the functions, with the same numbers.

The parameters in the `variables` are nested dicts with the names of the functions' NamedTuples, so that the heads stay
a visible axis: `variables["params"]["w_q"]` is [N, D, H]. `functional(module, variables)` turns them into the
NamedTuples that every function of this library takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import Array

from mhajax import attention, language_model, translator
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

    config: attention.Config
    dropout_rate: float = 0.0

    def functions(self) -> Callable[[Array], Any]:
        """The function that makes the parameters."""
        return partial(attention.init_params, config=self.config)

    @nn.compact
    def __call__(self, x: Array, memory: Array | None = None, *, deterministic: bool = True, **options: Any) -> Array:
        """x [..., T, D] attends to itself or to memory [..., S, D]; the options are those of `attention.apply`."""
        if self.dropout_rate and not deterministic:
            options |= {"dropout_rate": self.dropout_rate, "dropout_key": self.make_rng("dropout")}
        return attention.apply(_params(self), x, self.config, memory=memory, **options)


class LanguageModel(nn.Module):
    """`language_model` as a module."""

    config: language_model.Config

    def functions(self) -> Callable[[Array], Any]:
        """The function that makes the parameters."""
        return partial(language_model.init_params, config=self.config)

    def setup(self) -> None:
        self.functional_params = _params(self)

    def __call__(self, tokens: Array, *, deterministic: bool = True, **options: Any) -> Array:
        """Logits [..., T, V] of tokens [..., T]; the options are those of `language_model.apply`."""
        options |= _dropout(self, deterministic)
        return language_model.apply(self.functional_params, tokens, self.config, **options)

    def features(self, tokens: Array, *, deterministic: bool = True, **options: Any) -> Array:
        """What the logits are computed from, [..., T, D]."""
        options |= _dropout(self, deterministic)
        return language_model.features(self.functional_params, tokens, self.config, **options)


class Translator(nn.Module):
    """`translator` as a module."""

    config: translator.Config

    def functions(self) -> Callable[[Array], Any]:
        """The function that makes the parameters."""
        return partial(translator.init_params, config=self.config)

    def setup(self) -> None:
        self.functional_params = _params(self)

    def __call__(self, source: Array, target: Array, *, deterministic: bool = True, **options: Any) -> Array:
        """Logits [..., T, V] of targets [..., T]; the options are those of `translator.apply`."""
        options |= _dropout(self, deterministic)
        return translator.apply(self.functional_params, source, target, self.config, **options)

    def features(self, source: Array, target: Array, *, deterministic: bool = True, **options: Any) -> Array:
        """What the logits are computed from, [..., T, D]."""
        options |= _dropout(self, deterministic)
        return translator.features(self.functional_params, source, target, self.config, **options)


def functional(module: Any, variables: dict[str, Any]) -> Any:
    """The parameters in a module's variables (or in `variables["params"]`) as the NamedTuples of the functions.

    Raises:
      ValueError: if a parameter is missing or unknown, with its path.
    """
    return from_dict(variables.get("params", variables), _template(module))


def _template(module: Any) -> Any:
    return jax.eval_shape(module.functions(), jax.random.key(0))


def _params(module: Any) -> Any:
    """The module's parameters, made when it is initialised, in the form that the functions take."""
    make = lambda key, name: to_dict(module.functions()(key))[name]  # noqa: E731
    template = _template(module)
    return from_dict({name: module.param(name, make, name) for name in to_dict(template)}, template)


def _dropout(module: Any, deterministic: bool) -> dict[str, Any]:
    drops = module.config.dropout or module.config.attention_dropout
    return {} if deterministic or not drops else {"dropout_key": module.make_rng("dropout")}
