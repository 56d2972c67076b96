"""What a loss gives for gates: checked, lifted over sentences, counted; shared by the measures of this folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from mhajax.statistics import Tally

Loss = Callable[[Any], Array]
Heads = ArrayLike | Sequence[Any]  # numbers of heads, or booleans that say which


def sentences(who: str, loss: Loss, gates: Any) -> int:
    """B, from what the loss gives."""
    shape = jax.eval_shape(loss, gates).shape
    if len(shape) != 1:
        raise ValueError(
            f"importance.{who}: loss must give a number for every sentence, [B], got shape {shape}; "
            "sum over tokens, not over sentences."
        )
    return shape[0]


def of_sentences(who: str, loss: Loss, gates: Any) -> Any:
    """The same gates for every sentence, [..., N] to [..., B, N]."""
    count = sentences(who, loss, gates)
    return jax.tree.map(lambda g: jnp.repeat(jnp.asarray(g, float)[..., None, :], count, axis=-2), gates)


def by_head(losses: Array, gates: Any) -> Any:
    """[heads, B] in the structure of the gates: [..., B, N]."""
    leaves, structure = jax.tree.flatten(gates)
    found, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        found.append(jnp.swapaxes(losses[start : start + size].reshape(*leaf.shape, -1), -1, -2))
        start += size
    return jax.tree.unflatten(structure, found)


def flat_by_sentence(tree: Any) -> Array:
    """Leaves [..., B, N] as [B, heads]."""
    turned = [jnp.moveaxis(leaf, -2, 0) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in turned], axis=-1)


def tally(total: Array, tokens: ArrayLike | None) -> Tally:
    """total [..., B, N]; the baseline of everything here is 0."""
    count = jnp.ones(total.shape[-2]) if tokens is None else jnp.asarray(tokens)
    return Tally(total, count[:, None], jnp.zeros_like(total))


def tally_of_sentences(total: Array, tokens: ArrayLike | None) -> Tally:
    """total [..., B]."""
    return Tally(total, jnp.ones(total.shape[-1]) if tokens is None else jnp.asarray(tokens), jnp.zeros_like(total))


def without(loss: Loss, gates: Any, removed: ArrayLike, batch_size: int | None) -> Array:
    """The losses [R, B] after R sets of heads are removed, bool [R, heads] in the order of `ravel_pytree(gates)`."""
    flat, rebuild = ravel_pytree(gates)
    one = lambda gone: loss(rebuild(jnp.where(gone, 0, flat)))  # noqa: E731
    return jax.lax.map(one, jnp.asarray(removed, bool), batch_size=batch_size)


def sets(who: str, name: str, given: Heads, gates: Any) -> Array:
    """Sets of heads as bool [R, heads]; raises a ValueError unless they are that."""
    heads, found = count(gates), jnp.asarray(given)
    if found.ndim != 2 or found.shape[1] != heads or found.dtype != bool:
        raise ValueError(
            f"importance.{who}: {name} must be booleans [R, {heads}], a row for each set and True for each of the "
            f"{heads} heads in it, got {found.dtype} {found.shape}; `layers(gates)` makes one of every layer."
        )
    return found


def members(who: str, name: str, given: Heads, gates: Any) -> Array:
    """Some heads by number as bool [heads]; raises a ValueError for one that is not there, if they are known."""
    heads = count(gates)
    if not np.size(given) and np.ndim(given) == 1:
        return jnp.zeros(heads, bool)
    found = numbers(who, name, given, 1, heads)
    return jnp.zeros(heads, bool).at[found].set(True)


def numbers(who: str, name: str, given: Heads, ndim: int, heads: int) -> Array:
    """Integers with so many axes; raises a ValueError unless each is a number of a head, if they are known."""
    found = given if isinstance(given, Array) else np.asarray(given)
    if found.ndim != ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        shape = ("heads",) if ndim == 1 else ("R", "heads")
        raise ValueError(
            f"importance.{who}: {name} must be numbers of heads, integers [{', '.join(shape)}] as in `ranking`, got "
            f"{found.dtype} {found.shape}."
        )
    if known(found) and found.size and not 0 <= np.min(found) <= np.max(found) < heads:
        raise ValueError(f"importance.{who}: {name} must be from 0 to {heads - 1}, got {np.asarray(found).tolist()}.")
    return jnp.asarray(found)


def known(given: Heads) -> bool:
    """Whether numbers can be looked at here and now."""
    return not isinstance(given, Tracer)


def count(gates: Any) -> int:
    """How many heads there are."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(gates))


def layers(gates: Any) -> Array:
    """The layers of a model as sets of heads: bool [layers, heads], leaf after leaf, as `joint` takes them.

    >>> layers(jnp.ones((2, 3))).astype(int)
    Array([[1, 1, 1, 0, 0, 0],
           [0, 0, 0, 1, 1, 1]], dtype=int32)
    """
    of_head = layer_of_head(gates)
    return jnp.asarray(of_head == np.arange(of_head[-1] + 1)[:, None])


def layer_of_head(gates: Any) -> np.ndarray:
    """The number of every head's layer, integers [heads], counted through all leaves."""
    found, start = [], 0
    for leaf in jax.tree.leaves(gates):
        rows = math.prod(jnp.shape(leaf)[:-1])
        found.append(np.repeat(start + np.arange(rows), jnp.shape(leaf)[-1]))
        start += rows
    return np.concatenate(found)
