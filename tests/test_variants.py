"""The variants against float64 NumPy, and the promises of attention for each: masks, NaN, causality, kernels."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

from mhajax import attention, masks, positions, variants
from mhajax.variants import differential, gated, qk_norm, sigmoid, sinks, talking_heads
from tests.reference import numbers, random_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, N, K, T, S, D, H, HV = 2, 6, 3, 5, 7, 11, 4, 13
CONFIG = attention.Config(d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, value_dim=HV)
BIASED = attention.Config(d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, value_dim=HV, use_bias=True)
NAMES = sorted(variants.__all__)
ON_EVERY_KERNEL = ["differential", "gated", "qk_norm", "sinks"]
TURN = partial(positions.rotary, base=50.0)
ALLOWED = np.random.default_rng(0).random((B, 1, T, S)) < 0.6
ALLOWED[0, 0, 2] = ALLOWED[1] = False  # one query that sees nothing, and a whole example
ALLOWED[1, 0, 3, 4] = True
WEIGHTS = numbers(1, B, T, D)  # of the output in the loss
EYE = np.eye(N)


def of(name):
    return getattr(variants, name)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def params(name):
    return random_params(of(name).init_params, CONFIG)


@pytest.fixture(scope="module")
def run(name):
    """Loss, output and the gradients with respect to parameters, x and memory."""

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(params, x, memory, mask, weights):
        out = of(name).apply(params, x, CONFIG, memory=memory, mask=mask, rotate=TURN)
        return jnp.sum(jnp.where(weights != 0, out, 0) * weights), out

    return run


@pytest.fixture(scope="module")
def streams():
    return numbers(2, B, T, D), numbers(3, B, S, D)


# The formulas, in float64.


def turned(x):
    angles = np.arange(x.shape[-2])[:, None] * 50.0 ** (-2 * np.arange(H // 2) / H)
    pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def unit(x, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def softmax(logits, allowed, sinks=-np.inf):
    weights = np.where(allowed, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True) + np.exp(sinks)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def logits_and_values(p, x, memory, prepare=lambda x, name: x):
    q = turned(prepare(np.einsum("btd,ndh->bnth", x, p.w_q), "q"))
    k = turned(prepare(np.einsum("bsd,kdh->bksh", memory, p.w_k), "k"))
    k, v = (np.repeat(a, N // K, axis=1) for a in (k, np.einsum("bsd,kdh->bksh", memory, p.w_v)))
    return np.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(H), v


def by_formula(name, p, x, memory, allowed):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    x, memory = np.float64(x), np.float64(memory)
    prepare = lambda a, of: a  # noqa: E731
    if name == "qk_norm":
        scales = {"q": p.q_scale, "k": p.k_scale}
        prepare = lambda a, of: unit(a, 1e-6) * scales[of][:, None]  # noqa: E731
    logits, v = logits_and_values(p.attention, x, memory, prepare)
    allowed = np.broadcast_to(allowed, logits.shape)
    if name == "talking_heads":
        weights = np.zeros_like(logits)
        for n, m in np.ndindex(N, N):
            mixed = sum(p.before[m, o] * np.where(allowed[:, o], logits[:, o], 0) for o in range(N))
            weights[:, n] += p.after[n, m] * softmax(mixed, allowed[:, m]) * allowed[:, n]
    elif name == "sigmoid":
        weights = np.where(allowed, 1 / (1 + np.exp(np.log(S) - logits)), 0)
    else:
        weights = softmax(logits, allowed, p.sinks[:, None, None] if name == "sinks" else -np.inf)
    heads = weights @ v
    if name == "gated":
        heads = heads / (1 + np.exp(-np.einsum("btd,ndh->bnth", x, p.w_g)))
    if name == "differential":
        second = p.attention._replace(w_q=p.subtracted.w_q, w_k=p.subtracted.w_k)
        others = softmax(logits_and_values(second, x, memory)[0], allowed) @ v
        for n in range(N):
            a1, b1, a2, b2 = p.lambdas[n]
            heads[:, n] -= (np.exp(a1 @ b1) - np.exp(a2 @ b2) + 0.8) * others[:, n]
        heads = unit(heads, 1e-5) * p.scale[:, None] * 0.2
    return np.einsum("bnth,nhd->btd", heads, p.attention.w_o)


@pytest.mark.parametrize("name", tiered(NAMES, "sinks", "talking_heads"), indirect=True)
def test_the_output_is_the_formula_and_a_query_that_sees_nothing_gives_zeros(name, params, run, streams):
    (_, out), gradients = run(params, *streams, masks.dense(ALLOWED), WEIGHTS)
    np.testing.assert_allclose(out, by_formula(name, params, *streams, ALLOWED), atol=2e-5)
    blind = ~ALLOWED.any(-1)[:, 0]
    np.testing.assert_array_equal(out[blind], 0)
    assert np.min(np.abs(out[~blind])) > 0
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients[1][blind], 0)
    np.testing.assert_array_equal(gradients[2][~ALLOWED.any(-2)[:, 0]], 0)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", tiered(NAMES, "differential", "sinks", "talking_heads"), indirect=True)
def test_gradients_are_those_of_the_formula(name, params, run, streams):
    """A directional derivative, by central differences in float64."""
    direction = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), (params, *streams))
    loss = lambda step: np.sum(WEIGHTS * by_formula(name, *jax.tree.map(  # noqa: E731
        lambda a, d: np.float64(a) + step * d, (params, *streams), direction), ALLOWED))  # fmt: skip
    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    _, gradients = run(params, *streams, masks.dense(ALLOWED), WEIGHTS)
    got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradients, direction)))
    np.testing.assert_allclose(got, expected, rtol=3e-4)


@pytest.mark.parametrize("name", tiered(NAMES, "differential"), indirect=True)
@pytest.mark.parametrize("bad", tiered([np.nan, np.inf], np.nan))
def test_what_is_not_finite_reaches_only_the_queries_that_see_it(name, params, run, streams, bad):
    """Neither output nor gradient of the others; of the query itself, and of a key that some see and some do not."""
    x, memory = (a.copy() for a in streams)
    mask = masks.dense(ALLOWED)
    (_, clean), _ = run(params, x, memory, mask, WEIGHTS)
    memory[0, 4, 3] = x[0, 1, 5] = bad
    sees = ALLOWED[:, 0, :, 4] & (np.arange(B) == 0)[:, None]
    sees[0, 1] = True
    assert 0 < sees[0].sum() < T - 1
    others = WEIGHTS * ~sees[..., None]
    (_, out), gradients = run(params, x, memory, mask, others)
    assert np.all(np.isnan(out[sees]))
    np.testing.assert_allclose(out[~sees], clean[~sees], atol=1e-6)
    _, expected = run(params, *streams, mask, others)
    chex.assert_trees_all_close(gradients, expected, atol=1e-5)


@pytest.mark.parametrize("name", tiered(NAMES, "talking_heads"), indirect=True)
def test_causal_by_gradient_without_memory_and_with_places(name, params, streams):
    x = streams[0]
    places = np.array([[0, 1, 2, 3, 4], [4, 2, 0, 1, 3]])

    @jax.jit
    def differ(x, weights):
        out = lambda x: of(name).apply(params, x, CONFIG, mask=masks.causal(), positions=places, rotate=TURN)  # noqa: E731
        return jax.grad(lambda x: jnp.sum(out(x) * weights))(x)

    for t in range(T):
        reached = np.any(differ(x, WEIGHTS * (np.arange(T) == t)[:, None]) != 0, axis=-1)
        np.testing.assert_array_equal(reached, places <= places[:, t : t + 1])


@pytest.mark.slow
def test_gates_leading_axes_and_half_precision(name, streams):
    """Gates of 0 remove a head; biases of the projections are used; any leading axes; the dtype is that of x."""
    params = random_params(of(name).init_params, BIASED)
    gates = np.float32([1, 0, 1, 0, 0, 2])
    call = jax.jit(lambda params, x, gates: of(name).apply(params, x, BIASED, gates=gates))
    without = np.array(params.attention.w_o) * gates[:, None, None]
    pruned = params._replace(attention=params.attention._replace(w_o=without))
    x = streams[0]
    out = call(params, x, gates)
    np.testing.assert_allclose(out, call(pruned, x, np.ones(N, np.float32)), atol=1e-5)
    np.testing.assert_allclose(call(params, x[:, None], gates)[:, 0], out, atol=1e-6)
    for field in ("b_q", "b_v", "b_o"):
        zeros = 0 * getattr(params.attention, field)
        other = params._replace(attention=params.attention._replace(**{field: zeros}))
        assert np.max(np.abs(out - call(other, x, gates))) > 0.01
    half = call(params, x.astype(jnp.bfloat16), gates)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), out, atol=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("variant", tiered(ON_EVERY_KERNEL, ON_EVERY_KERNEL[0]))
def test_the_blockwise_kernel_gives_the_same(variant, streams):
    params = random_params(of(variant).init_params, CONFIG)
    call = lambda kernel: jax.jit(  # noqa: E731
        lambda x, memory: of(variant).apply(params, x, CONFIG, memory=memory, mask=masks.dense(ALLOWED), kernel=kernel)
    )(*streams)
    np.testing.assert_allclose(call("blockwise"), call("dense"), atol=1e-5)


@pytest.mark.parametrize("variant", sorted(set(NAMES) - set(ON_EVERY_KERNEL)))
def test_variants_that_need_every_logit_refuse_other_kernels(variant, streams):
    params = random_params(of(variant).init_params, CONFIG)
    with pytest.raises(ValueError, match=f"{variant}.apply: kernel='blockwise' .* use kernel='auto' or 'dense'"):
        of(variant).apply(params, streams[0], CONFIG, kernel="blockwise")


BASE = random_params(attention.init_params, CONFIG)
REDUCED = {
    "talking heads that do not talk": (talking_heads.apply, talking_heads.Params(BASE, EYE, EYE), {}, 1.0),
    "gates half open": (gated.apply, gated.Params(BASE, np.zeros((N, D, HV), np.float32)), {}, 0.5),
    "no sinks": (sinks.apply, sinks.Params(BASE, np.full(N, -np.inf, np.float32)), {}, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_reductions_to_attention(name, streams):
    apply, params, options, factor = REDUCED[name]
    both = jax.jit(lambda f, p, x: f(p, x, CONFIG, mask=masks.causal(), **options), static_argnums=0)
    expected = factor * both(attention.apply, BASE, streams[0])
    np.testing.assert_allclose(both(apply, params, streams[0]), expected, atol=2e-6)


@pytest.mark.slow
def test_differential_without_the_second_softmax_is_attention_with_normalised_heads(streams):
    """λ = exp(0) − exp(0) + 0."""
    params = random_params(differential.init_params, CONFIG)
    params = params._replace(attention=BASE, lambdas=np.zeros((N, 4, H), np.float32))
    heads = attention.apply_captured(BASE, streams[0], CONFIG, capture=("heads",))[1]["heads"]
    expected = np.einsum("bnth,nhd->btd", unit(np.float64(heads), 1e-5) * params.scale[:, None], BASE.w_o)
    np.testing.assert_allclose(differential.apply(params, streams[0], CONFIG, lambda_init=0.0), expected, atol=1e-5)


def test_qk_norm_does_not_see_the_size_of_queries_and_keys(streams):
    params = random_params(qk_norm.init_params, CONFIG)
    larger = params._replace(attention=params.attention._replace(w_q=7 * params.attention.w_q))
    call = jax.jit(lambda params: qk_norm.apply(params, streams[0], CONFIG, rotate=TURN, epsilon=1e-12))
    np.testing.assert_allclose(call(larger), call(params), atol=1e-5)


def test_talking_heads_with_masks_of_their_own(streams):
    """A hidden logit adds nothing to the mixes, and a hidden pair has no weight."""
    params = random_params(talking_heads.init_params, CONFIG)
    hidden = np.random.default_rng(4).random((N, T, S)) < 0.5
    hidden[2, 1] = False
    call = jax.jit(partial(talking_heads.apply, config=CONFIG, rotate=TURN))
    got = call(params, streams[0], memory=streams[1], mask=masks.per_head(hidden))
    np.testing.assert_allclose(got, by_formula("talking_heads", params, *streams, hidden), atol=2e-5)


@pytest.mark.slow
def test_sigmoid_offsets(streams):
    params = random_params(sigmoid.init_params, CONFIG)
    call = jax.jit(lambda offset: sigmoid.apply(params, streams[0], CONFIG, offset=offset))
    np.testing.assert_allclose(call(-np.log(T)), sigmoid.apply(params, streams[0], CONFIG), atol=1e-6)
    each = call(np.where(np.arange(N) == 3, -np.log(T), -np.inf).astype(np.float32))
    only = sigmoid.apply(params, streams[0], CONFIG, gates=np.float32(np.arange(N) == 3))
    np.testing.assert_allclose(each, only, atol=1e-6)


@pytest.mark.parametrize("variant", tiered(NAMES, "differential"))
def test_dropout_drops_and_needs_a_key(variant, streams):
    params = random_params(of(variant).init_params, CONFIG)
    call = partial(of(variant).apply, params, streams[0], CONFIG)
    both = jax.jit(lambda key: (call(dropout_rate=0.5, dropout_key=key), call()))
    (first, kept), (again, _), (other, _) = (both(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - kept)) > 0.01 and np.max(np.abs(first - other)) > 0.01
    with pytest.raises(ValueError, match="dropout_key"):
        call(dropout_rate=0.5)


@pytest.mark.parametrize("variant", tiered(NAMES, "gated"))
def test_initial_parameters_are_those_of_a_working_attention(variant):
    assert of(variant).Config is attention.Config
    x = numbers(0, T, D)
    out = jax.jit(lambda key: of(variant).apply(of(variant).init_params(key, CONFIG), x, CONFIG))(jax.random.key(0))
    assert out.shape == (T, D) and np.all(np.isfinite(out)) and np.any(out != 0)


def test_lambda_init_of_the_paper():
    layers = np.arange(1, 13)  # which the paper counts from 1
    np.testing.assert_allclose(
        differential.initial_lambda(layers - 1), 0.8 - 0.6 * np.exp(-0.3 * (layers - 1)), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        ("qk_norm", "q_scale"),
        ("qk_norm", "k_scale"),
        ("gated", "w_g"),
        ("differential", "lambdas"),
        ("differential", "scale"),
        ("talking_heads", "before"),
        ("talking_heads", "after"),
    ],
)
def test_parameters_of_another_shape_are_refused(variant, field, streams):
    """One that broadcasts would be taken for something else."""
    params = random_params(of(variant).init_params, CONFIG)
    wrong = params._replace(**{field: getattr(params, field)[:1]})
    with pytest.raises(
        ValueError, match=rf"{variant}.apply: params.{field} must be \[.*\({N if field != 'k_scale' else K},.*got \(1,"
    ):
        of(variant).apply(wrong, streams[0], CONFIG)


def test_other_errors_are_those_of_attention(streams):
    params = random_params(sigmoid.init_params, CONFIG)
    with pytest.raises(ValueError, match=r"sigmoid.apply: offset must be one number or \[N\] = \(6,\), got \(3,\)"):
        sigmoid.apply(params, streams[0], CONFIG, offset=np.ones(3))
    with pytest.raises(ValueError, match=r"gates must be \[N\]"):
        sigmoid.apply(params, streams[0], CONFIG, gates=np.ones(3))
    for variant in NAMES:
        params = random_params(of(variant).init_params, CONFIG)
        with pytest.raises(ValueError, match="memory must have the leading axes of x"):
            of(variant).apply(params, streams[0], CONFIG, memory=streams[1][:1])
        with pytest.raises(ValueError, match="x must be"):
            of(variant).apply(params, streams[0][..., :3], CONFIG)
        with pytest.raises(TypeError, match=rf"{variant}.apply: there is no option 'wrong'; the options are bias, "):
            of(variant).apply(params, streams[0], CONFIG, wrong=1)
