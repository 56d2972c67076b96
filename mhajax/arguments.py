"""What public functions ask of what they are given: its order, its kind, its range, and names that exist.

Every error says who, what, what was expected, what came and what to write. Only types, shapes and numbers that are
there are looked at, so nothing of this is in a compiled program.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

F = TypeVar("F", bound=Callable[..., Any])


class _Default:
    """Stands in a signature for a default that the function behind it sets."""

    def __repr__(self) -> str:
        return "..."


def shown(function: F) -> F:
    """The function itself, whose signature shows the keywords of its `**options: Unpack[…]` one by one.

    They are declared once, in the TypedDict, which editors and type checkers read; this is for `inspect.signature`,
    `help` and notebooks.
    """
    *explicit, rest = inspect.signature(function).parameters.values()
    (kind,) = typing.get_args(typing.get_type_hints(function)[rest.name])
    keywords = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_Default(), annotation=getattr(hint, "__forward_arg__", hint)
        )
        for name, hint in kind.__annotations__.items()
    ]
    # What inspect.signature, jax.jit and Flax read before anything else.
    function.__signature__ = inspect.signature(function).replace(parameters=[*explicit, *keywords])  # pyright: ignore[reportFunctionMemberAccess]
    return function


def named(who: str, given: Mapping[str, Any], kind: Any, **instead: str) -> None:
    """Raise a TypeError unless all options have names of the TypedDict `kind`.

    Args:
      who: the function, for the error.
      given: its `**options`.
      kind: what they are declared in.
      **instead: for names that exist elsewhere, what to write.
    """
    for name in given:
        if name in kind.__annotations__:
            continue
        advice = f"{instead[name]}." if name in instead else _nearest(name, kind.__annotations__)
        raise TypeError(f"{who}: there is no option {name!r}; {advice}")


def _nearest(name: str, names: Iterable[str]) -> str:
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=1)
    listed = f"the options are {', '.join(known)}."
    return f"did you mean {near[0]!r}? {listed[0].upper()}{listed[1:]}" if near else listed


def order(call: str, params: Any, config: Any, params_kind: Any, config_kind: type, **arrays: Any) -> None:
    """Raise a TypeError unless a function was given parameters, arrays and a config, each in its place.

    Args:
      call: the function with its arguments in their order, such as "attention.apply(params, x, config)".
      params, config: what came in their places.
      params_kind: the NamedTuple of the parameters; another one with its fields will do.
      config_kind: the class of the config.
      **arrays: what came in the places of arrays, by name.
    """
    wrong = []
    if not all(hasattr(params, field) for field in params_kind._fields):
        advice = " (of a Flax module, or of a dict: functional(…) or tree.from_dict(…))" if _is_dict(params) else ""
        wrong.append(f"params must be {_name(params_kind)}, got {kind_of(params)}{advice}")
    for name, array in arrays.items():
        if not _is_array(array):
            advice = f"; write jnp.asarray({name})" if isinstance(array, list | int | float) else ""
            wrong.append(f"{name} must be an array, got {kind_of(array)}{advice}")
    if not isinstance(config, config_kind):
        wrong.append(f"config must be {_name(config_kind)}, got {kind_of(config)}")
    if wrong:
        raise TypeError(f"{call.partition('(')[0]}: {', '.join(wrong)}. The order is {call}.")


def key(who: str, given: Any, name: str = "key") -> None:
    """Raise a TypeError unless it is one PRNG key, of `jax.random.key` or `jax.random.PRNGKey`."""
    if _is_array(given):
        typed = jnp.issubdtype(given.dtype, jax.dtypes.prng_key)
        if (typed and given.ndim == 0) or (given.dtype == np.uint32 and given.ndim == 1):
            return
    advice = "jax.vmap over several" if _is_array(given) and given.ndim else "write jax.random.key(0)"
    if isinstance(given, int | np.integer):
        advice = f"write jax.random.key({given})"
    raise TypeError(f"{who}: {name} must be a PRNG key, got {kind_of(given)}; {advice}.")


def init(who: str, given: Any, config: Any, config_kind: type) -> None:
    """Raise a TypeError unless `who`, an init_params, was given a PRNG key and then a config."""
    if isinstance(given, config_kind) or not isinstance(config, config_kind):
        raise TypeError(
            f"{who}: the order is {who}(key, config) with config {_name(config_kind)}, got {kind_of(given)} and "
            f"{kind_of(config)}."
        )
    key(who, given)


def instance(who: str, name: str, given: Any, kind: type, write: str) -> None:
    """Raise a TypeError unless it is of a class of this library."""
    if not isinstance(given, kind):
        raise TypeError(f"{who}: {name} must be {_name(kind)}, got {kind_of(given)}; write {write}.")


def home(who: str, config: Any, *names: str) -> ModuleType:
    """The module that has the class of a model's config and, beside it, functions of these names.

    Raises:
      TypeError: there is none.
    """
    for base in type(config).__mro__:
        module = sys.modules.get(base.__module__)
        if module is not None and all(hasattr(module, name) for name in names):
            return module
    raise TypeError(
        f"{who}: config must be the Config of a model, of language_model, encoder, translator or another module with "
        f"{', '.join(names)}, got {kind_of(config)}."
    )


def function(who: str, name: str, given: Any, call: str, write: str) -> None:
    """Raise a TypeError unless it can be called, as `call` says."""
    if given is not None and not callable(given):
        raise TypeError(f"{who}: {name} must be a function {call}, got {kind_of(given)}; write {write}.")


def integers(config: Any, *names: str, least: int = 1, optional: bool = False) -> None:
    """Raise unless these fields of a config are integers of at least `least`; `optional` ones may be None.

    Raises:
      TypeError: for what is no integer.
      ValueError: for what is too small.
    """
    for name in names:
        given = getattr(config, name)
        if not (optional and given is None):
            integer("", name, given, least)


def integer(who: str, name: str, given: Any, least: int = 1) -> None:
    """Raise unless it is an integer, which is static, and at least `least`."""
    where = f"{who}: {name}" if who else name
    if isinstance(given, bool | np.bool_) or not isinstance(given, int | np.integer):
        whole = isinstance(given, float) and given.is_integer()
        advice = f"; write {int(given)}" if whole else "; write int(…)" if _is_array(given) else ""
        raise TypeError(f"{where} must be an integer, got {kind_of(given)}{advice}.")
    if given < least:
        raise ValueError(f"{where} must be at least {least}, got {given}.")


def above_zero(who: str, name: str, given: Any) -> None:
    """Raise a ValueError for numbers that are known not to be finite and above 0; those that are traced are not."""
    if known(given) and not np.all((np.asarray(given) > 0) & np.isfinite(np.asarray(given))):
        raise ValueError(f"{who}: {name} must be finite and above 0, got {given}.")


def booleans(config: Any, *names: str) -> None:
    """Raise a TypeError unless these fields of a config are True or False."""
    for name in names:
        given = getattr(config, name)
        if not isinstance(given, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {kind_of(given)}.")


def positive(config: Any, *names: str) -> None:
    """Raise unless these fields of a config are finite numbers above 0.

    Raises:
      TypeError: for what is no number.
      ValueError: for what is not above 0, or not finite.
    """
    for name in names:
        given = getattr(config, name)
        if isinstance(given, bool) or not isinstance(given, int | float | np.integer | np.floating):
            raise TypeError(f"{name} must be a number, got {kind_of(given)}.")
        if not 0 < given < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {given}.")


def below(who: str, name: str, given: Any, size: int, what: str) -> None:
    """Raise a ValueError if an index is known not to be in 0 … size - 1; nothing is counted from the end.

    Args:
      who: the function, for the error.
      name: the argument that holds the indices.
      given: integers, of any shape; those that are traced are not known.
      size: how many there are.
      what: of what.
    """
    if not known(given):
        return
    numbers = np.asarray(given)
    outside = numbers[(numbers < 0) | (numbers >= size)]
    if outside.size:
        raise ValueError(
            f"{who}: {name} must be at least 0 and below {size}, the number of {what}, got {outside.flat[0]}"
            f"{f' and {outside.size - 1} others outside' if outside.size > 1 else ''}."
        )


def known(*values: Any) -> bool:
    """Whether all of these are numbers that are there now: no tracers, and nothing on other machines."""
    return all(
        not isinstance(value, Tracer) and (not isinstance(value, jax.Array) or value.is_fully_addressable)
        for value in values
    )


def kind_of(value: Any) -> str:
    """What came, for an error: numbers and texts as they are, arrays by dtype and shape, all else by its class."""
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return repr(value)
    if _is_array(value):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if inspect.isroutine(value) or isinstance(value, type):
        return f"the {'class' if isinstance(value, type) else 'function'} {_name(value)}"
    name = _name(type(value))
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _name(kind: Any) -> str:
    """A class or a function as its users write it."""
    module = (kind.__module__ or "").removeprefix("mhajax.")
    return kind.__qualname__ if module in ("builtins", "") else f"{module}.{kind.__qualname__}"


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "ndim")


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)
