"""PyTorch: matrices [out, in] with the heads side by side in the rows; queries, keys and values one below the other."""

from __future__ import annotations

from typing import Any

from mhajax.attention import Config, Params
from mhajax.convert import layout

WEIGHTS = {"in_proj_weight": "[3·D, D]", "out_proj.weight": "[D, D]"}
BIASES = {"in_proj_bias": "[3·D]", "out_proj.bias": "[D]"}
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def from_torch(module: Any, *, num_heads: int | None = None, prefix: str = "") -> tuple[Params, Config]:
    """Parameters of `torch.nn.MultiheadAttention`; `batch_first` makes no difference to them.

    Args:
      module: the module itself, or a state_dict, {"in_proj_weight", "in_proj_bias", "out_proj.weight",
        "out_proj.bias"}, of anything that NumPy can read (bfloat16 needs `.float()`); the state_dict of a whole model
        will do.
      num_heads: N, which the shapes do not tell; None: the module's own.
      prefix: what the names begin with, such as "encoder.layers.0.self_attn."; others are left alone.

    Returns:
      Our parameters, and their config.

    Raises:
      ValueError: for names that are missing or unknown, for a num_heads that is not the module's, and for what our
        attention does not have: `add_bias_kv`, `kdim`, `vdim`, `add_zero_attn` (of which a state_dict shows nothing).

    >>> import numpy as np
    >>> state = {"in_proj_weight": np.ones((48, 16)), "out_proj.weight": np.ones((16, 16))}
    >>> params, config = from_torch(state, num_heads=2)
    >>> params.w_q.shape, config
    ((2, 16, 8), Config(d_model=16, num_heads=2, num_kv_heads=None, head_dim=None, value_dim=None, use_bias=False))
    """
    who = "convert.from_torch"
    if getattr(module, "add_zero_attn", False):
        raise ValueError(
            f"{who}: add_zero_attn lets every query attend to a key and value of zeros, which attention.apply has not; "
            "a module without it is another attention."
        )
    state = module.state_dict() if hasattr(module, "state_dict") else module
    found = layout.under(who, layout.leaves(state), prefix)
    _refuse(who, found)
    (w_in, w_out), (b_in, b_out) = layout.read(who, found, WEIGHTS, BIASES)
    width = w_in.shape[1]
    if w_in.shape[0] != 3 * width:
        raise ValueError(f"{who}: in_proj_weight must be [3·D, D] = {(3 * width, width)}, got {w_in.shape}.")
    if b_in is not None and b_in.shape != (3 * width,):
        raise ValueError(f"{who}: in_proj_bias must be [3·D] = {(3 * width,)}, got {b_in.shape}.")
    weights = [*(w.T for w in w_in.reshape(3, width, width)), w_out.T]
    biases = [None] * 4 if b_in is None else [*b_in.reshape(3, width), b_out]
    return layout.from_matrices(who, weights, biases, layout.heads_of(who, module, num_heads))


def to_torch(params: Params, config: Config, *, prefix: str = "") -> dict[str, Any]:
    """Parameters for `torch.nn.MultiheadAttention(D, N, bias=…)`.

        state = convert.to_torch(params, config)
        module.load_state_dict({name: torch.tensor(np.asarray(array)) for name, array in state.items()})

    Args:
      params: our parameters.
      config: their config.
      prefix: what the names shall begin with.

    Returns:
      {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}, without biases if the config has none.

    Raises:
      ValueError: for num_kv_heads, value_dim and a head_dim other than D/N, which the layer does not have, and for
        params of another config.
    """
    who = "convert.to_torch"
    layout.refuse_groups(who, config)
    layout.refuse_value_dim(who, config)
    if config.width * config.num_heads != config.d_model:
        raise ValueError(
            f"{who}: the layer's heads are d_model/num_heads wide, got d_model={config.d_model}, "
            f"num_heads={config.num_heads} and head_dim={config.width}."
        )
    weights, biases = layout.to_matrices(layout.checked(who, params, config))
    state = {"in_proj_weight": layout.concatenate([w.T for w in weights[:3]]), "out_proj.weight": weights[3].T}
    if config.use_bias:
        state |= {"in_proj_bias": layout.concatenate(biases[:3]), "out_proj.bias": biases[3]}
    return {prefix + name: array for name, array in state.items()}


def _refuse(who: str, found: dict[str, Any]) -> None:
    """What a state_dict may hold, and our attention does not have."""
    extra = [name for name in ("bias_k", "bias_v") if name in found]
    if extra:
        raise ValueError(
            f"{who}: {', '.join(extra)} (add_bias_kv) is a learned key and value that every query may attend to, which "
            "attention.Params does not hold; a module without it is another attention."
        )
    separate = [name for name in SEPARATE if name in found]
    if separate:
        raise ValueError(
            f"{who}: {', '.join(f'{name} {tuple(found[name].shape)}' for name in separate)} in place of in_proj_weight "
            "are of a module whose kdim or vdim is not embed_dim; here x and memory have one width D = config.d_model."
        )
