"""Every head of a model removed, one at a time, in one program in which removals share their work.

Removing head n of layer l leaves the layers below as they are, and the attention of layer l too, but for one summand:

    y = Σ_m head_m w_o[m]   becomes   y - head_n w_o[n]

So the whole model is run once, the contribution of a head is taken away, and only what comes after it is computed
again, for many heads of a layer at a time. That is exact, and half of the work of a whole run for every head. For a
model without stages, and without that saving: `importance.ablations`.

References:
  Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 3.2 (their table of removals).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax import attention, block, norm, transformer
from mhajax.attention import KeysValues
from mhajax.attentions import PerAttention
from mhajax.transformer import Stage


class _Part(NamedTuple):
    """An attention of a layer: x before it, its output y, and the heads [B, N, T, Hv] that y is made of."""

    x: Array
    y: Array
    heads: Array


def of_stages(
    stages: Sequence[Stage], loss_fn: Callable[[Array], Array], *, batch_size: int | None = None
) -> PerAttention[Array]:
    """The losses without each head of a model.

    Args:
      stages: of the model on its inputs, such as `language_model.stages(params, tokens, config)`; x is [B, T, D].
      loss_fn: from the features [B, T, D] that the last stage gives to the loss of every sentence, [B], summed over
        tokens.
      batch_size: heads of a layer that are computed together; None is all N. Memory grows with batch_size · B · T.

    Returns:
      For every attention of the model [L, B, N], the loss of sentence b without head n of layer l. `importance.lost`
      makes them Tallies.

    Raises:
      ValueError: if x is not [B, T, D] or batch_size is below 1; else as `transformer.run`.

    >>> from mhajax import language_model
    >>> config = language_model.Config(d_model=8, num_heads=4, num_layers=3, vocab_size=11)
    >>> params = language_model.init_params(jax.random.key(0), config)
    >>> stages = language_model.stages(params, jnp.ones((2, 5), int), config)
    >>> of_stages(stages, lambda features: features.sum((1, 2))).attention.shape
    (3, 2, 4)
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"ablation.of_stages: batch_size must be at least 1, or None for all, got {batch_size}.")
    outputs: list[Array] = []
    passes = []
    for stage in stages:
        if stage.x.ndim != 3:
            raise ValueError(
                f"ablation.of_stages: x of a stage must be [B, T, D={stage.config.d_model}], got {stage.x.shape}."
            )
        one = _Pass(stage, outputs)
        x, parts = jax.lax.scan(one.layer, stage.x, one.layers)
        passes.append((one, parts))
        outputs.append(one.last(x))

    def loss(index: int, x: Array) -> Array:
        """Of every sentence, if stage `index` gives x."""
        given = [*outputs[:index], x]
        for stage in stages[index + 1 :]:
            given.append(transformer.run_stage(stage, given)[0])
        return loss_fn(given[-1])

    found = {}
    for index, (one, parts) in enumerate(passes):
        for name, part in parts.items():
            losses = one.without(name, part, partial(loss, index), batch_size or one.config.num_heads)
            found[one.stage.names[name]] = jnp.swapaxes(losses, -1, -2)
    return PerAttention(**found)


class _Pass:
    """A stage with its layers stacked, each with its memory, for loops that begin in the middle."""

    def __init__(self, stage: Stage, outputs: Sequence[Array]):
        self.stage, self.config = stage, stage.config
        options = dict(stage.options)
        self.memory_mask = options.pop("memory_mask", None)
        self.options = options
        memory = None
        if stage.reads is not None:
            masked = self.memory_mask is not None
            memory = transformer.keys_values(stage.params, outputs[stage.reads], self.config, masked=masked)
        self.layers: tuple[block.Params, KeysValues | None] = (stage.params.layers, memory)

    def layer(self, x: Array, layer: tuple[block.Params, KeysValues | None]) -> tuple[Array, dict[str, _Part]]:
        """A layer, and its attentions."""
        params, memory = layer
        given = block.before(params.attention_norm, x, self.config)
        y, seen = attention.apply_captured(params.attention, given, self.config, capture=("heads",), **self.options)
        parts = {"attention": _Part(x, y, seen["heads"])}
        residual, x = x, block.after(params.attention_norm, x, y, self.config)
        if memory is not None:
            part = self.across(params, memory, x)
            parts["cross"] = part
            residual, x = x, block.after(_given(params.cross_norm), x, part.y, self.config)
        return block.feed_forward(params, residual, x, self.config), parts

    def across(self, params: block.Params, memory: KeysValues, x: Array) -> _Part:
        y, seen = block.attend_across(params, x, memory, self.config, memory_mask=self.memory_mask, capture=("heads",))
        return _Part(x, y, seen["heads"])

    def rest(self, index: Array, name: str, x: Array, y: Array) -> Array:
        """What a layer gives, from x before one of its attentions and the output y of that."""
        params, memory = self.at(index)
        residual, x = x, block.after(getattr(params, f"{name}_norm"), x, y, self.config)
        if name == "attention" and memory is not None:
            y = self.across(params, memory, x).y
            residual, x = x, block.after(_given(params.cross_norm), x, y, self.config)
        return block.feed_forward(params, residual, x, self.config)

    def without(self, name: str, parts: _Part, loss: Callable[[Array], Array], batch_size: int) -> Array:
        """The losses [L, N, B] without each head of an attention."""

        def of_head(index: Array, x: Array, y: Array, removed: tuple[Array, Array]) -> Array:
            head, w_o = removed  # [B, T, Hv] and [Hv, D]
            x = self.rest(index, name, x, y - head @ w_o.astype(head.dtype))
            x = jax.lax.fori_loop(index + 1, self.config.num_layers, self.whole, x)
            return loss(self.last(x))

        def of_layer(layer: tuple[Array, _Part, Array]) -> Array:
            index, part, w_o = layer
            each = (jnp.moveaxis(part.heads, -3, 0), w_o)  # [N, B, T, Hv] and [N, Hv, D]
            return jax.lax.map(partial(of_head, index, part.x, part.y), each, batch_size=batch_size)

        w_o = block.attentions(self.stage.params.layers)[name].w_o
        return jax.lax.map(of_layer, (jnp.arange(self.config.num_layers), parts, w_o))

    def whole(self, index: Array, x: Array) -> Array:
        params, memory = self.at(index)
        return block.apply(params, x, self.config, memory=memory, memory_mask=self.memory_mask, **self.options)

    def last(self, x: Array) -> Array:
        """What the stage gives, from what its last layer gives."""
        final = self.stage.params.norm
        return x if final is None else norm.apply(final, x, self.config)

    def at(self, index: Array) -> tuple[block.Params, KeysValues | None]:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self.layers)


def _given(params: norm.Params | None) -> Any:
    assert params is not None, "transformer.keys_values has refused a stack without cross attention"
    return params
