"""Tiles without a running maximum: the same numbers, whichever way is taken, and which way that is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity import FEATURES
from reference import numbers
from tiers import tiered

from mhajax import kernels, masks
from mhajax.kernels import Tiling, blockwise, unshifted
from mhajax.kernels.log_sum_exp import LogSumExp

B, N, K, T, S, H, HV = 2, 4, 2, 13, 17, 5, 3
COARSE, FINE = Tiling(4, 6, 8), Tiling(4, 3, 4)  # the last tiles are partial in both
MASK = masks.causal() & masks.lengths(np.array([9, 17]))

# Rows of the parity matrix: no mask, and masks of every kind.
ROWS = [
    "nothing but q, k, v", "causal, T = S", "lengths, one of them 0", "booleans [B, N, T, S]", "segments",
    "`&`, `\\|`, `~` together", "grouped heads, N = 6, K = 3", "one key head for all", "values wider than keys, Hv = 7",
    "one query, T = 1", "a query with nothing to attend to", "NaN, Inf in masked keys, values",
    "NaN, Inf in a visible key, value, query", "capture of weights, logits", "mask as an argument of `jit`",
    "`vmap` over the batch",
]  # fmt: skip


def attend(mask=MASK, fine=FINE):
    """A function of q, k, v: heads and log-sum-exp."""
    places = {"queries": masks.tokens(T), "keys": masks.tokens(S)}
    tiled = partial(blockwise.attend, mask=mask, scale=H**-0.5, tiling=COARSE, tiling_if_small=fine, **places)

    def both(q, k, v):
        heads, log_sums = tiled(q, k, v)
        return heads, log_sums.whole

    return both


def with_gradient(function):
    """(q, k, v) → heads, log-sum-exp and the three gradients of both."""

    def both(q, k, v):
        (heads, log_sums), pull = jax.vjp(function, q, k, v)
        seen = jnp.where(jnp.isfinite(log_sums), jnp.cos(log_sums), 0)
        return heads, log_sums, *pull((jnp.sin(1 + jnp.arange(heads.size)).reshape(heads.shape), seen))

    return both


def given(*leading):
    return tuple(numbers(i, *leading, *shape) for i, shape in enumerate([(N, T, H), (K, S, H), (K, S, HV)]))


def bound_of(q, k):
    """The largest logit that any head could have."""
    of_q, of_k = (np.linalg.norm(a, axis=-1).max(-1) for a in (q, k))
    return np.max(of_q * np.repeat(of_k, N // K, axis=-1)) * H**-0.5


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.max(np.abs(b)))


@pytest.mark.parametrize("name", tiered(ROWS, "causal, T = S", "NaN, Inf in a visible key, value, query"))
def test_a_feature_with_small_logits(name):
    feature = FEATURES[name]
    heads = feature.case.sizes.n
    path = parity.Path("blockwise", Tiling(heads, 6, 8), Tiling(heads, 3, 4))
    feature.check(path, feature.case)


# Which way is taken -------------------------------------------------------------------------------------------------


@pytest.fixture
def marked(monkeypatch):
    """A program that gives 7 where no maximum is taken."""
    sevens = lambda static, operands, context: (  # noqa: E731
        jnp.full((*operands.q.shape[:-1], HV), 7.0), LogSumExp(*[jnp.zeros(operands.q.shape[:-1])] * 2)
    )  # fmt: skip
    monkeypatch.setattr(unshifted, "forward", sevens)
    program = parity.quick(attend(masks.causal()))
    return lambda q, k, v: np.asarray(program(q, k, v)[0])


def test_no_maximum_is_taken_if_no_logit_can_be_large(marked):
    q, k, v = given(B)
    below, above = (factor * unshifted.LARGEST / bound_of(q, k) for factor in (0.99, 1.01))
    assert np.all(marked((below * q).astype(np.float32), k, v) == 7)
    assert not np.any(marked((above * q).astype(np.float32), k, v) == 7)


def test_a_maximum_is_taken_if_weights_times_values_could_be_out_of_range(marked):
    q, k, v = given(B)
    v[1, 1, 2, 1] = 1e37
    assert not np.any(marked(q, k, v) == 7)
    assert not np.any(marked(q, k, (1e-37 * given(B)[2]).astype(np.float32)) == 7)


def test_every_head_has_its_own_bound(marked):
    q, k, v = given(B)
    q[:, :2] *= 100  # these heads share their keys
    assert not np.any(marked(q, k, v) == 7)
    k[:, 0] *= 0.01
    assert np.all(marked(q, k, v) == 7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_asked(marked, bad):
    q, k, v = given(B)
    q[0, 1, 2, 3], k[0, 0, 3, 1], v[1, 1, 16, 0] = bad, -bad, bad
    assert np.all(np.nan_to_num(marked(q, k, v), nan=7) == 7)


# The same numbers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ways():
    """The program that may take either way, and the one that takes a maximum always."""
    return [parity.quick(with_gradient(attend(fine=fine))) for fine in (FINE, None)]


def test_large_logits_give_the_very_numbers_of_the_other_way(ways):
    q, k, v = given(B)
    q *= 1000
    both, shifted = (way(q, k, v) for way in ways)
    assert_equal(both, shifted)
    assert all(np.all(np.isfinite(a)) for a in both)


def test_logits_below_the_bound_differ_by_rounding_only(ways):
    q, k, v = given(B)
    q *= 0.9 * unshifted.LARGEST / bound_of(q, k)
    both, shifted = (way(q, k, v) for way in ways)
    for a, b in zip(both, shifted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))  # logits of 54 are wrong by 3e-6
    assert any(np.any(np.asarray(a) != b) for a, b in zip(both, shifted, strict=True))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_small_and_large_values(ways, size):
    q, k, v = given(B)
    (heads, *_), (expected, *_) = (way(q, k, (size * v).astype(np.float32)) for way in ways)
    np.testing.assert_allclose(heads, expected, rtol=0, atol=2e-6 * size)


# Under transformations ----------------------------------------------------------------------------------------------


def of_one_length(q, k, v, length):
    return with_gradient(attend(masks.causal() & masks.lengths(length)))(q, k, v)


@pytest.mark.slow
def test_under_vmap_each_example_takes_its_own_way():
    q, k, v = given(3, 1)
    q[1] *= 1000
    lengths = np.array([9, 17, 4])[:, None]
    got = parity.quick(jax.vmap(of_one_length))(q, k, v, lengths)
    one = parity.quick(of_one_length)
    for i in range(3):
        assert_close([a[i] for a in got], one(q[i], k[i], v[i], lengths[i]))
    text = str(jax.make_jaxpr(jax.vmap(attend(masks.causal())))(q, k, v))
    assert "cond[" in text  # else both ways were computed, and one of them taken


@pytest.mark.slow
def test_in_a_scan_and_with_rematerialisation():
    q, k, v = given(3, B)
    loss = lambda q, k, v, length: jnp.sum(jnp.sin(attend(masks.lengths(length))(q, k, v)[0]))  # noqa: E731
    lengths = np.array([[9, 17], [1, 2], [17, 3]])

    def scanned(q, k, v):
        step = jax.checkpoint(lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(step, jnp.float32(0), (q, k, v, lengths))[0]

    def added(q, k, v):
        return sum(loss(*x) for x in zip(q, k, v, lengths, strict=True))

    got, expected = (parity.quick(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (scanned, added))
    assert_close(got, expected)


# At sizes for which it is chosen ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="not chosen with older compilers")
def test_at_real_sizes_with_all_optimisations(full_compiles):
    b, n, t, h = 2, 4, 516, 16
    q, k, v = (numbers(i, b, n, t, h) for i in range(3))
    mask = masks.causal() & masks.lengths(np.array([500, 516]))
    places = {"queries": masks.tokens(t), "keys": masks.tokens(t)}
    assert kernels.explain(q, k, v, mask=mask).tiling_if_small == Tiling(4, 129, 129)

    def both(kernel):
        def run(q, k, v):
            heads, pull = jax.vjp(lambda *a: kernels.attend(*a, mask=mask, kernel=kernel, **places)[0], q, k, v)
            return heads, *pull(jnp.cos(heads))

        return full_compiles(run)

    program = both("auto")
    got = program(q, k, v)
    for a, b_ in zip(got, both("dense")(q, k, v), strict=True):
        np.testing.assert_allclose(a, b_, rtol=0, atol=3e-6 * np.max(np.abs(b_)))
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[0, 1, 505, 3], bad_v[0, 2, 500] = np.nan, np.inf  # behind the length
    assert_equal(program(q, bad_k, bad_v), got)
