"""Keys and values already seen, so that a token attends to the past without computing it again.

A cache holds the last tokens of every row of a batch. The rows may be at different places: prompts of different
lengths, a row that begins anew. `extend` is attention with a cache: it appends the new tokens and lets them attend to
all of it. Prompt and single tokens are the same call; inside `jit`, with the cache donated or carried by a loop, a
token is written in place, and what is there is read once.

    state = cache.init((batch,), capacity, config)
    y, state, _ = cache.extend(params, x, state, config, mask=masks.causal())

How many tokens there are is not known under `jit`, so what does not fit cannot be refused there: the outputs of such a
row are NaN, and `overflowed(state)` says which rows those are.

What is not finite is taken out when it is written: such a token gets a key of NaN and a value of 0, and so spoils those
who see it and nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from mhajax import arguments, attention, checks, masks
from mhajax.attention import KeysValues
from mhajax.interventions import Capture, Intervention
from mhajax.kernels import finite
from mhajax.masks import Mask
from mhajax.options import HeadOptions

_NOWHERE = 2**30  # the position of a slot that holds no token: after every query
_FEW = 32  # tokens so few that their logits are held; longer chunks go the way of any attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Cache:
    """Room for `capacity` keys and values of every head; a pytree.

    Attributes:
      k: keys [..., K, capacity, H].
      v: values [..., K, capacity, Hv].
      length: tokens seen so far, int32: [] where all rows are alike, or [...] with a number for every row.
      rolling: the last `capacity` tokens are kept: token p is in slot p % capacity. Else slot p holds token p.
    """

    k: Array
    v: Array
    length: Array
    rolling: bool = field(default=False, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Number of tokens that are kept."""
        return self.k.shape[-2]

    @property
    def positions(self) -> Array | np.ndarray:
        """Position of the token in every slot, [capacity] or [..., capacity]; after every query where there is none."""
        slots = np.arange(self.capacity, dtype=np.int32)
        if not self.rolling:
            return slots  # what is at the length and after is not there yet: `masks.prefix(length)`
        last = self.length[..., None] - 1
        positions = last - (last - slots) % self.capacity
        return jnp.where(positions < 0, _NOWHERE, positions)


def init(
    leading: Sequence[int], capacity: int, config: attention.Config, dtype: Any = jnp.float32, *, rolling: bool = False
) -> Cache:
    """An empty cache.

    Args:
      leading: the leading axes of its inputs, [*leading, t, D].
      capacity: tokens that it can hold.
      config: the shape of the attention.
      dtype: of keys and values, best that of the inputs.
      rolling: keep the last `capacity` tokens and forget what is older, instead of refusing more than `capacity`: the
        same as attention with `masks.causal() & masks.window(capacity - 1)`, for texts without end.

    >>> config = attention.Config(d_model=16, num_heads=4, num_kv_heads=2)
    >>> init((3,), 10, config).k.shape
    (3, 2, 10, 4)
    """
    if isinstance(capacity, int) and capacity < 1:
        raise ValueError(f"cache.init: capacity must be at least 1 token, got {capacity}.")
    arguments.integer("cache.init", "capacity", capacity)
    if not isinstance(leading, Sequence) or isinstance(leading, str):
        raise TypeError(
            f"cache.init: leading must be a tuple of sizes, got {arguments.kind_of(leading)}; write ({leading},) for "
            "inputs [B, t, D]."
        )
    for size in leading:
        arguments.integer("cache.init", "a size of leading", size, least=0)
    heads = (*leading, config.kv_heads, capacity)
    k, v = (jnp.zeros((*heads, width), dtype) for width in (config.width, config.value_width))
    return Cache(k, v, jnp.int32(0), rolling)


@arguments.shown
def extend(
    params: attention.Params,
    x: Array,
    cache: Cache,
    config: attention.Config,
    *,
    capture: Sequence[str] | Capture = (),
    **options: Unpack[HeadOptions],
) -> tuple[Array, Cache, dict[str, Array]]:
    """Attention of t more tokens to those in the cache and to themselves: the same as `attention.apply` on all of them.

    Args:
      params, config: as in `attention.apply`.
      x: the next tokens, [..., t, D]; any t from 1, and another one at every call.
      cache: from `init`, or what the last call returned.
      real: bool [..., t], False for padding, which is neither kept nor counted: prompts padded left or right, rows that
        stand still. Its outputs mean nothing. The new cache has a length for every row. None: all are real.
      mask: which query may attend to which key, such as `masks.causal()`; slots without a token are hidden in any
        case. What is looked up by index (`lengths`, `segments`, `dense`), is so for all tokens seen, not for the chunk.
      rotate: as in `attention.apply`.
      intervention: as in `attention.apply`; T are the new tokens, S the slots of the cache. The cache keeps what would
        be there without it.
      capture, gates, bias, score, dropout_rate, dropout_key, kernel: as in `attention.apply_captured`.

    Returns:
      The output [..., t, D], the cache with x in it, and a dict with an array for every name in `capture`.

    Raises:
      ValueError: if the tokens do not fit and the lengths are known. Under jit they are not: then the output of that
        row is NaN, in this call and all that follow, and `overflowed` says so. A rolling cache has room for ever.
        For a mask that is looked up by index where index and slot differ.

    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> params = attention.init_params(jax.random.key(0), config)
    >>> state = init((2,), 10, config)
    >>> y, state, _ = extend(params, jnp.ones((2, 5, 16)), state, config, mask=masks.causal())
    >>> y.shape, int(state.length)
    ((2, 5, 16), 5)

    References:
      Rolling: Jiang et al. 2023, "Mistral 7B", section 2 (rolling buffer cache; their W is our capacity).
    """
    arguments.named("cache.extend", options, HeadOptions, positions="leave it out: the cache knows them")
    call = "cache.extend(params, x, cache, config)"
    arguments.order(call, params, config, attention.Params, attention.Config, x=x)
    arguments.instance("cache.extend", "cache", cache, Cache, "cache.init(leading, capacity, config)")
    checks.stream("x", x, config, who="cache.extend")
    size, real = x.shape[-2], options.get("real")
    rotate, intervention = options.get("rotate"), options.get("intervention", Intervention())
    checks.changes("cache.extend", intervention)
    mask = masks.as_mask(options.get("mask"), "cache.extend")
    _check_mask(mask, cache, options.get("bias"), real)
    _check_mask(intervention.edges, cache, None, real)
    _check_patches(intervention, cache)
    at = positions(cache, size, real)
    new = attention.keys_values(params, x, config, positions=at, rotate=rotate)
    after = append(cache, new, real)
    visible = masks.prefix(after.length)
    if cache.rolling:
        visible = visible & masks.window(cache.capacity - 1)
    if cache.rolling and size > 1:  # what the chunk overwrites is still seen by its first tokens
        answers, places = _with_chunk(cache, new, at if real is None else jnp.where(real, at, _NOWHERE))
    else:
        answers, places = KeysValues(after.k, after.v), after.positions
    options["mask"] = visible if mask is None else visible & mask
    out, captured = attention.apply_to(
        params, x, answers, config,
        positions=at, start=cache.length if cache.length.ndim == 0 else 0,
        keys=masks.tokens(places.shape[-1], places), cached=size < _FEW, capture=capture, **options,
    )  # fmt: skip
    if not cache.rolling:
        out = jnp.where(overflowed(after)[..., None, None], jnp.nan, out)
    return out, after, captured


def overflowed(state: Any) -> Array:
    """Whether more tokens were given than there is room for: the outputs of such rows are NaN from then on.

    It is one comparison, so it can be asked in every step, inside `jit` too:

        logits, state = language_model.extend(params, tokens, state, config)
        full = cache.overflowed(state)  # and outside: assert not full.any(), `checkify.check(~full.any(), "…")`

    Args:
      state: a Cache, or what holds some of one text: the caches of all layers, a `translator.State`.

    Returns:
      bool [] where all rows are alike, else [...], one for every row; never True for a rolling cache.

    Raises:
      TypeError: if there is no Cache in it.

    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> bool(overflowed(init((2,), 10, config)))
    False
    """
    is_cache = lambda node: isinstance(node, Cache)  # noqa: E731
    caches = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_cache) if is_cache(leaf)]
    if not caches:
        raise TypeError(f"cache.overflowed: state must hold a cache, got {arguments.kind_of(state)}.")
    first = caches[0]  # all layers have seen the same tokens
    return jnp.zeros(first.length.shape, bool) if first.rolling else first.length > first.capacity


def positions(cache: Cache, size: int, real: Array | None = None) -> Array:
    """Positions of the next `size` tokens: [t], or [..., t] where rows differ. Padding has that of the token before."""
    if real is None:
        return cache.length[..., None] + jnp.arange(size, dtype=jnp.int32)
    return cache.length[..., None] + jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1


def append(cache: Cache, new: KeysValues, real: Array | None = None) -> Cache:
    """The cache with t more tokens, for those who attend by themselves; `extend` does both.

    Args:
      cache: what was seen.
      new: keys [..., K, t, H] and values [..., K, t, Hv] of the next tokens, rotated.
      real: bool [..., t], False for padding; None: all are real.

    Raises:
      ValueError: if the tokens do not fit and the lengths are known. Under jit the new keys are then NaN.
    """
    size, capacity = new.k.shape[-2], cache.capacity
    if new.k.shape[:-2] != cache.k.shape[:-2]:
        raise ValueError(
            f"cache.append: the leading axes of the new tokens must be those of the cache, {cache.k.shape[:-3]} with "
            f"K={cache.k.shape[-3]}, got {new.k.shape[:-3]} with K={new.k.shape[-3]}; make it with "
            "cache.init(leading, …) of inputs [*leading, t, D], or cache.select rows of it."
        )
    _check_real(real, new)
    _check_room(cache, size, real)
    at = positions(cache, size, real)
    length = cache.length + (size if real is None else jnp.sum(real, axis=-1, dtype=jnp.int32))
    keep = jnp.ones((), bool) if real is None else real
    k, v = _sound(cache, new)
    if cache.rolling:
        keep = keep & (at >= length[..., None] - capacity)
        slots = at % capacity
    else:
        excess = jnp.maximum(length - capacity, 0)[..., None]
        slots = at - excess
        k = jnp.where((excess > 0)[..., None, :, None], jnp.nan, k)
    slots = jnp.where(keep, slots, capacity + jnp.arange(size))  # not written, and no two the same
    return Cache(_write(cache.k, k, slots), _write(cache.v, v, slots), length, cache.rolling)


def select(cache: Cache, rows: Array) -> Cache:
    """The cache of these rows of the batch, in this order; rows may repeat. For inputs [B, t, D].

    Raises:
      ValueError: for a row that is known not to be there. Under jit it is not known: be sure of them.
    """
    arguments.below("cache.select", "rows", rows, cache.k.shape[0], "rows of the cache")
    length = cache.length if cache.length.ndim == 0 else cache.length[rows]
    return Cache(cache.k[rows], cache.v[rows], length, cache.rolling)


def _write(store: Array, new: Array, slots: Array) -> Array:
    """The store [..., K, capacity, H] with new [..., K, t, H] in slots [t] or [..., t]; no slot twice.

    A scatter, token by token and head by head: XLA writes it in place. A `dynamic_update_slice` it would fuse with what
    reads the store, and copy the store for it.
    """
    heads = [grid[..., None] for grid in jnp.indices(store.shape[:-2], sparse=True)]
    return store.at[(*heads, slots[..., None, :])].set(new, mode="drop", unique_indices=True)


def _sound(cache: Cache, new: KeysValues) -> KeysValues:
    """What is written of new tokens: NaN for a key and 0 for a value where either is bad (`kernels.finite`)."""
    k, v = new.k.astype(cache.k.dtype), new.v.astype(cache.v.dtype)
    good = ~(finite.replace_rows(k, finite.limit(k))[1] | finite.replace_rows(v)[1])[..., None]
    return KeysValues(jnp.where(good, k, jnp.nan), jnp.where(good, v, 0))


def _with_chunk(cache: Cache, new: KeysValues, at: Array) -> tuple[KeysValues, Array]:
    """Keys and values of what was there before and of the chunk, and their positions, [..., capacity + t]."""
    join = lambda old, new: jnp.concatenate([old, new], axis=-2)  # noqa: E731
    old = jnp.asarray(cache.positions)
    leading = jnp.broadcast_shapes(old.shape[:-1], at.shape[:-1])
    places = [jnp.broadcast_to(a, (*leading, a.shape[-1])) for a in (old, at)]
    return jax.tree.map(join, KeysValues(cache.k, cache.v), _sound(cache, new)), jnp.concatenate(places, axis=-1)


def _check_room(cache: Cache, size: int, real: Array | None) -> None:
    """More tokens are known not to fit."""
    if cache.rolling:
        return
    known = not isinstance(cache.length, Tracer)
    counted = real is None or not isinstance(real, Tracer)
    count = size if real is None else np.sum(np.asarray(real), axis=-1) if counted else 0
    length = np.asarray(cache.length) if known else 0
    if np.any(length + count > cache.capacity):
        raise ValueError(
            f"cache.append: {np.max(count)} more tokens must fit, got a cache of capacity {cache.capacity} that holds "
            f"{np.max(length) if known else 'an unknown number'}; make it larger with cache.init(…, capacity, …), or "
            "rolling=True to keep the last ones."
        )


def _check_real(real: Array | None, new: KeysValues) -> None:
    """A boolean for every new token."""
    want = (*new.k.shape[:-3], new.k.shape[-2])
    if real is not None and (real.shape != want or real.dtype != bool):
        raise ValueError(f"cache.append: real must be bool [..., t] = {want}, got {real.dtype} {real.shape}.")


def _check_mask(mask: Mask | None, cache: Cache, bias: Any, real: Array | None) -> None:
    """A mask or a bias can be looked up by the slots of the cache."""
    if cache.rolling and (bias is not None or (mask is not None and mask.indexed()[1])):
        raise ValueError(
            f"cache.extend: with a rolling cache a mask must compare positions and a bias must be a score=, got "
            f"{f'bias {bias.shape}' if bias is not None else mask}; a token has no fixed index there."
        )
    if mask is not None and (cache.length.ndim or real is not None) and mask.indexed()[0]:
        raise ValueError(
            f"cache.extend: {mask} looks up queries by index, and needs rows that are at the same place, "
            f"got {'real=' if real is not None else f'lengths {cache.length.shape}'}; use masks that compare positions."
        )


def _check_patches(intervention: Intervention, cache: Cache) -> None:
    """Keys that a patch names one by one have fixed places."""
    if not cache.rolling:
        return
    axis_of_keys = {"keys": -2, "values": -2, "logits": -1, "weights": -1}
    for name, axis in axis_of_keys.items():
        patch = getattr(intervention, name)
        if patch is None:
            continue
        shape = np.shape(patch.value)
        if len(shape) >= -axis and shape[axis] > 1:
            raise ValueError(
                f"cache.extend: with a rolling cache a patch cannot name keys one by one, got intervention.{name} of "
                f"shape {shape}; share it (1 on the axis S), or use a cache that is not rolling."
            )
