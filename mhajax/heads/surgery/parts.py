"""The attentions of a model, what is said about their heads, and heads taken by number."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from numpy.typing import ArrayLike

from mhajax import attention
from mhajax import attentions as per_attention

Model = TypeVar("Model")  # the Params of a module that has `attentions` and `with_attentions`
Config = TypeVar("Config", bound=attention.Config)
Attentions = dict[str, attention.Params]  # by the names that their gates have; "" is an attention that is no part


def attentions(who: str, params: Any) -> Attentions:
    """The attentions of an attention, a layer, a stack or a model, as its own module names them."""
    return _module_of(who, params).attentions(params)


def replaced(params: Any, changed: Attentions) -> Any:
    """The same parameters with other attentions, named as by `attentions`."""
    return _module_of("replaced", params).with_attentions(params, changed)


def _module_of(who: str, params: Any) -> Any:
    module = sys.modules.get(type(params).__module__)
    if not isinstance(params, getattr(module, "Params", ())) or not hasattr(module, "attentions"):
        raise TypeError(
            f"surgery.{who}: params must be the Params of attention, block, transformer, language_model, translator or "
            "of another module that has attentions(params) and with_attentions(params, changed), "
            f"got {type(params).__module__}.{type(params).__name__}."
        )
    return module


def asked(who: str, what: str, found: Attentions, given: Any) -> dict[str, Any]:
    """What was given for each attention; those for which it is None are left out."""
    if "" in found:
        return {"": given}
    per_attention.check(f"surgery.{who}", what, given, tuple(found))
    return {name: value for name, value in given.items() if value is not None}


def of(name: str) -> str:
    """The attention's name as it is written after an argument's in an error."""
    return f".{name}" if name else ""


def belong(who: str, found: Attentions, config: attention.Config) -> None:
    """Raise a ValueError unless the attentions have the config's sizes."""
    want = (config.num_heads, config.d_model, config.width, config.kv_heads, config.value_width)
    for name, one in found.items():
        have = (*one.w_q.shape[-3:], one.w_k.shape[-3], one.w_v.shape[-1])
        if have != want:
            raise ValueError(
                f"surgery.{who}: params{of(name)} must have (N, D, H, K, Hv) = {want}, got {have}; params and config "
                "do not belong together."
            )


def sized(who: str, what: str, given: ArrayLike, one: attention.Params) -> np.ndarray:
    """An array with a place for each head, [..., N]."""
    if isinstance(given, Tracer):
        raise TypeError(
            f"surgery.{who}: {what} decides about shapes, so it must be known outside of jit, vmap and grad."
        )
    array, shape = np.asarray(given), one.w_q.shape[:-2]
    if array.shape != shape:
        axes = {1: "[N]", 2: "[L, N]"}.get(len(shape), "[..., N]")
        raise ValueError(f"surgery.{who}: {what} must be {axes} = {shape}, got {array.shape}.")
    return array


def chosen(who: str, what: str, given: ArrayLike, one: attention.Params) -> np.ndarray:
    """Heads given as bool [..., N] or, for one attention, as indices: bool [..., N]."""
    if isinstance(given, Tracer) or np.asarray(given).dtype == bool:
        return sized(who, what, given, one)
    array, single, num_heads = np.asarray(given), one.w_q.ndim == 3, one.w_q.shape[-3]
    if not single or array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(
            f"surgery.{who}: {what} must be bool {one.w_q.shape[:-2]}{' or a list of heads' if single else ''}, got "
            f"{array.dtype} {array.shape}; of gates, write gates > 0.5."
        )
    if len(set(array.tolist())) < array.size or not all(0 <= head < num_heads for head in array):
        raise ValueError(
            f"surgery.{who}: {what} must name heads of 0 … {num_heads - 1}, each once, got {array.tolist()}."
        )
    return np.isin(np.arange(num_heads), array)


@jax.jit
def taken(one: attention.Params, queries: ArrayLike, keys: ArrayLike) -> attention.Params:
    """These query heads [..., N] and key heads [..., K] of an attention; zeros for -1."""

    def take(w: Array, heads: Array) -> Array:
        index = _in_front(heads, w)
        return jnp.where(index >= 0, jnp.take_along_axis(w, index, axis=heads.ndim - 1), 0)

    return _of_heads(take, queries, keys, one)


@jax.jit
def mixed(one: attention.Params, other: attention.Params, queries: ArrayLike, keys: ArrayLike) -> attention.Params:
    """These query heads (bool [..., N]) and key heads (bool [..., K]) of `other`, all else of `one`."""
    choose = lambda mine, its, heads: jnp.where(_in_front(heads, mine), its, mine)  # noqa: E731
    return _of_heads(choose, queries, keys, one, other)


def _of_heads(change: Callable, queries: Any, keys: Any, *params: attention.Params) -> attention.Params:
    """`change` for every array that has an axis of heads, which are said last: query heads or key heads."""
    changed: dict[str, Any] = {}
    for field in attention.Params._fields:
        arrays = [getattr(one, field) for one in params]
        if arrays[0] is not None and field != "b_o":
            changed[field] = change(*arrays, keys if field[2:] in ("k", "v") else queries)
    return params[0]._replace(**changed)


def _in_front(heads: Array, w: Array) -> Array:
    """What is said about heads [..., N], with as many axes as an array [..., N, …]."""
    return heads.reshape(*heads.shape, *[1] * (w.ndim - heads.ndim))
