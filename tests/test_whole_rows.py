"""Values without a gradient: whole rows of all heads at once, in one loop of the compiler's where it can."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity_features import booleans
from reference import numbers
from tiers import tiered

from mhajax import kernels, masks
from mhajax.kernels import Tiling

B, N, K, T, S, H, HV = 2, 6, 3, 7, 11, 5, 3
LENGTHS = np.array([9, 0])
CAUSAL = np.arange(S) <= np.arange(T)[:, None]
UNPADDED = np.arange(S) < LENGTHS[:, None, None, None]
HEADS, EXAMPLES, ALL = (booleans(i, *shape) for i, shape in enumerate([(N, T, S), (B, T, S), (B, N, T, S)]))
MASKS = {
    "causal": (masks.causal(), CAUSAL),
    "lengths, one of them 0": (masks.lengths(LENGTHS), UNPADDED),
    "by head": (masks.per_head(HEADS), HEADS),
    "by example": (masks.per_example(EXAMPLES), EXAMPLES[:, None]),
    "[B, N, T, S]": (masks.dense(ALL), ALL),
}
# Tokens are padded to whole tiles of the gradient, so to 8 and 12 here.
PATH = parity.Path("blockwise", Tiling(2, 4, 4), values_at_once=B * N)


def given(*leading):
    return tuple(numbers(i, *leading, *shape) for i, shape in enumerate([(N, T, H), (K, S, H), (K, S, HV)]))


def values(path, mask):
    """(q, k, v) → heads and log-sum-exp."""

    def run(q, k, v):
        heads, seen = parity.attend(path, q, k, v, mask=mask, capture=("log_sum_exp",))
        return heads, seen["log_sum_exp"]

    return parity.quick(run)


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.nanmax(np.abs(np.where(np.isfinite(b), b, 0))))


@pytest.mark.parametrize("name", tiered(MASKS, "lengths, one of them 0", "by head"))
def test_they_are_those_of_the_dense_path_whatever_is_in_it(name):
    """Numbers, NaN and Inf where it is seen, zeros where nothing is; what is hidden changes no bit."""
    mask, allowed = MASKS[name]
    run, dense = values(PATH, mask), values(parity.Path("dense"), mask)
    sound = q, k, v = given(B)
    clean = run(*sound)
    assert_close(clean, dense(*sound))
    seen = np.broadcast_to(allowed, (B, N, T, S))
    assert not np.any(np.asarray(clean[0])[~seen.any(-1)])

    q, k, v = (a.copy() for a in sound)
    q[0, 4, 2, 1], k[1, 1, 3, 0], v[0, 0, 4, 2], v[0, 0, 5] = np.nan, np.inf, -np.inf, np.nan
    got, expected = run(q, k, v), dense(q, k, v)
    assert np.isnan(got[0]).any() and not np.isnan(got[0]).all()
    assert_close(got, expected)

    hidden = ~seen.reshape(B, K, -1, S).any(2)
    if hidden.any():
        for bad in (np.nan, -np.inf, 3e38):
            k, v = (np.where(hidden[..., None], bad * np.sign(a), a) for a in sound[1:])
            for a, b in zip(run(sound[0], k, v), clean, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_numbers_of_queries_and_keys_whose_products_overflow_count_as_not_finite():
    """On every path, under a mask; of values every finite number is one."""
    for path in (PATH, PATH._replace(values_at_once=0), parity.Path("dense")):
        run = values(path, masks.causal())
        q, k, v = given(B)
        v[0, 0, 0] = 3e38
        assert np.all(np.isfinite(run(q, k, v)[0][1])) and not np.any(np.isnan(run(q, k, v)[0]))
        k[1, 2, 5, 0] = 2.0**55
        np.testing.assert_array_equal(np.isnan(run(q, k, v)[0][1]).any(-1), CAUSAL[:, 5] * (np.arange(N) >= 4)[:, None])
        k[1, 2, 5, 0] = 2.0**54
        assert not np.any(np.isnan(run(q, k, v)[0]))


@pytest.mark.slow
def test_under_vmap_they_are_the_calls_and_what_is_hardly_taken_stays_a_branch():
    mask = lambda length: masks.causal() & masks.lengths(length)  # noqa: E731
    one = lambda q, k, v, length: parity.attend(PATH, q, k, v, mask=mask(length))[0]  # noqa: E731
    q, k, v = given(5, B)
    lengths = np.array([[11, 3], [0, 1], [7, 7], [2, 9], [11, 11]])
    mapped = jax.vmap(one, (0, None, 0, 0))
    got = parity.quick(mapped)(q, k[0], v, lengths)
    program = parity.quick(one)
    np.testing.assert_allclose(got, [program(q[i], k[0], v[i], lengths[i]) for i in range(5)], rtol=0, atol=2e-6)
    assert jax.jit(mapped).lower(q, k[0], v, lengths).as_text().count("stablehlo.case") == 1


@pytest.mark.slow
def test_a_gradient_goes_in_tiles_and_has_one_itself():
    path = PATH._replace(tiling=Tiling(2, 4, 4))
    direct = {
        name: (lambda q, k, v, p=p: parity.attend(p, q, k, v)[0])
        for name, p in {"at once": path, "dense": parity.Path("dense")}.items()
    }

    def of_gradient(function):
        loss = lambda *given: jnp.sum(jnp.sin(function(*given)))  # noqa: E731
        return parity.quick(jax.grad(lambda *given: jnp.sum(jax.grad(loss)(*given) ** 2), (0, 1, 2)))(*given(B))

    got, expected = map(of_gradient, direct.values())
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())
    programs = [
        jax.make_jaxpr(f)(*given(B)) for f in (direct["at once"], jax.grad(lambda *a: jnp.sum(direct["at once"](*a))))
    ]
    assert ["scan" in str(program) for program in programs] == [False, True]


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older compilers write the logits down")
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["all", "causal"])
def test_the_logits_of_all_heads_are_not_written_down(mask, full_compiles):
    batch, num_heads, length, width = 16, 8, 256, 16
    heads = jax.ShapeDtypeStruct((batch, num_heads, length, width), jnp.float32)
    places = {"queries": masks.tokens(length), "keys": masks.tokens(length)}
    function = lambda q, k, v: kernels.attend(q, k, v, mask=mask, **places)[0]  # noqa: E731
    memory = full_compiles(function).lower(heads, heads, heads).compile().memory_analysis().temp_size_in_bytes
    assert memory < batch * num_heads * length * length  # a quarter of the logits
