"""The steps between which the variants do what is theirs: scores → weights → heads → output.

What is not finite is taken out before a variant works on it, and the queries that saw it get NaN in the output: zero
times NaN is NaN, so it would reach gradients through any product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, attention, checks, precision
from mhajax.kernels import Path, patches
from mhajax.options import Options


class Pairs(NamedTuple):
    """All pairs of queries and keys."""

    logits: Array  # [..., N, T, S], 0 where not allowed
    allowed: Array  # bool [..., N, T, S]
    values: Array  # [..., K, S, Hv]
    nonfinite: Array | None  # as from `look`


def check(who: str, params: Any, x: Any, config: Any, params_kind: Any, options: Mapping[str, Any]) -> None:
    """Raise a TypeError unless a variant's `apply` was given what it takes, in its order."""
    arguments.named(f"{who}.apply", options, Options, capture="the variants show nothing of what they compute")
    arguments.order(f"{who}.apply(params, x, config)", params, config, params_kind, attention.Config, x=x)


def look(
    params: attention.Params, x: Array, config: attention.Config, capture: Sequence[str], **options: Any
) -> tuple[dict[str, Array], Array | None]:
    """What attention computes on the way, without NaN, and which queries saw something that is not finite.

    Args:
      params, x, config: as in `attention.apply`.
      capture: as in `attention.apply_captured`; "heads" or "logits" first.
      **options: as in `attention.apply`.

    Returns:
      The captured arrays, and bool [..., T]; None without a mask and a bias, and then nothing is taken out.
    """
    _, seen = attention.apply_captured(params, x, config, capture=capture, **options)
    if options.get("mask") is None and options.get("bias") is None:
        return seen, None
    nonfinite = jnp.any(jnp.isnan(seen[capture[0]]), axis=(-3, -1))
    bad = lambda name, a: jnp.isnan(a) if name == "logits" else ~jnp.isfinite(a)  # noqa: E731 - a mask is -inf
    return {name: jnp.where(bad(name, array), 0, array) for name, array in seen.items()}, nonfinite


def pairs(
    who: str,
    params: attention.Params,
    x: Array,
    config: attention.Config,
    *,
    kernel: str | Path = "auto",
    **options: Any,
) -> Pairs:
    """Every logit, for variants that need all of them at once: T × S numbers for every head.

    Raises:
      ValueError: for a kernel that does not hold every logit.
    """
    if kernel not in ("auto", "dense"):
        raise ValueError(
            f"{who}.apply: kernel={kernel!r} cannot do this: the variant needs every logit; use kernel='auto' or "
            "'dense'."
        )
    seen, nonfinite = look(params, x, config, ("logits", "values"), kernel="dense", **options)
    allowed = seen["logits"] != -jnp.inf
    return Pairs(jnp.where(allowed, seen["logits"], 0), allowed, seen["values"], nonfinite)


def weigh(weights: Array, values: Array) -> Array:
    """The heads' outputs [..., N, T, Hv], of weights [..., N, T, S] and values [..., K, S, Hv], in their dtype."""
    *leading, num_heads, length, num_keys = weights.shape
    grouped = weights.astype(values.dtype).reshape(*leading, values.shape[-3], -1, length, num_keys)
    heads = precision.einsum("...kgts,...ksh->...kgth", grouped, values)
    return heads.reshape(*leading, num_heads, length, -1).astype(values.dtype)


def combine(
    params: attention.Params,
    x: Array,
    config: attention.Config,
    heads: Array,
    nonfinite: Array | None,
    gates: ArrayLike | None = None,
) -> Array:
    """The output [..., T, D] of heads [..., N, T, Hv], NaN for queries that are non-finite."""
    if gates is not None:
        gates = jnp.asarray(gates)
        checks.gates(gates, x, config)
        heads = heads * patches.by_token(gates, heads.ndim).astype(heads.dtype)
    w_o, b_o = jax.tree.map(lambda w: w.astype(x.dtype), (params.w_o, params.b_o))
    out = jnp.einsum("...nth,nhd->...td", heads.astype(x.dtype), w_o)
    if b_o is not None:
        out = out + b_o
    return out if nonfinite is None else jnp.where(nonfinite[..., None], jnp.nan, out)


def sized(who: str, name: str, given: Array, axes: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a parameter has the shape that the config says."""
    if given.shape != shape:
        raise ValueError(
            f"{who}.apply: params.{name} must be {axes} = {shape}, got {given.shape}; params and config do not belong "
            "together."
        )
