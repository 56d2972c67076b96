# pyright: reportMissingImports=false
"""The language model in torch, eager. Imports no JAX, so that its memory is torch's own; torch only when it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench import machine
from experiments.bench.models import EPSILON, LEARNING_RATE, WEIGHT_DECAY, Size


def stepper(size: Size, arrays: dict[str, np.ndarray]) -> Callable[[], float]:
    """A function that does a training step and returns its loss."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(machine.threads())
    layers, ends = parameters(size, arrays)
    everything = [*ends.values(), *(tensor for layer in layers for tensor in layer.values())]
    optimiser = torch.optim.AdamW(everything, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    tokens, positions = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["positions"])

    def step():
        x = functional.embedding(tokens[:, :-1], ends["embedding"]) * size.d_model**0.5 + positions
        for layer in layers:
            x = block(layer, x, size)
        logits = functional.linear(_norm(ends["scale"], ends["shift"], x), ends["embedding"])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return step


def writer(size: Size, arrays: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A function that writes tokens [B, T], the likeliest one after the other."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(machine.threads())
    layers, ends = parameters(size, arrays)
    positions, first = torch.from_numpy(arrays["positions"]), torch.from_numpy(arrays["tokens"][:, 0].copy())
    room = (size.layers, 2, size.batch, size.heads, size.length, size.width)

    def write():
        with torch.inference_mode():
            cache, token, tokens = torch.empty(room), first, []
            for place in range(size.length):
                x = functional.embedding(token[:, None], ends["embedding"]) * size.d_model**0.5 + positions[place]
                for layer, seen in zip(layers, cache, strict=True):
                    x = block(layer, x, size, seen, place)
                logits = functional.linear(_norm(ends["scale"], ends["shift"], x[:, 0]), ends["embedding"])
                token = logits.argmax(-1)
                tokens.append(token)
            return torch.stack(tokens, 1)

    return write


def parameters(size: Size, arrays: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Tensors of every layer, and those before and after them; matrices are (out, in)."""
    import torch

    d = size.d_model

    def trained(array: np.ndarray) -> Any:
        return torch.tensor(np.ascontiguousarray(array, np.float32), requires_grad=True)

    layers = []
    for number in range(size.layers):
        w = {name: arrays[name][number] for name in ("w_q", "w_k", "w_v", "w_o", "w_in", "w_out")}
        rows = np.concatenate([w[name].transpose(0, 2, 1).reshape(-1, d) for name in ("w_q", "w_k", "w_v")])
        layer = {
            "scale_1": np.ones(d), "shift_1": np.zeros(d), "qkv": rows, "o": w["w_o"].reshape(-1, d).T,
            "scale_2": np.ones(d), "shift_2": np.zeros(d),
            "w_in": w["w_in"].T, "b_in": np.zeros(4 * d), "w_out": w["w_out"].T, "b_out": np.zeros(d),
        }  # fmt: skip
        layers.append({name: trained(array) for name, array in layer.items()})
    ends = {"embedding": arrays["embedding"], "scale": np.ones(d), "shift": np.zeros(d)}
    return layers, {name: trained(array) for name, array in ends.items()}


def block(layer: dict[str, Any], x: Any, size: Size, seen: Any = None, place: int = 0) -> Any:
    """One layer, [B, T, D] to [B, T, D]; or of the one token at `place`, after the keys and values seen before."""
    from torch.nn import functional

    b, t, d = x.shape
    rows = functional.linear(_norm(layer["scale_1"], layer["shift_1"], x), layer["qkv"])
    q, k, v = rows.view(b, t, 3, size.heads, size.width).permute(2, 0, 3, 1, 4)
    if seen is not None:
        seen[0, :, :, place : place + 1], seen[1, :, :, place : place + 1] = k, v
        k, v = seen[:, :, :, : place + 1]
    heads = functional.scaled_dot_product_attention(q, k, v, is_causal=seen is None)
    x = x + functional.linear(heads.transpose(1, 2).reshape(b, t, d), layer["o"])
    hidden = functional.linear(_norm(layer["scale_2"], layer["shift_2"], x), layer["w_in"], layer["b_in"])
    return x + functional.linear(functional.gelu(hidden, approximate="tanh"), layer["w_out"], layer["b_out"])


def _norm(scale: Any, shift: Any, x: Any) -> Any:
    from torch.nn import functional

    return functional.layer_norm(x, scale.shape, scale, shift, EPSILON)
