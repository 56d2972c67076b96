"""Attention: one definition, equal to the loops of reference.py and to its peers wherever those are right."""

import inspect
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen, nnx
from reference import enable_x64, numbers
from tiers import tiered

from mhajax import attention, kernels, masks, positions
from mhajax.attention import Config, Params

B, T, S, D, H, HV = 4, 13, 17, 11, 5, 7
apply = jax.jit(attention.apply, static_argnames=("config", "rotate", "dropout_rate"))
apply_captured = jax.jit(attention.apply_captured, static_argnames=("config", "rotate", "dropout_rate", "capture"))
init_params = jax.jit(attention.init_params, static_argnums=1)

SMALL = Config(d_model=6, num_heads=3, num_kv_heads=1, head_dim=2, value_dim=5, use_bias=True)


def random_params(config: Config, seed: int = 0, dtype: Any = np.float32) -> Any:
    return reference.random_params(attention.init_params, config, seed, dtype)


def booleans(seed: int, *shape: int) -> Any:
    """About half True, with a row of queries that sees nothing."""
    array = np.random.default_rng(seed).random(shape) < 0.5
    array[..., 1, :] = False
    return array


def close(got: Any, expected: Any, tolerance: float) -> None:
    """Every number within the tolerance, relative to the largest expected one."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.all(np.isfinite(expected))
    np.testing.assert_array_less(np.abs(got - expected).max(initial=0), tolerance * np.abs(expected).max(initial=1))


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


# Masking ----------------------------------------------------------------------------------------------------------


def small(seed: int = 0, leading: Any = (2,), size: int = 5, memory: int | None = None) -> Any:
    """Parameters and inputs for SMALL."""
    x = numbers(seed + 1, *leading, size, 6)
    return random_params(SMALL, seed), x, None if memory is None else numbers(seed + 2, *leading, memory, 6)


@pytest.mark.parametrize("rotate", tiered([None, positions.rotary], positions.rotary))
def test_causal_by_gradient(rotate):
    params, x, _ = small(leading=())
    out = lambda x: attention.apply(params, x, SMALL, mask=masks.causal(), rotate=rotate)  # noqa: E731
    jacobian = np.abs(jax.jit(jax.jacrev(out))(x)).max(axis=(1, 3))  # [T, T]: of output t with respect to input s
    future = np.triu(np.ones((5, 5), bool), 1)
    assert np.all(jacobian[future] == 0) and np.all(jacobian[~future] > 1e-4)


@pytest.mark.parametrize("bias_instead", [False, True])
def test_a_query_with_nothing_to_attend_to(bias_instead):
    """Exact zeros (plus b_o), zero weights, zero gradients."""
    params, x, memory = small(memory=7)
    mask: Any = np.ones((2, 1, 5, 7), bool)
    mask[0] = False  # a whole example
    mask[1, :, 3] = False  # one query
    nothing = ~np.any(mask, axis=-1)[:, 0]
    options: Any = {"bias": np.where(mask, 0.0, -np.inf)} if bias_instead else {"mask": mask}

    def loss(params, x, memory):
        out, seen = attention.apply_captured(
            params, x, SMALL, memory=memory, capture=("weights", "heads", "contributions"), **options
        )
        return jnp.sum(jnp.where(nothing[..., None], out, 0) ** 2), (out, seen)

    (gradient, x_gradient, memory_gradient), (out, seen) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(
        params, x, memory
    )
    np.testing.assert_array_equal(out[nothing], np.broadcast_to(params.b_o, out[nothing].shape))
    for name in ("weights", "heads", "contributions"):
        rows = np.moveaxis(seen[name], 1, 2)[nothing]
        assert np.all(rows == 0), name
    assert np.all(np.isfinite(out))
    zero = jax.tree.map(lambda g: np.all(np.asarray(g) == 0), gradient._replace(b_o=np.zeros(1)))
    assert all(jax.tree.leaves(zero)), zero
    assert np.all(np.asarray(x_gradient) == 0) and np.all(np.asarray(memory_gradient) == 0)


def test_without_biases_such_a_query_gives_zeros():
    config = Config(d_model=6, num_heads=3)
    out = apply(random_params(config), numbers(1, 2, 5, 6), config, mask=masks.lengths(np.array([0, 3])))
    assert np.all(out[0] == 0) and np.all(out[1] != 0)


SPOILS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("spoil", tiered(SPOILS, "nan"))
@pytest.mark.parametrize("how", ["mask", "bias", "gates"])
def test_what_is_not_finite_in_a_masked_memory_reaches_nothing(spoil, how):
    params, x, memory = small(memory=7)
    spoilt = memory.copy()
    spoilt[0, 4:] = SPOILS[spoil]
    spoilt[1, 6, 2] = SPOILS[spoil]
    lengths = np.array([4, 6])
    visible = np.arange(7) < lengths[:, None, None, None]
    options = {"bias": np.where(visible, 0.5, -np.inf)} if how == "bias" else {"mask": masks.lengths(lengths)}
    if how == "gates":
        options["gates"] = numbers(9, 2, 3)

    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, x, memory):
        out = attention.apply(params, x, SMALL, memory=memory, **options)
        return jnp.sum(out**2), out

    loss = jax.jit(loss)
    (value, out), gradient = loss(params, x, spoilt)
    (sound_value, sound_out), sound_gradient = loss(params, x, np.where(np.isfinite(spoilt), memory, 0))
    chex.assert_tree_all_finite((value, out, gradient))
    chex.assert_trees_all_equal((value, out, gradient), (sound_value, sound_out, sound_gradient))


@pytest.mark.parametrize("spoil", tiered(SPOILS, "inf"))
def test_what_is_not_finite_in_the_future_reaches_nothing(spoil):
    """Neither earlier rows, nor the gradient of anything if the loss ignores the spoilt rows."""
    params, x, _ = small()
    spoilt = x.copy()
    spoilt[:, 3] = SPOILS[spoil]
    gates = numbers(9, 2, 3)

    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, x, gates):
        out = attention.apply(params, x, SMALL, mask=masks.causal(), gates=gates)
        return jnp.sum(out[:, :3] ** 2), out

    loss = jax.jit(loss)
    gradient, out = loss(params, spoilt, gates)
    sound_gradient, sound_out = loss(params, x, gates)
    np.testing.assert_array_equal(out[:, :3], sound_out[:, :3])
    assert np.all(np.isnan(out[:, 3:]))  # those who see it, and the token itself
    chex.assert_tree_all_finite(gradient)
    chex.assert_trees_all_close(gradient, sound_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", tiered([False, True], True))
def test_what_is_not_finite_and_visible_is_not_hidden(masked):
    params, x, memory = small(memory=7)
    memory[0, 2] = np.nan
    mask = masks.lengths(3) if masked else None
    out, seen = apply_captured(params, x, SMALL, memory=memory, mask=mask, capture=attention.CAPTURES)
    assert np.all(np.isnan(out[0])) and np.all(np.isfinite(out[1]))
    for name in ("weights", "heads", "contributions"):
        assert np.all(np.isnan(seen[name][0])) and np.all(np.isfinite(seen[name][1])), name
    assert np.all(np.isnan(seen["logits"][0, :, :, 2])) and not np.any(np.isnan(seen["logits"][1]))

    memory = np.where(np.isnan(memory), 0, memory)
    x[1, 4] = np.inf
    out = np.asarray(apply(params, x, SMALL, memory=memory, mask=mask))
    assert np.all(np.isnan(out[1, 4])) and np.all(np.isfinite(out[0])) and np.all(np.isfinite(out[1, :4]))


@pytest.mark.slow
def test_keys_and_values_given_directly_are_kept_apart_too():
    """A cache's empty slots may hold anything; and NaN of only the keys or only the values is NaN where it is seen."""
    params, x, memory = small(memory=7)
    answers = attention.keys_values(params, memory, SMALL)
    apply_to = jax.jit(partial(attention.apply_to, config=SMALL))
    expected, _ = apply_to(params, x, answers, mask=masks.lengths(4))
    for name in ("k", "v"):
        spoilt = answers._replace(**{name: getattr(answers, name).at[..., 4:, :].set(jnp.nan)})
        out, _ = apply_to(params, x, spoilt, mask=masks.lengths(4))
        np.testing.assert_array_equal(out, expected)
        out, _ = apply_to(params, x, spoilt, mask=masks.lengths(5))
        assert np.all(np.isnan(out))


def test_nan_in_a_bias_is_not_a_mask():
    params, x, _ = small()
    bias = np.zeros((5, 5), np.float32)
    bias[2, 1] = np.nan
    out = np.asarray(apply(params, x, SMALL, bias=bias))
    assert np.all(np.isnan(out[:, 2])) and np.all(np.isfinite(np.delete(out, 2, axis=1)))
    hidden = apply(params, x, SMALL, bias=bias, mask=~np.isnan(bias))
    assert np.all(np.isfinite(hidden))


# What is refused --------------------------------------------------------------------------------------------------


def call(x=(2, 5, 6), config=SMALL, params=None, memory=None, captured=False, **options):
    """Trace attention of zeros; nothing is computed."""
    zeros = lambda a: jnp.zeros(a) if isinstance(a, tuple) else a  # noqa: E731
    params = (
        jax.eval_shape(partial(attention.init_params, config=SMALL), jax.random.key(0)) if params is None else params
    )
    function = attention.apply_captured if captured else attention.apply
    evaluate = lambda params, x, memory: function(params, x, config, memory=memory, **options)  # noqa: E731
    return jax.eval_shape(evaluate, params, zeros(x), zeros(memory))


def params_with(**shapes):
    params = jax.eval_shape(partial(attention.init_params, config=SMALL), jax.random.key(0))
    return params._replace(**{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})


ODD = Config(d_model=6, num_heads=2)

# what is done: (kind of error, what its message must hold)
ERRORS = {
    "width of x": (
        lambda: call((2, 5, 7)),
        ValueError,
        ("attention.apply: x must be", "[..., T, D=6]", "(2, 5, 7)", "config.d_model"),
    ),
    "axes of x": (lambda: call((6,)), ValueError, ("x must be [..., T, D=6]", "(6,)")),
    "tokens as x": (lambda: call(jnp.zeros((2, 6), int)), TypeError, ("x must be floating point", "int32", "embed")),
    "width of memory": (
        lambda: call(memory=(2, 7, 5)),
        ValueError,
        ("memory must be [..., S, D=6]", "(2, 7, 5)", "config.d_model"),
    ),
    "leading axes of memory": (
        lambda: call(memory=(7, 6)),
        ValueError,
        ("memory must have the leading axes of x, (2,), got ()", "(2, 5, 6)", "(7, 6)", "broadcast_to"),
    ),
    "w_q": (
        lambda: call(params=params_with(w_q=(2, 6, 2))),
        ValueError,
        ("params.w_q must be [N, D, H] = (3, 6, 2)", "(2, 6, 2)", "do not belong together"),
    ),
    "w_k": (lambda: call(params=params_with(w_k=(3, 6, 2))), ValueError, ("params.w_k", "[K, D, H] = (1, 6, 2)")),
    "w_v": (lambda: call(params=params_with(w_v=(1, 6, 2))), ValueError, ("params.w_v", "[K, D, Hv] = (1, 6, 5)")),
    "w_o": (
        lambda: call(params=params_with(w_o=(3, 2, 6))),
        ValueError,
        ("params.w_o must be [N, Hv, D] = (3, 5, 6)",),
    ),
    "gates": (
        lambda: call(gates=jnp.ones(2)),
        ValueError,
        ("gates must be [N] = (3,) or [..., N] = (2, 3)", "got (2,)"),
    ),
    "gates of another batch": (lambda: call(gates=jnp.ones((3, 3))), ValueError, ("[..., N] = (2, 3)", "got (3, 3)")),
    "dropout without key": (
        lambda: call(dropout_rate=0.25),
        ValueError,
        ("dropout_rate=0.25 needs dropout_key", "for evaluation leave dropout_rate out"),
    ),
    "dropout rate": (
        lambda: call(dropout_rate=1.0, dropout_key=jax.random.key(0)),
        ValueError,
        ("attention.apply: dropout_rate must be in [0, 1), got 1.0",),
    ),
    "capture": (
        lambda: call(captured=True, capture=("weights", "probabilities")),
        ValueError,
        ("attention.apply_captured: capture", *attention.CAPTURES, "got ['probabilities']"),
    ),
    "unknown option": (lambda: call(masks=None), TypeError, ("attention.apply: there is no option 'masks'", "'mask'")),
    "mask per example or per head": (
        lambda: call((3, 5, 6), mask=np.ones((3, 5, 5), bool)),  # B = N: other libraries take it for per head
        ValueError,
        ("[T, S] or [B, N, T, S]", "(3, 5, 5)", "masks.per_example(array)", "masks.per_head(array)"),
    ),
    "mask of numbers": (
        lambda: call(mask=np.ones((5, 5), int)),
        TypeError,
        ("boolean", "True = may attend", "int", "bias="),
    ),
    "mask of floats": (lambda: call(mask=np.zeros((5, 5))), TypeError, ("boolean", "float")),
    "mask too small": (lambda: call(mask=np.ones((4, 5), bool)), ValueError, ("T=5 queries", "written out for 4")),
    "mask of another batch": (
        lambda: call(mask=np.ones((3, 1, 5, 5), bool)),
        ValueError,
        ("mask must broadcast to [..., N, T, S] = (2, 3, 5, 5)", "got (3, 1, 5, 5)", "use 1"),
    ),
    "mask with a batch for x without": (
        lambda: call((5, 6), mask=np.ones((1, 1, 5, 5), bool)),
        ValueError,
        ("[..., N, T, S] = (3, 5, 5)", "got (1, 1, 5, 5)"),
    ),
    "lengths of another batch": (
        lambda: call(mask=masks.lengths(np.array([1, 2, 3]))),
        ValueError,
        ("[..., N, T, S] = (2, 3, 5, 5)", "got (3, 1, 1, 5)"),
    ),
    "bias of another batch": (
        lambda: call(bias=jnp.zeros((4, 1, 5, 5))),
        ValueError,
        ("bias must broadcast to [..., N, T, S] = (2, 3, 5, 5)", "got (4, 1, 5, 5)", "use 1"),
    ),
    "bias per example or per head": (
        lambda: call((3, 5, 6), bias=jnp.zeros((3, 5, 5))),
        ValueError,
        ("bias must be [T, S] or have 4 axes", "(3, 5, 5)", "bias[None]", "bias[:, None]"),
    ),
    "bias of booleans": (lambda: call(bias=jnp.ones((5, 5), bool)), TypeError, ("bias", "bool", "mask=")),
    "positions of another length": (
        lambda: call(positions=jnp.arange(4)),
        ValueError,
        ("positions must be (5,) or (2, 5)", "got (4,)"),
    ),
    "one position": (lambda: call(positions=jnp.zeros(1, int)), ValueError, ("positions", "got (1,)")),
    "positions of the memory": (
        lambda: call(memory=(2, 7, 6), memory_positions=jnp.arange(5)),
        ValueError,
        ("memory_positions must be (7,) or (2, 7)", "got (5,)"),
    ),
    "no memory": (lambda: call(memory=(2, 0, 6)), ValueError, ("memory", "at least one token", "S=0")),
    "mask too large": (lambda: call(mask=np.ones((7, 5), bool)), ValueError, ("T=5 queries", "7", "cut")),
    "mask of too many keys": (lambda: call(mask=np.ones((1, 7), bool)), ValueError, ("S=5 keys", "7")),
    "masks that do not fit": (
        lambda: call(mask=masks.segments(np.zeros(5, int)) & masks.dense(np.ones((4, 5), bool))),
        ValueError,
        ("the same tokens", "T=5", "4"),
    ),
    "b_q": (lambda: call(params=params_with(b_q=(2, 2))), ValueError, ("b_q", "[N, H] = (3, 2)", "(2, 2)")),
    "biases that are not there": (
        lambda: call(params=params_with()._replace(b_o=None)),
        ValueError,
        ("params.b_o must be [D] = (6,)", "None"),
    ),
    "capture as one word": (lambda: call(captured=True, capture="weights"), TypeError, ("tuple", "('weights',)")),
    "odd heads, rotated": (
        lambda: call(config=ODD, params=random_params(ODD), rotate=positions.rotary),
        ValueError,
        ("H=3", "head_dim"),
    ),
    "no heads": (lambda: Config(d_model=6, num_heads=0), ValueError, ("num_heads must be at least 1, got 0",)),
    "negative width": (lambda: Config(d_model=6, num_heads=2, head_dim=-1), ValueError, ("head_dim", "-1")),
    "groups that do not divide": (
        lambda: Config(d_model=12, num_heads=6, num_kv_heads=4),
        ValueError,
        ("multiple of num_kv_heads", "num_heads=6", "num_kv_heads=4"),
    ),
    "heads that do not divide": (
        lambda: Config(d_model=10, num_heads=4),
        ValueError,
        ("d_model must be a multiple of num_heads", "d_model=10", "num_heads=4", "or give head_dim"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, kind, parts = ERRORS[name]
    with pytest.raises(kind) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("mask", [np.ones((7, 7), bool), masks.segments(np.zeros(9, int))])
def test_a_mask_made_for_more_tokens_is_refused(mask):
    with pytest.raises(ValueError):
        call(mask=mask)


def test_every_option_is_documented():
    text = inspect.getdoc(attention.apply) or ""  # without indentation, on every Python
    assert [name for name in inspect.signature(attention.apply).parameters if f"\n  {name}:" not in text] == []


# Looking inside ---------------------------------------------------------------------------------------------------

FULL = {"mask": masks.lengths(np.array([7, 4])) & masks.causal(), "bias": numbers(30, 1, 3, 5, 7)}


LOOKS = [(False, jnp.float32), (True, jnp.float32), (True, jnp.bfloat16)]


@pytest.mark.parametrize(("jit", "dtype"), tiered(LOOKS, (True, jnp.float32)))
def test_looking_changes_no_bit_of_the_output(jit, dtype, full_compiles):
    params, x, memory = jax.tree.map(lambda a: jnp.asarray(a, dtype), small(memory=7))
    options = FULL | {"gates": numbers(31, 2, 3), "dropout_rate": 0.3, "dropout_key": jax.random.key(3)}
    plain, looking = attention.apply, attention.apply_captured
    if jit:
        plain = full_compiles(plain, static_argnames=("config", "dropout_rate"))
        looking = full_compiles(looking, static_argnames=("config", "dropout_rate", "capture"))
    expected = plain(params, x, SMALL, memory=memory, **options)
    for capture in (attention.CAPTURES, ("weights",))[: 1 + jit]:
        out, seen = looking(params, x, SMALL, memory=memory, capture=capture, **options)
        np.testing.assert_array_equal(out, expected)
        assert set(seen) == set(capture)


def test_what_is_seen_is_what_it_is_called():
    params, x, memory = small(memory=7)
    gates = numbers(31, 2, 3)
    out, seen = apply_captured(params, x, SMALL, memory=memory, gates=gates, capture=attention.CAPTURES, **FULL)
    chex.assert_shape(
        [seen[name] for name in attention.CAPTURES],
        [
            (2, 3, 5, 2),
            (2, 1, 7, 2),
            (2, 1, 7, 5),
            (2, 3, 5, 7),
            (2, 3, 5, 7),
            (2, 3, 5),
            (2, 3, 5),
            (2, 3, 7),
            (2, 3, 5, 5),
            (2, 3, 5, 6),
        ],  # fmt: skip
    )
    allowed = (np.arange(7) < np.array([7, 4])[:, None, None, None]) & np.tri(5, 7, dtype=bool)
    queries = np.einsum("btd,ndh->bnth", x, params.w_q) + params.b_q[:, None]
    keys = np.einsum("bsd,ndh->bnsh", memory, params.w_k) + params.b_k[:, None]
    values = np.einsum("bsd,ndh->bnsh", memory, params.w_v) + params.b_v[:, None]
    logits = np.where(allowed, np.einsum("bnth,bmsh->bnts", queries, keys) / np.sqrt(2) + FULL["bias"], -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bmsh->bnth", weights, values) * gates[..., None, None]
    for name, expected in {
        "queries": queries,
        "keys": keys,
        "values": values,
        "weights": weights,
        "heads": heads,
    }.items():
        close(seen[name], expected, 3e-6)
    close(seen["log_sum_exp"], np.log(np.sum(np.exp(logits), -1)), 3e-6)
    np.testing.assert_array_equal(np.isneginf(seen["logits"]), ~np.broadcast_to(allowed, logits.shape))
    close(np.where(allowed, seen["logits"], 0), np.where(allowed, logits, 0), 3e-6)
    np.testing.assert_allclose(np.sum(seen["weights"], -1), 1, rtol=1e-6)
    assert np.all(np.asarray(seen["weights"])[~np.broadcast_to(allowed, logits.shape)] == 0)
    close(np.sum(seen["contributions"], axis=1) + params.b_o, out, 3e-6)
    close(seen["contributions"], np.einsum("bnth,nhd->bntd", heads, params.w_o), 3e-6)


@pytest.mark.slow
def test_weights_are_seen_before_dropout_and_queries_after_rotation():
    params, x, _ = small()
    look = partial(apply_captured, params, x, SMALL, capture=("weights", "queries", "keys"))
    plain, dropped = look()[1], look(dropout_rate=0.5, dropout_key=jax.random.key(0))[1]
    np.testing.assert_array_equal(plain["weights"], dropped["weights"])
    turned = look(rotate=positions.rotary)[1]
    for name in ("queries", "keys"):
        close(turned[name], positions.rotary(plain[name], jnp.arange(5)), 3e-6)


# What is not asked for costs nothing ------------------------------------------------------------------------------


def lowered(**options):
    params, x, _ = small()

    def function(params, x):
        return attention.apply(params, x, SMALL, **options)

    return jax.jit(function).lower(params, x).as_text()


@pytest.mark.parametrize(
    "options",
    [
        {"gates": None},
        {"mask": None},
        {"bias": None, "rotate": None, "positions": None, "memory_positions": None},
        {"dropout_rate": 0.0, "dropout_key": jax.random.key(0)},
        {"dropout_key": None},
        {"positions": jnp.arange(5) + 3},  # nobody looks at them
    ],
    ids=lambda options: ", ".join(options),
)
def test_what_is_not_asked_for_leaves_no_trace(options):
    assert lowered(**options) == lowered()


def test_capturing_nothing_leaves_no_trace_and_something_does():
    params, x, _ = small()

    def function(params, x):
        return attention.apply_captured(params, x, SMALL, capture=())[0]

    assert jax.jit(function).lower(params, x).as_text() == lowered()
    assert lowered(gates=np.ones(3, np.float32)) != lowered() != lowered(mask=masks.causal())


# Heads are slices -------------------------------------------------------------------------------------------------

PAIR_CONFIG = Config(d_model=6, num_heads=3, head_dim=2, value_dim=5, use_bias=True)


def take_heads(params: Params, heads: list[int]) -> Params:
    """These heads, in this order (of as many key heads as query heads)."""
    chosen = jax.tree.map(lambda w: w[jnp.array(heads)], params._replace(b_o=None))
    return chosen._replace(b_o=params.b_o)


@pytest.mark.slow
def test_a_gate_of_zero_is_a_head_less():
    params, x = random_params(PAIR_CONFIG), numbers(1, 2, 5, 6)
    pruned = Config(d_model=6, num_heads=2, head_dim=2, value_dim=5, use_bias=True)
    out = apply(params, x, PAIR_CONFIG, gates=np.array([1.0, 0.0, 1.0]), mask=masks.causal())
    close(out, apply(take_heads(params, [0, 2]), x, pruned, mask=masks.causal()), 1e-6)
    np.testing.assert_array_equal(
        apply(params, x, PAIR_CONFIG, gates=np.ones(3, np.float32)), apply(params, x, PAIR_CONFIG)
    )


def test_the_gradient_of_a_gate_is_what_the_head_contributes():
    params, x, weight = random_params(PAIR_CONFIG), numbers(1, 2, 5, 6), numbers(2, 2, 5, 6)

    @jax.jit
    @jax.grad
    def gradient(gates):
        return jnp.sum(weight * attention.apply(params, x, PAIR_CONFIG, gates=gates))

    _, seen = apply_captured(params, x, PAIR_CONFIG, capture=("contributions",))
    expected = np.einsum("bntd,btd->bn", seen["contributions"], weight)
    close(gradient(np.full((2, 3), 0.7, np.float32)), expected, 1e-5)  # linear in the gates: the same everywhere
    close(gradient(np.zeros(3, np.float32)), expected.sum(0), 1e-5)


def test_the_order_of_heads_does_not_matter():
    params, x = random_params(PAIR_CONFIG), numbers(1, 2, 5, 6)
    out, seen = apply_captured(params, x, PAIR_CONFIG, mask=masks.causal())
    turned, turned_seen = apply_captured(take_heads(params, [2, 0, 1]), x, PAIR_CONFIG, mask=masks.causal())
    close(turned, out, 1e-6)
    close(turned_seen["weights"], seen["weights"][:, jnp.array([2, 0, 1])], 1e-6)


@pytest.mark.slow
def test_heads_start_different_and_with_the_right_variance():
    config = Config(d_model=101, num_heads=6, num_kv_heads=3, head_dim=31, value_dim=37, use_bias=True)
    params = init_params(jax.random.key(1), config)
    shapes = [(6, 101, 31), (3, 101, 31), (3, 101, 37), (6, 37, 101), (6, 31), (3, 31), (3, 37), (101,)]
    assert [array.shape for array in params] == shapes
    fan_in = {"w_q": 101, "w_k": 101, "w_v": 101, "w_o": 6 * 37}
    for name, size in fan_in.items():
        weights = np.asarray(getattr(params, name))
        np.testing.assert_allclose(weights.std(), size**-0.5, rtol=4 / np.sqrt(2 * weights.size))
        heads = weights.reshape(len(weights), -1)
        assert np.max(np.abs(np.corrcoef(heads) - np.eye(len(heads)))) < 5 / np.sqrt(heads.shape[1])
    assert all(np.all(np.asarray(getattr(params, name)) == 0) for name in ("b_q", "b_k", "b_v", "b_o"))
    again, other = init_params(jax.random.key(1), config), init_params(jax.random.key(2), config)
    chex.assert_trees_all_equal(params, again)
    assert np.all(params.w_q != other.w_q)


# JAX's transformations --------------------------------------------------------------------------------------------


def test_several_seeds_are_one_vmap():
    x = numbers(1, 2, 5, 6)
    alone = [random_params(SMALL, seed) for seed in range(3)]
    many = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    together = jax.jit(jax.vmap(lambda params: attention.apply(params, x, SMALL, mask=masks.causal())))(many)
    for params, out in zip(alone, together, strict=True):
        close(out, apply(params, x, SMALL, mask=masks.causal()), 1e-6)


@pytest.mark.parametrize(
    "mask",
    [
        masks.lengths(np.array([7, 0, 4, 2])),
        masks.dense(booleans(3, 4, 3, 5, 7)),
        masks.per_example(booleans(4, 4, 5, 7)) & masks.lengths(np.array([7, 0, 4, 2])),
    ],
    ids=["lengths", "dense", "both"],
)
def test_a_vmap_over_the_batch_is_the_batch(mask):
    params, x, memory = small(leading=(4,), memory=7)
    one = lambda x, memory, mask: attention.apply(params, x, SMALL, memory=memory, mask=mask)  # noqa: E731
    close(jax.jit(jax.vmap(one))(x, memory, mask), apply(params, x, SMALL, memory=memory, mask=mask), 1e-6)


def test_new_values_do_not_retrace():
    params, x, _ = small()
    chex.clear_trace_counter()
    once = jax.jit(
        chex.assert_max_traces(lambda mask, gates: attention.apply(params, x, SMALL, mask=mask, gates=gates), 1)
    )
    outs = [
        once(masks.causal() & masks.lengths(np.array(lengths)) & masks.dense(booleans(i, 5, 5)), numbers(i, 3))
        for i, lengths in enumerate([[1, 5], [3, 2], [5, 5]])
    ]
    assert len({np.asarray(out).tobytes() for out in outs}) == 3


@pytest.mark.slow
def test_compiled_and_eager_agree():
    params, x, memory = small(memory=7)
    close(
        attention.apply(params, x, SMALL, memory=memory, **FULL), apply(params, x, SMALL, memory=memory, **FULL), 1e-6
    )


def test_an_empty_batch_is_an_empty_result():
    params, x, _ = small()
    assert apply(params, x[:0], SMALL, mask=masks.causal()).shape == (0, 5, 6)


@pytest.mark.slow
def test_the_memory_can_be_projected_once():
    params, x, memory = small(memory=7)
    places = jnp.arange(7) + 2
    answers = attention.keys_values(params, memory, SMALL, positions=places, rotate=positions.rotary)
    assert (answers.k.shape, answers.v.shape) == ((2, 1, 7, 2), (2, 1, 7, 5))
    out, seen = attention.apply_to(
        params, x, answers, SMALL, mask=masks.causal(), keys=masks.tokens(7, places), rotate=positions.rotary
    )
    options = {"memory_positions": places, "rotate": positions.rotary, "mask": masks.causal()}
    close(out, apply(params, x, SMALL, memory=memory, **options), 1e-6)
    assert seen == {}


# Dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_of_weights_keeps_the_mean_and_follows_its_key():
    params, x, _ = small()
    drop = jax.jit(
        jax.vmap(lambda key: attention.apply(params, x, SMALL, mask=masks.causal(), dropout_rate=0.3, dropout_key=key))
    )
    keys = jax.random.split(jax.random.key(0), 4096)
    outs = np.asarray(drop(keys), np.float64)
    np.testing.assert_array_equal(outs[:4], drop(keys)[:4])
    assert len({out.tobytes() for out in outs[:50]}) == 50
    error = np.abs(outs.mean(0) - apply(params, x, SMALL, mask=masks.causal()))
    assert np.all(error < 5 * outs.std(0) / np.sqrt(len(outs)) + 1e-6)
    assert outs.std(0).min() > 0.01


def test_dropout_differs_between_examples_heads_and_queries():
    """Every weight is dropped on its own: with equal inputs everywhere, the heads' outputs differ."""
    params = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), random_params(PAIR_CONFIG))
    x = np.broadcast_to(numbers(1, 1, 1, 6), (2, 11, 6))
    _, seen = apply_captured(
        params, x, PAIR_CONFIG, capture=("heads",), dropout_rate=0.5, dropout_key=jax.random.key(1)
    )
    scale = np.asarray(seen["heads"][..., 0]).reshape(-1)  # the share of the weights that stayed, times a constant
    assert len(np.unique(np.round(scale / np.abs(scale).max(), 3))) > 5
    counts = np.asarray(seen["heads"][..., 0])
    for axis in range(3):
        assert np.any(np.abs(np.diff(counts, axis=axis)) > 1e-3)


def test_gradient_goes_through_the_same_dropout():
    """The derivative of a layer that is linear in w_o: out = grad of out's sum with respect to w_o, times w_o."""
    params, x = random_params(Config(d_model=6, num_heads=3)), numbers(1, 2, 5, 6)
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    loss = lambda w_o: jnp.sum(attention.apply(  # noqa: E731
        params._replace(w_o=w_o), x, Config(d_model=6, num_heads=3), **options))  # fmt: skip
    value, gradient = jax.jit(jax.value_and_grad(loss))(params.w_o)
    np.testing.assert_allclose(np.sum(gradient * params.w_o), value, rtol=1e-5)
