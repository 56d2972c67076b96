"""What attention is given, looked at before anything is computed: who, what, expected, got, what to do."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import jax.numpy as jnp
from jax import Array

from mhajax import arguments, dropout
from mhajax.interventions import Intervention
from mhajax.masks import Mask


def stream(name: str, x: Array, config: Any, who: str = "attention.apply") -> None:
    """x [..., T, D] or memory [..., S, D], floating point."""
    length = "T" if name == "x" else "S"
    if x.ndim < 2 or x.shape[-1] != config.d_model:
        raise ValueError(
            f"{who}: {name} must be [..., {length}, D={config.d_model}], got {x.shape}; D is config.d_model."
        )
    if x.shape[-2] == 0:
        raise ValueError(f"{who}: {name} must hold at least one token, got {length}=0 in {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{who}: {name} must be floating point, got {x.dtype}; embed tokens first.")


def same_leading(x: Array, memory: Array) -> None:
    """x and memory have the same axes before their tokens."""
    if memory.shape[:-2] != x.shape[:-2]:
        raise ValueError(
            f"attention.apply: memory must have the leading axes of x, {x.shape[:-2]}, got {memory.shape[:-2]} "
            f"(x {x.shape}, memory {memory.shape}); jnp.broadcast_to a shared memory."
        )


def parameters(params: Any, config: Any) -> None:
    """Every array has the shape that the config says, and is there if the config says so."""
    d, n, k, h, hv = config.d_model, config.num_heads, config.kv_heads, config.width, config.value_width
    expected = {
        "w_q": ("[N, D, H]", (n, d, h)), "w_k": ("[K, D, H]", (k, d, h)),
        "w_v": ("[K, D, Hv]", (k, d, hv)), "w_o": ("[N, Hv, D]", (n, hv, d)),
        "b_q": ("[N, H]", (n, h)), "b_k": ("[K, H]", (k, h)), "b_v": ("[K, Hv]", (k, hv)), "b_o": ("[D]", (d,)),
    }  # fmt: skip
    for name, (axes, shape) in expected.items():
        value = getattr(params, name)
        if name.startswith("b_") and not config.use_bias:
            axes, shape = "None (config.use_bias is False)", None
        got = None if value is None else value.shape
        if got != shape:
            raise ValueError(
                f"attention.apply: params.{name} must be {axes}{'' if shape is None else f' = {shape}'}, got {got}; "
                "params and config do not belong together."
            )


def positions(name: str, given: Array | None, x: Array) -> None:
    """Positions are integers [T], or [..., T] with the leading axes of x."""
    if given is None:
        return
    if not hasattr(given, "dtype") or not jnp.issubdtype(given.dtype, jnp.number):
        raise TypeError(
            f"attention.apply: {name} must be an array of numbers, {x.shape[-2:-1]} or {x.shape[:-1]}, got "
            f"{arguments.kind_of(given)}; write jnp.asarray(…)."
        )
    if given.shape not in (x.shape[-2:-1], x.shape[:-1]):
        raise ValueError(
            f"attention.apply: {name} must be {x.shape[-2:-1]} or {x.shape[:-1]}, one for every token, "
            f"got {given.shape}."
        )


def functions(score: Callable | None, rotate: Callable | None) -> None:
    """What is called for every pair or token is a function, and not one that makes it."""
    call, write = "(score, head, q_position, k_position) → score", "score=scores.alibi(num_heads), or your own"
    if isinstance(score, FunctionType) and score.__module__ == "mhajax.scores":
        raise TypeError(
            f"attention.apply: score must be what scores.{score.__name__}(…) returns, got the function itself; call it."
        )
    arguments.function("attention.apply", "score", score, call, write)
    arguments.function("attention.apply", "rotate", rotate, "(x, positions) → x", "rotate=positions.rotary")


def mask_sizes(
    mask: Mask | None,
    leading: tuple[int, ...],
    num_queries: int | None,
    num_keys: int,
    who: str = "attention.apply",
) -> None:
    """A mask that was written out is for as many tokens as there are; None: fewer queries are asked about (a cache)."""
    if mask is None:
        return
    sizes = mask.sizes()
    for axis, have, want in zip(("T", "S"), sizes, (num_queries, num_keys), strict=True):
        if want is not None and have not in (None, want):
            advice = "cut the array to the tokens that are there"
            if leading and sizes == (leading[0], num_keys):
                advice = padding_advice("mask")
            raise ValueError(
                f"{who}: mask must be for {axis}={want} {'queries' if axis == 'T' else 'keys'}, got one "
                f"written out for {have}; {advice}."
            )


def padding_advice(name: str) -> str:
    """What to write for a mask [B, S] of padding."""
    return (
        f"if it is padding, [B, S] and True at real keys, write masks.dense({name}[:, None, None, :]), or "
        f"masks.lengths({name}.sum(-1)) where padding comes last"
    )


def bias(given: Array | None, x: Array) -> None:
    """Numbers that are added to the logits, [T, S] or [..., N, T, S] in full, never guessed."""
    if given is None:
        return
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise TypeError(f"attention.apply: bias must be floating point, got {given.dtype}; booleans are a mask=.")
    if given.ndim not in (2, x.ndim + 1):
        raise ValueError(
            f"attention.apply: bias must be [T, S] or have {x.ndim + 1} axes, [..., N, T, S] with 1 where it is "
            f"shared, got {given.shape}; write bias[None] for one per head, bias[:, None] for one per example."
        )


def gates(given: Array | None, x: Array, config: Any) -> None:
    """A factor for every head: [N], [..., N] with the leading axes of x, or [..., N, T] with one for every query."""
    if given is None:
        return
    _amount("gates", given, x.shape[:-2], ("N", config.num_heads), ("T", x.shape[-2]))


def changes(who: str, given: Any) -> None:
    """An Intervention, not the function that makes it or a gate."""
    arguments.instance(who, "intervention", given, Intervention, "interventions.zero(…), or gates= for factors")


def intervention(given: Intervention, x: Array, num_keys: int, config: Any) -> None:
    """Patches that belong to these heads, queries and keys; `gates` and `mask_sizes` look at the rest."""
    n, k, t, h, hv = config.num_heads, config.kv_heads, x.shape[-2], config.width, config.value_width
    query_heads, key_heads = ("N", n), ("K", k)
    quantities = {
        "queries": (query_heads, ("T", t), ("H", h)),
        "keys": (key_heads, ("S", num_keys), ("H", h)),
        "values": (key_heads, ("S", num_keys), ("Hv", hv)),
        "logits": (query_heads, ("T", t), ("S", num_keys)),
        "weights": (query_heads, ("T", t), ("S", num_keys)),
        "heads": (query_heads, ("T", t), ("Hv", hv)),
    }
    for name, axes in quantities.items():
        patch = getattr(given, name)
        if patch is None:
            continue
        full = (*x.shape[:-2], *(size for _, size in axes))
        have = jnp.shape(patch.value)
        if len(have) > len(full) or any(a not in (1, b) for a, b in zip(have[::-1], full[::-1], strict=False)):
            letters = ", ".join(letter for letter, _ in axes)
            raise ValueError(
                f"attention.apply: the value of intervention.{name} must broadcast to [..., {letters}] = {full}, got "
                f"{have}; with a cache, S is its capacity and T the tokens of this call."
            )
        _amount(f"the amount of intervention.{name}", jnp.asarray(patch.amount), x.shape[:-2], axes[0], axes[1])


def _amount(name: str, given: Array, leading: tuple[int, ...], heads: tuple[str, int], tokens: tuple[str, int]) -> None:
    """A number or boolean for every head, [], [N], [..., N] or [..., N, T]; an axis that is shared may be 1."""
    (n, num_heads), (t, size) = heads, tokens
    shapes = ((), (num_heads,), (*leading, num_heads), (*leading, num_heads, size))
    fits = [
        len(shape) == given.ndim and all(have in (1, want) for have, want in zip(given.shape, shape, strict=True))
        for shape in shapes
    ]
    if not any(fits):
        raise ValueError(
            f"attention.apply: {name} must be [{n}] = ({num_heads},) or [..., {n}] = {shapes[2]} or [..., {n}, {t}] = "
            f"{shapes[3]}, got {given.shape}."
        )


def dropped(rate: float, key: Array | None) -> None:
    """A rate below 1, and a key if anything is dropped."""
    dropout.check_rate("attention.apply", "dropout_rate", rate)
    if key is not None:
        arguments.key("attention.apply", key, "dropout_key")
    if rate and key is None:
        raise ValueError(
            f"attention.apply: dropout_rate={rate} needs dropout_key, a PRNG key; "
            "for evaluation leave dropout_rate out."
        )
