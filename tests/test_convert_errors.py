"""Parameters of other libraries that cannot be converted, and what is said then."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from convert_layers import HV, MEMORY, SHAPE, SQUARE, D, H, N, X, equinox_module, nnx_module, torch_module, torch_state
from flax import linen as nn
from flax import nnx
from reference import random_params

from mhajax import attention, convert
from mhajax.attention import Config

pytestmark = pytest.mark.usefixtures("quick_compiles")


def linen_tree(**changes: Any) -> Any:
    config = Config(**SHAPE, use_bias=True)
    return {**convert.to_linen(random_params(attention.init_params, config), config), **changes}


def real_linen(**options: Any) -> Any:
    layer = nn.MultiHeadDotProductAttention(N, qkv_features=N * H, **options)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X, MEMORY)["params"]
    return jax.tree.map(lambda leaf: np.ones(leaf.shape), shapes)


def without(tree: Any, *names: str) -> Any:
    return {name: leaf for name, leaf in tree.items() if name not in names}


def of_config(back: Callable[..., Any], **sizes: Any) -> Any:
    config = Config(**{**SHAPE, **sizes})
    return back(random_params(attention.init_params, config), config)


def other_config() -> Any:
    return convert.to_linen(random_params(attention.init_params, SQUARE), Config(**SHAPE, use_bias=True))


def stacked_params() -> Any:
    params = random_params(attention.init_params, SQUARE)
    return convert.to_linen(params._replace(w_q=params.w_q[None]), SQUARE)


def matrices(**changes: Any) -> dict[str, Any]:
    shapes = {"query_proj": (N * H, D), "key_proj": (N * H, D), "value_proj": (N * HV, D), "output_proj": (D, N * HV)}
    return {name: {"weight": np.ones(shape)} for name, shape in shapes.items()} | changes


HAIKU = {f"net/attention/{name}": {"w": np.ones((N, N))} for name in ("query", "key", "value", "linear")}
BIAS = {"kernel": np.ones((D, N, H)), "bias": np.ones((N, H))}
BOX = {**BIAS, "kernel": nn.Partitioned(np.ones((D, N, H)), ("embed", "heads", None))}
HAIKU_NORM = {"net/attention/norm": {"scale": np.ones(3)}}
BIAS_OF_7 = {"weight": np.ones((N * H, D)), "bias": np.ones(7)}
TWO_ROWS = {"in_proj_weight": np.ones((2 * N, N)), "out_proj.weight": np.ones((N, N))}

# what is done: (the deed, kind of error, what its message must hold)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a projection is missing": (
        lambda: convert.from_linen(without(linen_tree(), "key")),
        ValueError,
        ("convert.from_linen", "query.kernel, key.kernel", "missing: key.bias, key.kernel;", "unknown: none"),
    ),
    "a name is unknown": (
        lambda: convert.from_linen({"attention": linen_tree()}),
        ValueError,
        ("missing: key.kernel, out.kernel", "unknown: attention.key.bias"),
    ),
    "one bias of four": (
        lambda: convert.from_linen({**of_config(convert.to_linen), "query": BIAS}),
        ValueError,
        ("all or none of query.bias, key.bias", "missing: key.bias, out.bias, value.bias;"),
    ),
    "nothing": (lambda: convert.from_linen({}), ValueError, ("got nothing",)),
    "linen normalises queries and keys": (
        lambda: convert.from_linen(real_linen(normalize_qk=True)),
        ValueError,
        ("key_ln.scale, query_ln.scale", "normalize_qk", "not part of attention.Params", "normalises queries and keys"),
    ),
    "nnx normalises queries and keys": (
        lambda: convert.from_nnx(nnx.state(nnx_module(normalize_qk=True), nnx.Param)),
        ValueError,
        ("convert.from_nnx", "key_ln.scale, query_ln.scale"),
    ),
    "nnx with more than parameters": (
        lambda: convert.from_nnx(nnx.state(nnx_module(dropout_rate=0.5))),
        ValueError,
        ("unknown: rngs.",),
    ),
    "another width comes out of linen": (
        lambda: convert.from_linen(real_linen(out_features=19)),
        ValueError,
        ("w_o must be [N, Hv, D] = (6, 5, 13)", "got (6, 5, 19)", "one width D"),
    ),
    "memory of another width in nnx": (
        lambda: convert.from_nnx(nnx.state(nnx_module(in_kv_features=19), nnx.Param)),
        ValueError,
        ("w_k must be [K, D, H] = (6, 13, 5)", "got (6, 19, 5)"),
    ),
    "memory of another width in equinox": (
        lambda: convert.from_equinox(equinox_module(key_size=19)),
        ValueError,
        ("convert.from_equinox", "w_k must be", "got (6, 19, 5)"),
    ),
    "layers stacked": (
        lambda: convert.from_linen(jax.tree.map(lambda a: a[None], linen_tree())),
        ValueError,
        ("query.kernel must be [D, N, H], got (1, 13, 6, 5)", "jax.vmap"),
    ),
    "params stacked": (stacked_params, ValueError, ("convert.to_linen", "w_q must be [N, D, H]", "jax.vmap")),
    "a box": (
        lambda: convert.from_linen(linen_tree(query=BOX)),
        TypeError,
        ("query.kernel must be an array", "Partitioned", "nn.meta.unbox"),
    ),
    "params of another config": (
        other_config,
        ValueError,
        ("convert.to_linen", "do not belong together", "'d_model': 30", "'d_model': 13"),
    ),
    "values of their own width to linen": (
        lambda: of_config(convert.to_linen, value_dim=HV),
        ValueError,
        ("convert.to_linen", "head_dim=5 and value_dim=7"),
    ),
    "values of their own width to nnx": (
        lambda: of_config(convert.to_nnx, value_dim=HV),
        ValueError,
        ("convert.to_nnx", "head_dim=5 and value_dim=7"),
    ),
    "values of their own width to torch": (
        lambda: of_config(convert.to_torch, d_model=N * H, value_dim=HV),
        ValueError,
        ("convert.to_torch", "head_dim=5 and value_dim=7"),
    ),
    "heads of any width to torch": (
        lambda: of_config(convert.to_torch, head_dim=3, d_model=N * H),
        ValueError,
        ("convert.to_torch", "d_model=30, num_heads=6 and head_dim=3"),
    ),
    "heads that do not divide": (
        lambda: convert.from_equinox(matrices(), num_heads=7),
        ValueError,
        ("num_heads must divide", "num_heads=7 and 30 in the query projection"),
    ),
    "no number of heads": (
        lambda: convert.from_equinox(matrices()),
        ValueError,
        ("convert.from_equinox", "num_heads must be given"),
    ),
    "another number of heads than the module's": (
        lambda: convert.from_torch(SimpleNamespace(num_heads=6, state_dict=torch_state), num_heads=3),
        ValueError,
        ("convert.from_torch", "that of the module, 6, got 3"),
    ),
    "a bias of another width": (
        lambda: convert.from_equinox(matrices(key_proj=BIAS_OF_7), num_heads=N),
        ValueError,
        ("the key projection's bias must be (30,), got (7,)",),
    ),
    "haiku under another name": (
        lambda: convert.from_haiku(HAIKU, num_heads=N),
        ValueError,
        ("convert.from_haiku", "'multi_head_attention/'", "net/attention/query/w"),
    ),
    "more below that name in haiku": (
        lambda: convert.from_haiku(HAIKU | HAIKU_NORM, num_heads=N, name="net/attention"),
        ValueError,
        ("unknown: norm/scale",),
    ),
    "torch rows that are not three": (
        lambda: convert.from_torch(TWO_ROWS, num_heads=N),
        ValueError,
        ("in_proj_weight must be [3·D, D] = (18, 6), got (12, 6)",),
    ),
    "torch bias that is not three": (
        lambda: convert.from_torch({**torch_state(), "in_proj_bias": np.ones(7)}, num_heads=N),
        ValueError,
        ("in_proj_bias must be [3·D] = (90,), got (7,)",),
    ),
    "torch, learned keys": (
        lambda: convert.from_torch({**torch_state(), "bias_k": np.ones(3), "bias_v": np.ones(3)}, num_heads=N),
        ValueError,
        ("bias_k, bias_v (add_bias_kv)", "attention.Params"),
    ),
    "torch, learned keys, real": (
        lambda: convert.from_torch(torch_module(add_bias_kv=True)),
        ValueError,
        ("bias_k, bias_v (add_bias_kv)",),
    ),
    "torch, a key of zeros": (
        lambda: convert.from_torch(torch_module(add_zero_attn=True)),
        ValueError,
        ("convert.from_torch", "add_zero_attn"),
    ),
    "torch, memory of another width": (
        lambda: convert.from_torch(torch_module(kdim=19)),
        ValueError,
        ("k_proj_weight (30, 19)", "kdim or vdim", "D = config.d_model"),
    ),
    "torch, bfloat16": (
        lambda: convert.from_torch(torch_module().bfloat16()),
        TypeError,
        ("convert.from_torch: in_proj_weight", "BFloat16"),
    ),
}


@pytest.mark.parametrize("deed, kind, said", ERRORS.values(), ids=ERRORS)
def test_errors_say_who_what_was_expected_and_what_came(deed, kind, said):
    with pytest.raises(kind) as caught:
        deed()
    assert [part for part in said if part not in str(caught.value)] == []
