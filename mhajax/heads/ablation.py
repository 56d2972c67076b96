"""Every head of a stack or a translator removed, one at a time, in one program in which removals share their work.

Removing head n of layer l leaves the layers below as they are, and the attention of layer l too, but for one summand:

    x + Σ_m head_m w_o[m]   becomes   x + Σ_m head_m w_o[m] - head_n w_o[n]

So the whole stack is run once, the contribution of a head is taken away, and only what comes after it is computed
again, for many heads of a layer at a time. That is exact, and half of the work of a whole run for every head. For any
other model, and without that saving: `importance.ablations`.

References:
  Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 3.2 (their table of removals).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import attention, block, embedding, masks, mlp, norm, transformer, translator
from mhajax.attention import KeysValues
from mhajax.masks import Mask


class _Stack(NamedTuple):
    """Layers with what they are given, the same for every layer but for its parameters and its memory."""

    layers: tuple[block.Params, KeysValues | None]  # every leaf [L, ...]
    config: transformer.Config
    own: dict[str, Any]  # mask, positions, rotate
    memory_mask: Mask | None


class _Sums(NamedTuple):
    """For the attention to x and to the memory: x after it [B, T, D], and the heads [B, N, T, Hv] that were added."""

    attention: tuple[Array, Array]
    cross: tuple[Array, Array] | None


def of_stack(
    params: transformer.Params,
    x: Array,
    config: transformer.Config,
    readout: Callable[[Array], Array],
    *,
    memory: Array | KeysValues | None = None,
    mask: Mask | None = None,
    memory_mask: Mask | None = None,
    positions: Array | None = None,
    rotate: Callable[[Array, Array], Array] | None = None,
    batch_size: int | None = None,
) -> block.Gates:
    """The losses without each head of a stack: an encoder, a decoder, the layers of a language model.

    Args:
      params, x, config: as in `transformer.run`; x is [B, T, D].
      readout: what the stack is for: from its output [B, T, D], after the last normalisation, to the loss of every
        sentence, [B], summed over tokens.
      memory, mask, memory_mask, positions, rotate: as in `transformer.run`.
      batch_size: heads of a layer that are computed together; None is all N. Memory grows with batch_size · B · T.

    Returns:
      `attention` [L, B, N], the loss of sentence b without head n of layer l, and `cross`, the same for the heads of
      the attention to the memory, or None. `importance.lost` makes them Tallies.

    Raises:
      ValueError: if x is not [B, T, D] or batch_size is below 1; else as `transformer.run`.

    >>> config = transformer.Config(d_model=8, num_heads=4, num_layers=3)
    >>> params = transformer.init_params(jax.random.key(0), config)
    >>> of_stack(params, jnp.ones((2, 5, 8)), config, lambda features: features.sum((1, 2))).attention.shape
    (3, 2, 4)
    """
    if x.ndim != 3:
        raise ValueError(f"ablation.of_stack: x must be [B, T, D={config.d_model}], got {x.shape}.")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"ablation.of_stack: batch_size must be at least 1, or None for all, got {batch_size}.")
    if memory is not None and not isinstance(memory, KeysValues):
        memory = transformer.keys_values(params, memory, config, masked=memory_mask is not None)
    own = {"mask": mask, "positions": positions, "rotate": rotate}
    stack = _Stack((params.layers, memory), config, own, memory_mask)
    _, sums = jax.lax.scan(partial(_layer, stack), x, stack.layers)

    def without(index: Array, across: bool, summed: Array, added: tuple[Array, Array]) -> Array:
        """The losses [B] without the head whose output `added[0]` [B, T, Hv] went through `added[1]` [Hv, D]."""
        head, w_o = added
        x = _rest_of_layer(stack, index, summed - head @ w_o.astype(head.dtype), across=not across)
        x = jax.lax.fori_loop(index + 1, config.num_layers, partial(_whole_layer, stack), x)
        return readout(norm.apply(params.norm, x))

    def of_layer(across: bool, layer: tuple[Array, tuple[Array, Array], Array]) -> Array:
        index, (summed, heads), w_o = layer
        each = (jnp.moveaxis(heads, -3, 0), w_o)  # heads [N, B, T, Hv]
        return jax.lax.map(partial(without, index, across, summed), each, batch_size=batch_size or config.num_heads)

    def of_part(across: bool, sums: tuple[Array, Array], w_o: Array) -> Array:
        losses = jax.lax.map(partial(of_layer, across), (jnp.arange(config.num_layers), sums, w_o))  # [L, N, B]
        return jnp.swapaxes(losses, -1, -2)

    found = of_part(False, sums.attention, params.layers.attention.w_o)
    if params.layers.cross is None or sums.cross is None:
        return block.Gates(found)
    return block.Gates(found, of_part(True, sums.cross, params.layers.cross.w_o))


def of_translator(
    params: translator.Params,
    source: Array,
    target: Array,
    config: translator.Config,
    readout: Callable[[Array], Array],
    *,
    source_lengths: ArrayLike | None = None,
    batch_size: int | None = None,
) -> translator.Gates:
    """The losses without each head of a translator: of the encoder, the decoder, and the attention between them.

    Args:
      params, source, target, config, source_lengths: as in `translator.apply`; source is [B, S], target [B, T].
      readout: from the features [B, T, D] of `translator.features` to the loss of every sentence, [B].
      batch_size: as in `of_stack`.

    Returns:
      [L, B, N] for each of the three kinds of attention.
    """
    real = None if source_lengths is None else masks.lengths(source_lengths)
    rotate = embedding.rotation(config.positions)
    places = [jnp.arange(tokens.shape[-1]) for tokens in (source, target)]
    words = [
        embedding.embed(params.embedding, tokens, place, config.positions)
        for tokens, place in zip((source, target), places, strict=True)
    ]
    reading: dict[str, Any] = {"mask": real, "positions": places[0], "rotate": rotate}
    writing: dict[str, Any] = {"mask": masks.causal(), "memory_mask": real, "positions": places[1], "rotate": rotate}
    memory = transformer.apply(params.encoder, words[0], config.encoder, **reading)

    def decoded(memory: Array) -> Array:
        return readout(transformer.apply(params.decoder, words[1], config.decoder, memory=memory, **writing))

    encoder = of_stack(params.encoder, words[0], config.encoder, decoded, batch_size=batch_size, **reading)
    decoder = of_stack(
        params.decoder, words[1], config.decoder, readout, memory=memory, batch_size=batch_size, **writing
    )
    return translator.Gates(encoder.attention, decoder.attention, decoder.cross)


def _layer(stack: _Stack, x: Array, layer: tuple[block.Params, KeysValues | None]) -> tuple[Array, _Sums]:
    params, memory = layer
    y, seen = attention.apply_captured(
        params.attention, norm.apply(params.attention_norm, x), stack.config, capture=("heads",), **stack.own
    )
    x = x + y
    sums, across = (x, seen["heads"]), None
    if memory is not None:
        x, heads = _across(stack, params, memory, x)
        across = (x, heads)
    return _feed_forward(stack, params, x), _Sums(sums, across)


def _rest_of_layer(stack: _Stack, index: Array, x: Array, *, across: bool) -> Array:
    """What follows the attention of a layer to x, `across` with the attention to the memory if it has one."""
    params, memory = _layer_at(stack, index)
    if across and memory is not None:
        x, _ = _across(stack, params, memory, x)
    return _feed_forward(stack, params, x)


def _whole_layer(stack: _Stack, index: Array, x: Array) -> Array:
    params, memory = _layer_at(stack, index)
    return block.apply(params, x, stack.config, memory=memory, memory_mask=stack.memory_mask, **stack.own)


def _across(stack: _Stack, params: block.Params, memory: KeysValues, x: Array) -> tuple[Array, Array]:
    assert params.cross is not None and params.cross_norm is not None, "transformer.keys_values has refused this"
    y, seen = attention.apply_to(
        params.cross, norm.apply(params.cross_norm, x), memory, stack.config, mask=stack.memory_mask, capture=("heads",)
    )
    return x + y, seen["heads"]


def _feed_forward(stack: _Stack, params: block.Params, x: Array) -> Array:
    return x + mlp.apply(params.mlp, norm.apply(params.mlp_norm, x), stack.config)


def _layer_at(stack: _Stack, index: Array) -> tuple[block.Params, KeysValues | None]:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], stack.layers)
