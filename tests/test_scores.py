"""Score functions against their formulas, pair by pair, through the kernels, with gradients, under jit and vmap."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

from mhajax import attention, kernels, masks, scores
from mhajax.kernels import ring
from mhajax.masks import Tokens
from tests.reference import numbers, random_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, N, K, T, S, H, HV = 2, 6, 3, 37, 41, 5, 7
KERNELS = ["dense", "blockwise"]
Q, KEYS, V = numbers(0, B, N, T, H), numbers(1, B, K, S, H), numbers(2, B, K, S, HV)
Q_AT, K_AT = np.arange(3, 3 + T), np.arange(S)[::-1].copy()  # keys in another order than their positions
GAPS = K_AT - Q_AT[:, None]  # [T, S], positive for keys ahead
SLOPES = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]  # the paper's for 4 heads, then every other one for 8


def t5_bucket(gap, buckets, bidirectional, most):
    """Which bucket, in whole numbers: the j-th far one begins at exact · (most / exact)^(j / far)."""
    if bidirectional:
        buckets //= 2
    offset, away = (buckets * (gap > 0), abs(gap)) if bidirectional else (0, max(-gap, 0))
    exact = buckets // 2
    if away < exact:
        return offset + away
    far = buckets - exact
    reached = [j for j in range(far) if away**far >= exact ** (far - j) * most**j]
    return offset + exact + max(reached)


buckets = lambda *how: np.vectorize(lambda gap: t5_bucket(int(gap), *how))(GAPS)  # noqa: E731
both, behind = buckets(32, True, 30), buckets(11, False, 25)
clipped = np.clip(GAPS, -4, 4) + 4
# name: (function of numbers, those numbers, what becomes of scores [B, N, T, S])
CASES = {
    "slope": (scores.slope, numbers(3, N), lambda x, s: x - s[:, None, None] * np.abs(GAPS)),
    "relative": (scores.relative, numbers(4, N, 9), lambda x, table: x + table[:, clipped]),
    "t5, encoder": (
        partial(scores.t5, bidirectional=True, max_distance=30),
        numbers(5, N, 32),
        lambda x, table: x + table[:, both],
    ),
    "t5, decoder": (
        partial(scores.t5, bidirectional=False, max_distance=25),
        numbers(6, N, 11),
        lambda x, table: x + table[:, behind],
    ),
    "soft cap": (scores.soft_cap, np.float32(1.3), lambda x, cap: cap * jnp.tanh(x / cap)),
    "chain": (
        lambda given: scores.chain(scores.relative(given[0]), scores.soft_cap(given[1])),
        (numbers(7, N, 9), np.float32(0.9)),
        lambda x, given: given[1] * jnp.tanh((x + given[0][:, clipped]) / given[1]),
    ),
}


def by_formula(change, given, q, sinks=None):
    """Attention written out."""
    k, v = (jnp.repeat(a, N // K, axis=1) for a in (KEYS, V))
    logits = change(jnp.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(H), given)
    if sinks is not None:
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None, None], (B, N, T, 1))], axis=-1)
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(logits)[..., :S], v)


def attend(score, q, kernel, **options):
    return kernels.attend(
        q, KEYS, V, queries=Tokens(0, Q_AT), keys=Tokens(0, K_AT), score=score, kernel=kernel, **options
    )


weighed = lambda heads: (jnp.sum(heads * numbers(9, B, N, T, HV)), heads)  # noqa: E731


@pytest.mark.parametrize("name", tiered(CASES, "relative", "t5, encoder"))
def test_values_and_gradients_are_the_formulas_on_every_path(name):
    make, given, change = CASES[name]
    differ = lambda f: jax.jit(jax.grad(lambda given, q: weighed(f(given, q)), (0, 1), has_aux=True))(given, Q)  # noqa: E731
    expected = differ(lambda given, q: by_formula(change, given, q))
    for kernel in KERNELS:
        got = differ(lambda given, q, kernel=kernel: attend(make(given), q, kernel)[0])
        chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=5e-5)


def test_a_pair_of_numbers():
    """Without attention: one score, one head, two positions."""
    table = np.arange(N * 5, dtype=np.float32).reshape(N, 5)
    for head, q, k in ((0, 3, 3), (2, 9, 8), (5, 1, 30), (4, 30, 1)):
        assert float(scores.relative(table)(0.5, head, q, k)) == 0.5 + 5 * head + 2 + np.clip(k - q, -2, 2)
        assert float(scores.alibi(N)(0.5, head, q, k)) == 0.5 - SLOPES[head] * abs(q - k)


@pytest.mark.parametrize("buckets", [4, 8, 22, 32, 64])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("most", [33, 64, 128, 1000])
def test_every_bucket_of_t5(buckets, bidirectional, most):
    """Also the distances that are powers, where a rounded logarithm falls on either side."""
    numbered = scores.t5(np.arange(buckets)[None], bidirectional=bidirectional, max_distance=most).args[0][0]
    gaps = np.arange(-most - 99, most + 100)
    expected = [t5_bucket(int(gap), buckets, bidirectional, most) for gap in gaps]
    np.testing.assert_array_equal(numbered[np.clip(gaps, -most, most) + most], expected)


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (6, SLOPES),
        (8, [2.0**-n for n in range(1, 9)]),
        (12, [2.0**-n for n in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_slopes_of_alibi(num_heads, expected):
    np.testing.assert_allclose(scores.alibi(num_heads).args[0], expected, rtol=1e-7)


def test_chain_goes_from_left_to_right_and_takes_any_function():
    double = lambda score, head, q, k: 2 * score + head  # noqa: E731
    assert float(scores.chain(double, scores.soft_cap(3.0), double)(1e9, 1, 0, 0)) == 7.0
    assert float(scores.chain(double, double)(1.0, 1, 0, 0)) == 7.0
    assert float(scores.chain()(1.5, 0, 0, 0)) == 1.5


CONFIG = attention.Config(d_model=13, num_heads=N, num_kv_heads=K, head_dim=H)


@pytest.mark.parametrize("kernel", tiered(KERNELS, "blockwise"))
def test_new_tables_do_not_retrace_and_vmap_maps_over_tables(kernel):
    params, x = random_params(attention.init_params, CONFIG), numbers(1, B, T, 13)
    double = lambda score, head, q, k: 2 * score  # noqa: E731
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def run(score):
        return attention.apply(params, x, CONFIG, mask=masks.causal(), score=score, kernel=kernel)

    make = lambda table, cap: scores.chain(scores.t5(table, bidirectional=False), double, scores.soft_cap(cap))  # noqa: E731
    tables, caps = numbers(2, 3, N, 8), np.float32([1.0, 2.0, 0.5])
    one_by_one = [run(make(*given)) for given in zip(tables, caps, strict=True)]
    assert np.max(np.abs(one_by_one[0] - one_by_one[1])) > 0.01
    together = jax.jit(jax.vmap(lambda *given: attention.apply(
        params, x, CONFIG, mask=masks.causal(), score=make(*given), kernel=kernel)))(tables, caps)  # fmt: skip
    np.testing.assert_allclose(together, jnp.stack(one_by_one), atol=3e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sinks_are_one_more_key_without_a_value(kernel):
    sinks = numbers(3, N)

    def ours(sinks, q):
        heads, seen = attend(None, q, kernel, capture=("log_sum_exp",))
        return scores.with_sinks(heads, seen["log_sum_exp"], sinks)

    differ = lambda f: jax.jit(jax.grad(lambda sinks, q: weighed(f(sinks, q)), (0, 1), has_aux=True))(sinks, Q)  # noqa: E731
    expected = differ(lambda sinks, q: by_formula(lambda x, _: x, None, q, sinks))
    chex.assert_trees_all_close(differ(ours), expected, rtol=2e-5, atol=3e-5)


@pytest.mark.parametrize("kernel", tiered(KERNELS, "blockwise"))
def test_sinks_of_queries_that_see_nothing(kernel):
    """Zeros, and gradients that are finite, and zero where nothing depends; also without any sink."""
    mask = masks.dense(np.arange(T)[:, None] % 3 != 0)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(sinks, q):
        heads, seen = attend(None, q, kernel, mask=mask, capture=("log_sum_exp",))
        loss, given = weighed(scores.with_sinks(heads, seen["log_sum_exp"], sinks))
        return loss, (given, heads)

    sinks = numbers(3, N)
    sinks[2] = -np.inf
    (_, (heads, plain)), (of_sinks, of_queries) = run(sinks, Q)
    np.testing.assert_array_equal(heads[:, :, ::3], 0)
    np.testing.assert_array_equal(of_queries[:, :, ::3], 0)
    chex.assert_tree_all_finite((heads, of_sinks, of_queries))
    np.testing.assert_allclose(heads[:, 2], plain[:, 2], atol=1e-6)
    assert of_sinks[2] == 0 and np.all(np.abs(np.delete(of_sinks, 2)) > 1e-3)
    assert np.all(np.abs(of_queries[:, :, 1]) > 0)


def test_sinks_keep_the_dtype():
    heads = numbers(0, N, T, HV).astype(jnp.bfloat16)
    got = scores.with_sinks(heads, numbers(1, N, T), numbers(2, N))
    assert got.dtype == jnp.bfloat16
    exact = scores.with_sinks(heads.astype(np.float32), numbers(1, N, T), numbers(2, N))
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


PER_HEAD = {
    "alibi or slope": scores.alibi,
    "relative or t5": lambda n: scores.relative(numbers(0, n, 3)),
    "relative or t5, t5": lambda n: scores.t5(numbers(0, n, 8), bidirectional=True),
    "alibi or slope, in a chain": lambda n: scores.chain(scores.soft_cap(3.0), scores.alibi(n)),
    "alibi or slope, in a function": lambda n: lambda *pair: scores.alibi(n)(*pair),
}


@pytest.mark.parametrize("path", ["dense", "blockwise", "auto", "ring"])
@pytest.mark.parametrize("name", PER_HEAD)
def test_what_is_per_head_is_for_as_many_heads(name, path):
    """An index beyond the end would quietly give the last head's, and one below it somebody's."""

    def attend_with(score, heads=N):
        q = jnp.broadcast_to(Q[:, :1], (B, heads, T, H))
        if path == "ring":
            return ring.attend(q, q, q, axis_name="none", score=score)
        places = {"queries": masks.tokens(T), "keys": masks.tokens(T)}
        return jax.eval_shape(lambda q: kernels.attend(q, q, q, score=score, kernel=path, **places), q)

    for have in (N - 1, N + 1):
        score = PER_HEAD[name](have)
        if path != "ring":
            attend_with(score, have)  # the same function, traced before
        with pytest.raises(ValueError) as caught:
            attend_with(score)
        assert all(part in str(caught.value) for part in (f"scores.{name.split(',')[0]}:", f"N={N}", f"got {have}"))


@pytest.mark.parametrize(
    ("do", "parts"),
    [
        (partial(scores.alibi, 0), ("scores.alibi", "num_heads", "at least 1", "0")),
        (partial(scores.slope, np.ones((2, 3))), ("scores.slope", "[N]", "(2, 3)")),
        (partial(scores.alibi(5), 1.0, 7, 0, 0), ("scores.alibi", "0 to 4", "7")),
        (partial(scores.relative, np.ones(3)), ("scores.relative", "[N, 2m + 1]", "(3,)")),
        (partial(scores.relative, np.ones((2, 4))), ("scores.relative", "odd", "(2, 4)")),
        (partial(scores.t5, np.ones(3), bidirectional=True), ("scores.t5", "[N, buckets]", "(3,)")),
        (partial(scores.t5, np.ones((8, 7)), bidirectional=True), ("scores.t5", "even", "(8, 7)")),
        (partial(scores.t5, np.ones((8, 1)), bidirectional=False), ("scores.t5", "at least 2", "(8, 1)")),
        (partial(scores.t5, np.ones((8, 64)), bidirectional=False, max_distance=32), ("scores.t5", "32", "max_dist")),
        (partial(scores.soft_cap, 0.0), ("scores.soft_cap", "above 0", "0.0")),
        (partial(scores.soft_cap, np.ones(3)), ("scores.soft_cap", "one number", "(3,)")),
        (
            partial(scores.with_sinks, np.ones((2, 3, 5, 7)), np.ones((2, 3, 5)), np.ones(2)),
            ("scores.with_sinks", "(2, 3, 5)", "(3,)", "(2,)"),
        ),
        (
            partial(scores.with_sinks, np.ones((2, 3, 5, 7)), np.ones((2, 5, 3)), np.ones(3)),
            ("scores.with_sinks", "(2, 3, 5)", "(2, 5, 3)"),
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(do, parts):
    with pytest.raises(ValueError) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []
