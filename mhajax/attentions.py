"""One value for every attention of a model, by the name that the model gives it.

A model says what its attentions are called: `attentions(params)` of its module, such as "encoder", "decoder" and
"cross" of a translator, "attention" of a language model. Gates, interventions, what is captured and what was captured
have the same names:

    >>> gates = PerAttention(encoder=jnp.ones((2, 4)), cross=jnp.zeros((3, 4)))
    >>> gates.cross.shape
    (3, 4)
    >>> jax.tree.map(jnp.sum, gates)
    PerAttention(cross=Array(0., dtype=float32), encoder=Array(8., dtype=float32))

Attentions that are left out have nothing: all gates 1, nothing changed, nothing captured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp  # noqa: F401 - for the example

from mhajax import arguments

Value = TypeVar("Value")


class PerAttention(Mapping[str, Value], Generic[Value]):
    """A pytree of one value for every attention that is named; read by attribute or by key, in alphabetical order.

    Two are equal, and hash alike, if their values do: one that holds captures is static under jit.
    """

    __slots__ = ("_values",)
    _values: dict[str, Value]

    def __init__(self, /, **values: Value):
        object.__setattr__(self, "_values", {name: values[name] for name in sorted(values)})

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __getattr__(self, name: str) -> Value:
        if name.startswith("_") or name not in self._values:
            known = "" if name.startswith("_") else f"; there are {', '.join(self._values) or 'none'}"
            raise AttributeError(f"PerAttention has nothing for {name!r}{known}.")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"PerAttention cannot be changed; write PerAttention(**{{**old, {name!r}: …}}).")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"PerAttention({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"

    def __reduce__(self) -> tuple:
        return _from_dict, (dict(self._values),)


def _from_dict(values: dict[str, Value]) -> PerAttention[Value]:
    return PerAttention(**values)


def _flatten(tree: PerAttention) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.GetAttrKey(name), value) for name, value in tree.items()], tuple(tree)


def _unflatten(names: tuple[str, ...], values: Any) -> PerAttention:
    return PerAttention(**dict(zip(names, values, strict=True)))


jax.tree_util.register_pytree_with_keys(
    PerAttention, _flatten, _unflatten, lambda tree: (tuple(tree.values()), tuple(tree))
)


def check(who: str, name: str, given: Any, known: Collection[str]) -> None:
    """Raise unless it is None or a value for some of these attentions.

    Args:
      who: the function, for the error.
      name: the argument.
      given: what came; a dict will do.
      known: the names of the attentions that there are.

    Raises:
      TypeError: for what does not say which attention it is for.
      ValueError: for a name that no attention has.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        write = ", ".join(f"{one}=…" for one in known)
        raise TypeError(
            f"{who}: {name} must be a PerAttention, got {arguments.kind_of(given)}; write "
            f"mhajax.PerAttention({write}), any of these."
        )
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{who}: {name} must be for any of the attentions {', '.join(known)}, got {', '.join(map(str, unknown))}."
        )
