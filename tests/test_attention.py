"""Attention: one definition, equal to the loops of reference.py and to its peers wherever those are right."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_cases import HV, SMALL, B, D, H, S, T, apply, apply_captured, booleans, close, random_params
from flax import linen, nnx
from reference import enable_x64, numbers
from tiers import tiered

from mhajax import attention, kernels, masks
from mhajax.attention import Config, Params


def case(leading=(B,), cross=False, **options: Any) -> dict[str, Any]:
    """A configuration, and what the library and the loops are given; grouped heads and biases unless it says so."""
    shape = {"num_heads": 6, "num_kv_heads": 3, "head_dim": H, "value_dim": HV, "use_bias": True}
    config = Config(d_model=D, **(shape | {name: options.pop(name) for name in list(options) if name in shape}))
    both = options.pop("both", {})
    return {
        "config": config, "leading": leading, "cross": cross,
        "ours": both | options.pop("ours", {}), "loops": both | options.pop("loops", {}),
    }  # fmt: skip


LENGTHS = np.array([5, 17, 0, 9])
LENGTHS_MASK = (np.arange(S) < LENGTHS[:, None])[:, None, None, :]
PAIRS, EXAMPLES, HEADS, ALL = (
    booleans(i, *shape) for i, shape in enumerate([(T, S), (B, T, S), (6, T, S), (B, 6, T, S)])
)
BIAS = numbers(40, 6, T, S)
HOLES = np.where(ALL, numbers(41, B, 6, T, S), -np.inf)
PLACES = np.random.default_rng(42).permuted(np.tile(np.arange(T), (B, 1)), axis=1)
MEMORY_PLACES = np.random.default_rng(43).permuted(np.tile(np.arange(S), (B, 1)), axis=1)

CASES = {
    "self": case(),
    "self, no batch": case(leading=()),
    "self, two leading axes": case(leading=(2, 4), ours={"mask": masks.causal()}, loops={"causal": True}),
    "one group, no biases": case(num_kv_heads=6, use_bias=False),
    "one key head": case(num_kv_heads=1, cross=True),
    "default widths": case(num_heads=1, num_kv_heads=None, head_dim=None, value_dim=None),
    "cross": case(cross=True),
    "causal": case(ours={"mask": masks.causal()}, loops={"causal": True}),
    "causal, T != S": case(cross=True, ours={"mask": masks.causal()}, loops={"causal": True}),
    "causal, positions": case(
        ours={"mask": masks.causal()}, both={"positions": PLACES}, loops={"causal": True, "memory_positions": PLACES}
    ),
    "causal, both positions": case(
        cross=True,
        both={"positions": PLACES, "memory_positions": MEMORY_PLACES},
        ours={"mask": masks.causal()},
        loops={"causal": True},
    ),
    "lengths": case(cross=True, ours={"mask": masks.lengths(LENGTHS)}, loops={"mask": LENGTHS_MASK}),
    "lengths and causal": case(
        cross=True,
        ours={"mask": masks.lengths(LENGTHS) & masks.causal()},
        loops={"mask": LENGTHS_MASK, "causal": True},
    ),
    "boolean [T, S]": case(cross=True, both={"mask": PAIRS}),
    "boolean [B, N, T, S]": case(cross=True, both={"mask": ALL}),
    "boolean [B, 1, 1, S]": case(cross=True, both={"mask": LENGTHS_MASK}),
    "per example": case(cross=True, ours={"mask": masks.per_example(EXAMPLES)}, loops={"mask": EXAMPLES[:, None]}),
    "per head": case(cross=True, ours={"mask": masks.per_head(HEADS)}, loops={"mask": HEADS}),
    "bias [1, N, T, S]": case(cross=True, both={"bias": BIAS[None]}),
    "bias [T, S] and mask": case(cross=True, both={"bias": BIAS[0], "mask": ALL}),
    "bias with -inf": case(cross=True, both={"bias": HOLES}),
    "bias with -inf and mask": case(
        cross=True, both={"bias": HOLES}, ours={"mask": masks.causal()}, loops={"causal": True}
    ),
    "gates [N]": case(cross=True, both={"gates": numbers(50, 6)}),
    "gates [B, N] and mask": case(cross=True, both={"gates": numbers(51, B, 6), "mask": ALL}),
}  # fmt: skip


def arrays_of(case: dict[str, Any], dtype: Any = np.float32) -> tuple[Params, np.ndarray, np.ndarray | None]:
    params = random_params(case["config"], dtype=dtype)
    x = numbers(10, *case["leading"], T, D, dtype=dtype)
    return params, x, numbers(11, *case["leading"], S, D, dtype=dtype) if case["cross"] else None


def loops(case: dict[str, Any], params: Params, x: np.ndarray, memory: np.ndarray | None) -> np.ndarray:
    flat = [None if a is None else a.reshape(-1, *a.shape[-2:]) for a in (x, memory)]
    return reference.multi_head_attention(params, *flat, **case["loops"]).reshape(x.shape)


ALWAYS = (
    "self", "self, two leading axes", "one group, no biases", "one key head", "causal, both positions",
    "lengths and causal", "boolean [B, N, T, S]", "per example", "bias with -inf and mask", "gates [B, N] and mask",
)  # fmt: skip


@pytest.mark.parametrize("name", tiered(CASES, *ALWAYS))
def test_equals_the_loops(name):
    case = CASES[name]
    params, x, memory = arrays_of(case)
    close(apply(params, x, case["config"], memory=memory, **case["ours"]), loops(case, params, x, memory), 3e-6)


OPTIMISED = ("causal, both positions", "bias with -inf and mask", "gates [B, N] and mask")


@pytest.mark.parametrize("name", tiered(CASES, *OPTIMISED))
def test_equals_the_loops_fully_optimised(name, full_compiles):
    case = CASES[name]
    params, x, memory = arrays_of(case)
    apply = full_compiles(partial(attention.apply, config=case["config"]))
    close(apply(params, x, memory=memory, **case["ours"]), loops(case, params, x, memory), 3e-6)


@pytest.mark.parametrize(
    "name",
    tiered(
        ["cross", "causal, both positions", "bias with -inf and mask", "gates [B, N] and mask"],
        "causal, both positions",
        "gates [B, N] and mask",
    ),
)
def test_equals_the_loops_in_64_bits_with_its_gradient(name):
    """Forward to 1e-12; the gradient of every input against central differences of the loops."""
    case = CASES[name]
    params, x, memory = arrays_of(case, np.float64)
    inputs = (params, x, memory)
    weight = numbers(20, *x.shape, dtype=np.float64)
    directions = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), inputs)
    with enable_x64():

        @partial(jax.value_and_grad, has_aux=True)
        def value_gradient(inputs):
            params, x, memory = inputs
            out = attention.apply(params, x, case["config"], memory=memory, **case["ours"])
            return jnp.sum(weight * out), out

        (_, out), gradient = jax.jit(value_gradient)(inputs)
        assert out.dtype == jnp.float64
    close(out, loops(case, *inputs), 1e-12)

    step = 1e-6
    difference = lambda sign: jax.tree.map(lambda a, d: a + sign * step * d, inputs, directions)  # noqa: E731
    up, down = (np.sum(weight * loops(case, *difference(sign))) for sign in (1, -1))
    gradient = jax.tree.map(np.asarray, gradient)
    along = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, directions)), strict=True))
    np.testing.assert_allclose(along, (up - down) / (2 * step), rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "dtype"),
    tiered(
        [
            ("self", jnp.bfloat16),
            ("self", jnp.float16),
            ("lengths and causal", jnp.bfloat16),
            ("lengths and causal", jnp.float16),
        ],
        ("self", jnp.float16),
        ("lengths and causal", jnp.bfloat16),
    ),
)
def test_half_precision_is_at_most_twice_as_wrong_as_the_naive_way(name, dtype):
    """The rule of the FlashAttention tests."""
    case = CASES[name]
    params, x, memory = jax.tree.map(lambda a: jnp.asarray(3 * a, dtype), arrays_of(case))
    mask = np.broadcast_to(case["loops"].get("mask", True), (B, 6, T, S if case["cross"] else T))
    if case["loops"].get("causal"):
        mask = mask & np.tri(*mask.shape[-2:], dtype=bool)

    @jax.jit
    def naive(params, x, memory):
        group = lambda w: jnp.repeat(w, 2, axis=0)  # noqa: E731
        heads = lambda y, w, b: jnp.einsum("bsd,ndh->bnsh", y, w) + b[:, None]  # noqa: E731
        memory = x if memory is None else memory
        q = heads(x, params.w_q, params.b_q)
        k, v = heads(memory, group(params.w_k), group(params.b_k)), heads(memory, group(params.w_v), group(params.b_v))
        logits = jnp.einsum("bnth,bnsh->bnts", q, k) * jnp.asarray(H**-0.5, dtype)
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e4))
        weights = jnp.where(mask.any(-1, keepdims=True), weights, 0)
        assert weights.dtype == dtype
        return jnp.einsum("bnth,nhd->btd", jnp.einsum("bnts,bnsh->bnth", weights, v), params.w_o) + params.b_o

    def error(out):
        assert out.dtype == dtype
        return np.max(np.abs(np.asarray(out, np.float64) - loops(case, *wide)))

    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, memory))
    ours = apply(params, x, case["config"], memory=memory, **case["ours"])
    assert error(ours) <= 2 * error(naive(params, x, memory)) + 1e-5


def test_half_precision_computes_logits_in_float32():
    params, x = jax.tree.map(jnp.bfloat16, (random_params(SMALL), numbers(1, 2, 5, 6)))
    _, seen = apply_captured(params, x, SMALL, capture=("logits", "weights", "queries"))
    assert seen["logits"].dtype == seen["weights"].dtype == jnp.float32
    assert seen["queries"].dtype == jnp.bfloat16


def test_the_output_has_the_dtype_of_x_whatever_the_memory_has():
    params, x, memory = random_params(SMALL), jnp.ones((2, 5, 6)), jnp.ones((2, 7, 6))
    for one, other in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        shape = jax.eval_shape(
            lambda x, memory: attention.apply(params, x, SMALL, memory=memory), x.astype(one), memory.astype(other)
        )
        assert shape.dtype == one


# Peers, for the same weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", tiered([False, True], True))
def test_equals_jax_nn(causal):
    q, k, v = numbers(0, B, 6, T, H), numbers(1, B, 3, S, H), numbers(2, B, 3, S, H)
    weight = numbers(3, B, 6, T, H)
    mask = masks.causal() if causal else None
    bias = numbers(4, 1, 6, T, S)

    def ours(q, k, v, bias):
        heads, _ = kernels.attend(q, k, v, mask=mask, bias=bias, queries=masks.tokens(T), keys=masks.tokens(S))
        return jnp.sum(weight * heads), heads

    def theirs(q, k, v, bias):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        heads = jax.nn.dot_product_attention(q, k, v, bias, is_causal=causal, implementation="xla")
        return jnp.sum(weight * jnp.swapaxes(heads, 1, 2)), jnp.swapaxes(heads, 1, 2)

    gradients = [jax.jit(jax.grad(f, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, bias) for f in (ours, theirs)]
    for got, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        close(got, expected, 5e-6)


def flax_linen(config, params, x, memory, mask):
    layer = linen.MultiHeadDotProductAttention(
        config.num_heads, qkv_features=config.num_heads * config.width, out_features=config.d_model
    )
    one = lambda w, b: {"kernel": jnp.moveaxis(w, 0, 1), "bias": b}  # noqa: E731
    tree = {
        "query": one(params.w_q, params.b_q), "key": one(params.w_k, params.b_k), "value": one(params.w_v, params.b_v),
        "out": {"kernel": params.w_o, "bias": params.b_o},
    }  # fmt: skip
    return layer.apply({"params": tree}, x, memory, mask=mask)


def flax_nnx(config, params, x, memory, mask):
    layer = nnx.MultiHeadAttention(
        config.num_heads, config.d_model, config.num_heads * config.width, decode=False, rngs=nnx.Rngs(0)
    )
    for name, weight, bias in (("query", params.w_q, params.b_q), ("key", params.w_k, params.b_k),
                               ("value", params.w_v, params.b_v)):  # fmt: skip
        linear = getattr(layer, name)
        linear.kernel, linear.bias = nnx.Param(jnp.moveaxis(weight, 0, 1)), nnx.Param(bias)
    layer.out.kernel, layer.out.bias = nnx.Param(params.w_o), nnx.Param(params.b_o)
    return layer(x, memory, mask=mask)


@pytest.mark.parametrize(
    ("peer", "tolerance"), tiered([(flax_linen, 1e-12), (flax_nnx, 1e-6)], (flax_linen, 1e-12))
)  # nnx rounds to float32
@pytest.mark.parametrize("masked", tiered([False, True], True))
def test_equals_flax_in_64_bits(peer, tolerance, masked):
    config = Config(d_model=D, num_heads=3, head_dim=H, use_bias=True)
    params = random_params(config, dtype=np.float64)
    x, memory, weight = (numbers(i, B, size, D, dtype=np.float64) for i, size in enumerate((T, S, T)))
    mask = booleans(4, B, 3, T, S) | (np.arange(S) == 2) if masked else None  # the peers fail where nothing is visible

    def ours(config, params, x, memory, mask):
        return attention.apply(params, x, config, memory=memory, mask=mask)

    def both(function):
        loss = lambda params, x, memory: jnp.sum(weight * function(config, params, x, memory, mask))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, x, memory)

    with enable_x64():
        got, expected = both(ours), both(peer)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(got))
    # All numbers at once: the gradient of b_k is 0, a sum of terms as large as the others.
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    close(flat(got), flat(expected), tolerance)
