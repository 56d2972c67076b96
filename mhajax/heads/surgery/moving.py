"""Heads in another order, and heads of another model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhajax.heads.surgery import parts
from mhajax.heads.surgery.parts import Model


def permute(params: Model, order: Any) -> Model:
    """The same function with its heads in another order: place n gets head order[n].

    Args:
      params: of an attention, a layer, a stack or a model.
      order: integers [..., N] for every attention, in the form of the gates. Heads that share a key head stay together.

    Raises:
      ValueError: for what is not a permutation of the heads, or tears a group apart.

    >>> from mhajax import attention
    >>> params = attention.init_params(jax.random.key(0), attention.Config(d_model=16, num_heads=4))
    >>> bool((permute(params, [2, 0, 1, 3]).w_q[0] == params.w_q[2]).all())
    True
    """
    found = parts.attentions("permute", params)
    changed = {}
    for name, given in parts.asked("permute", "order", found, order).items():
        one, what = found[name], f"order{parts.of(name)}"
        num_heads, num_keys = one.w_q.shape[-3], one.w_k.shape[-3]
        queries = parts.sized("permute", what, given, one)
        if not np.array_equal(np.sort(queries, axis=-1), np.broadcast_to(np.arange(num_heads), queries.shape)):
            raise ValueError(
                f"surgery.permute: {what} must hold each of the heads 0 … {num_heads - 1} once, got {queries.tolist()}."
            )
        size = num_heads // num_keys
        keys = queries.reshape(*queries.shape[:-1], num_keys, size) // size
        if (keys != keys[..., :1]).any():
            raise ValueError(
                f"surgery.permute: {what} must keep the {size} heads that share a key head together (N={num_heads}, "
                f"K={num_keys}: heads n and m do if n // {size} = m // {size}), got {queries.tolist()}."
            )
        changed[name] = parts.taken(one, queries, keys[..., 0])
    return parts.replaced(params, changed)


def transplant(into: Model, from_: Model, heads: Any) -> Model:
    """`into` with these heads of `from_`, each in its own place; `permute` first to move one. The bias b_o stays.

    Args:
      into, from_: parameters of the same kind and shape.
      heads: bool [..., N] for every attention, in the form of the gates; for a single attention also a list of heads.
        Heads that share a key head are moved together.

    Raises:
      ValueError: for parameters of different shapes, for a part of a group.
      TypeError: for what is neither bool nor, for one attention, integers.

    >>> from mhajax import attention
    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> one, two = (attention.init_params(jax.random.key(seed), config) for seed in (0, 1))
    >>> [bool((transplant(one, two, [2]).w_v[n] == two.w_v[n]).all()) for n in range(4)]
    [False, False, True, False]
    """
    found, others = parts.attentions("transplant", into), parts.attentions("transplant", from_)
    shapes, other_shapes = (jax.tree.map(jnp.shape, each) for each in (found, others))
    if shapes != other_shapes:
        raise ValueError(
            f"surgery.transplant: into and from_ must have the same shapes, got {shapes} and {other_shapes}."
        )
    changed = {}
    for name, given in parts.asked("transplant", "heads", found, heads).items():
        one, what = found[name], f"heads{parts.of(name)}"
        queries = parts.chosen("transplant", what, given, one)
        groups = queries.reshape(*queries.shape[:-1], one.w_k.shape[-3], -1)
        if (groups != groups[..., :1]).any():
            size = groups.shape[-1]
            raise ValueError(
                f"surgery.transplant: {what} must name all of the {size} heads that share a key head or none (heads n "
                f"and m do if n // {size} = m // {size}), got {np.argwhere(queries).squeeze(-1).tolist()}."
            )
        changed[name] = parts.mixed(one, others[name], queries, groups[..., 0])
    return parts.replaced(into, changed)
