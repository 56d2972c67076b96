"""The fused path: what is not finite, mapped axes, heads a few at a time, second derivatives, what is written down."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity_features import Case, Sizes, booleans, masked
from reference import numbers

from mhajax import kernels, masks
from mhajax.kernels import Tiling, bands, either, fused, fused_products, grid

pytestmark = pytest.mark.slow  # test_kernels.py has this path beside the others
B, N, K, T, S, H, HV = 2, 6, 3, 7, 11, 5, 3
ITEMS, ROWS = B * K, N // K * T  # what the backward pass goes through, and queries of each
LENGTHS = np.array([9, 0])
CAUSAL = np.arange(S) <= np.arange(T)[:, None]
UNPADDED = np.arange(S) < LENGTHS[:, None, None, None]
HEADS, EXAMPLES, ALL = (booleans(i, *shape) for i, shape in enumerate([(N, T, S), (B, T, S), (B, N, T, S)]))
MASKS = {
    "none": (None, True),
    "causal": (masks.causal(), CAUSAL),
    "lengths, one of them 0": (masks.lengths(LENGTHS), UNPADDED),
    "by head": (masks.per_head(HEADS), HEADS),
    "by example [B, 1, T, S]": (masks.per_example(EXAMPLES), EXAMPLES[:, None]),
    "[B, N, T, S]": (masks.dense(ALL), ALL),
}


def attend(kernel="fused", mask=None):
    """A function of q, k, v."""

    def function(q, k, v):
        places = {"queries": masks.tokens(q.shape[-2]), "keys": masks.tokens(k.shape[-2])}
        return kernels.attend(q, k, v, kernel=kernel, mask=mask, **places)[0]

    return function


def with_gradient(function):
    """(q, k, v) → heads and the three gradients."""

    def both(q, k, v):
        heads, pull = jax.vjp(function, q, k, v)
        return heads, *pull(jnp.sin(1 + jnp.arange(heads.size, dtype=heads.dtype)).reshape(heads.shape))

    return both


def given(*leading, hv=HV):
    return tuple(numbers(i, *leading, *shape) for i, shape in enumerate([(N, T, H), (K, S, H), (K, S, hv)]))


def assert_close(got, expected):
    """To the bound of float32, relative to each array's largest number; NaN where the other has it."""
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.nanmax(np.abs(b)))


@pytest.fixture(params=["kept", "computed again"])
def weights(request, monkeypatch):
    """Of few keys and wide heads they are kept for the backward pass, of others they are computed again."""
    monkeypatch.setattr(fused, "_keeps", lambda k: request.param == "kept")


# What is not finite -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_what_is_not_finite_stays_where_it_is_seen(name, weights):
    mask, allowed = MASKS[name]
    seen = np.broadcast_to(allowed, (B, N, T, S))
    bad_q, bad_k, bad_v = given(B)
    bad_q[0, 4, 2, 1], bad_k[1, 1, 3, 0], bad_v[0, 0, 4, 2], bad_v[0, 0, 5] = np.nan, np.inf, -np.inf, np.nan
    hit = np.zeros((B, N, T), bool)
    hit[0, 4, 2] = seen[0, 4, 2].any()
    hit[1, 2:4] |= seen[1, 2:4, :, 3]
    hit[0, :2] |= seen[0, :2, :, 4] | seen[0, :2, :, 5]
    assert hit.any() and not hit.all()

    def run(kernel):
        """Heads, and the gradients of a loss without those that are hit."""

        def both(*arrays):
            without = with_gradient(lambda *arrays: jnp.where(hit[..., None], 0, attend(kernel, mask)(*arrays)))
            return attend(kernel, mask)(*arrays), *without(*arrays)[1:]

        return [np.asarray(a) for a in parity.quick(both)(bad_q, bad_k, bad_v)]

    got = run("fused")
    np.testing.assert_array_equal(np.isnan(got[0]), np.broadcast_to(hit[..., None], got[0].shape))
    assert all(np.all(np.isfinite(gradient)) for gradient in got[1:])
    assert_close(got, run("dense"))


@pytest.mark.parametrize("name", ["lengths, one of them 0", "by head", "[B, N, T, S]"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_query_that_sees_nothing_gives_zeros(name, spoilt, weights):
    mask, allowed = MASKS[name]
    seen = np.broadcast_to(allowed, (B, N, T, S))
    q, k, v = given(B)
    if spoilt:  # then the other branch computes it
        k[0, 0, 3, 0] = v[1, 2, 0, 1] = np.nan
    heads, d_q, d_k, d_v = map(np.asarray, parity.quick(with_gradient(attend(mask=mask)))(q, k, v))
    empty, unseen = ~seen.any(-1), ~seen.reshape(B, K, -1, S).any(2)
    assert empty.any() and not empty.all()
    assert not np.any(heads[empty]) and not np.any(d_q[empty]) and not np.any(d_k[unseen]) and not np.any(d_v[unseen])
    assert np.any(heads) and np.any(d_q)


def test_finite_numbers_whose_sum_overflows_are_not_bad():
    q, k, v = given(B)
    q[0, 1, 2, :2], k[0, 0, :, :2] = 3e38, 0  # no product is more than 0
    v[1, 2, :, :2], v[1, 2, 0, :2] = 0, 3e38
    with np.errstate(over="ignore"):
        assert np.isinf(np.sum(q, -1)[0, 1, 2]) and np.isinf(np.sum(v, -1)[1, 2, 0])
    got, expected = (parity.quick(attend(kernel, masks.causal()))(q, k, v) for kernel in ("fused", "dense"))
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


# Mapped axes --------------------------------------------------------------------------------------------------------


def one(kernel, q, k, v, length):
    return with_gradient(attend(kernel, masks.causal() & masks.lengths(length)))(q, k, v)


@pytest.fixture(scope="module")
def by_dense():
    return parity.quick(partial(one, "dense"))


MANY_LENGTHS = np.array([[9, 0], [3, 11], [1, 2], [11, 11], [0, 5]])
AXES = {
    "everything mapped": (0, 0, 0, 0),
    "the mask shared": (0, 0, 0, None),
    "keys shared": (0, None, 0, 0),
    "all but queries shared": (0, None, None, None),
    "all but keys and the mask shared": (None, 0, None, 0),
    "all but the mask shared": (None, None, None, 0),
    "other axes": (1, 0, 2, 1),
}


@pytest.mark.parametrize("name", AXES)
def test_a_mapped_axis_is_as_many_calls(name, by_dense):
    arrays = *given(5, B), MANY_LENGTHS
    moved = [a[0] if to is None else np.moveaxis(a, 0, to) for a, to in zip(arrays, AXES[name], strict=True)]
    got = parity.quick(jax.vmap(partial(one, "fused"), AXES[name]))(*moved)
    calls = [by_dense(*(a[0 if to is None else i] for a, to in zip(arrays, AXES[name], strict=True))) for i in range(5)]
    assert_close(got, [np.stack(each) for each in zip(*calls, strict=True)])


@pytest.mark.parametrize("shared", [(None, 0), (0, None)], ids=["outside", "inside"])
def test_two_mapped_axes_are_as_many_calls(shared, by_dense):
    """Of 5 and 3; keys and values are shared along one of them."""
    q, k, v = given(5, 3, B)
    k, v = (a[0] if shared[0] is None else a[:, 0] for a in (k, v))
    inside, outside = (0, shared[1], shared[1], None), (0, shared[0], shared[0], 0)
    got = parity.quick(jax.vmap(jax.vmap(partial(one, "fused"), inside), outside))(q, k, v, MANY_LENGTHS)
    calls = [
        [by_dense(q[i, j], *(a[j if shared[0] is None else i] for a in (k, v)), MANY_LENGTHS[i]) for j in range(3)]
        for i in range(5)
    ]
    assert_close(got, [np.stack([[call[n] for call in row] for row in calls]) for n in range(4)])


def test_without_a_mask_too():
    got = parity.quick(jax.vmap(with_gradient(attend()), (0, None, 0)))(
        *(a[0] if i == 1 else a for i, a in enumerate(given(5, B)))
    )
    q, k, v = given(5, B)
    dense = parity.quick(with_gradient(attend("dense")))
    assert_close(got, [np.stack(each) for each in zip(*(dense(q[i], k[0], v[i]) for i in range(5)), strict=True)])


def test_under_vmap_the_branch_that_is_hardly_taken_stays_one():
    """A plain vmap would compute both."""
    arrays, bound = given(5, B), np.full((5, 1, 1, T, S), np.inf, np.float32)
    text = jax.jit(jax.vmap(attend(mask=masks.causal()))).lower(*arrays).as_text()
    many = jax.jit(jax.vmap(jax.vmap(one_by_lengths))).lower(*given(2, 5, B), np.ones((2, 5, B), int)).as_text()
    q, k, v = arrays[0].reshape(5, B, K, ROWS, H), *arrays[1:]
    heads = partial(fused._heads, 1.0, (bands.Band(0, ROWS, 0, S),))
    plain = jax.jit(jax.vmap(heads)).lower(q, k, v, bound[:, :, :, :1].repeat(ROWS, 3)).as_text()
    assert [t.count("stablehlo.case") for t in (text, many, plain)] == [1, 1, 0]


def one_by_lengths(q, k, v, length):
    return attend(mask=masks.causal() & masks.lengths(length))(q, k, v)


# The backward pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hv", [H, HV])
@pytest.mark.parametrize("heads", [1, 4, 99])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_a_few_heads_at_a_time(name, heads, hv, monkeypatch):
    """With values as wide as keys one takes the place of the other; 4 heads at a time are 3, which divides the 6."""
    monkeypatch.setattr(fused_products, "_PAIRS", heads * ROWS * S)
    assert grid.fitting(ITEMS, heads) == {1: 1, 4: 3, 99: 6}[heads]
    mask = MASKS[name][0]
    got, expected = (
        parity.quick(with_gradient(attend(kernel, mask)))(*given(B, hv=hv)) for kernel in ("fused", "dense")
    )
    assert_close(got, expected)


@pytest.mark.parametrize("hv", [H, HV])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_a_few_heads_at_a_time(dtype, hv, weights, monkeypatch):
    monkeypatch.setattr(fused_products, "_PAIRS", 2 * ROWS * S)
    case: Case = masked(*MASKS["lengths, one of them 0"], sizes=Sizes(B, N, K, T, S, H, hv), dtype=dtype)
    parity.against_loops(parity.Path("fused", Tiling(B * N, T, S)), case)


@pytest.mark.parametrize("name", ["none", "by example [B, 1, T, S]"])
def test_the_gradient_of_a_gradient(name, weights, monkeypatch):
    """Also under vmap. Forward mode there is none."""
    monkeypatch.setattr(fused_products, "_PAIRS", 2 * ROWS * S)

    def second(kernel):
        """Of a sum over the gradients."""

        def loss(*heads):
            return jnp.sum(jnp.sin(attend(kernel, MASKS[name][0])(*heads)))

        def penalty(*heads):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss, (0, 1, 2))(*heads))

        return parity.quick(jax.vmap(jax.grad(penalty, (0, 1, 2)), (0, None, None)))

    q, k, v = given(B)
    got, expected = (second(kernel)(np.stack([q, 2 * q]), k, v) for kernel in ("fused", "dense"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())
    with pytest.raises(TypeError, match="forward-mode"):
        jax.eval_shape(jax.jacfwd(attend()), q, k, v)


def test_weights_are_kept_where_they_are_not_larger_than_queries_and_that_is_faster():
    kept = {
        (s, h): fused._keeps(np.zeros((1, 1, s, h))) for s, h in [(64, 64), (33, 32), (32, 32), (100, 128), (16, 16)]
    }
    assert kept == {(64, 64): True, (33, 32): False, (32, 32): True, (100, 128): False, (16, 16): False}


def test_inside_shard_map_what_varies_over_devices_is_known():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    cut = jax.sharding.PartitionSpec("batch")

    def both(*heads):
        out, pull = jax.vjp(attend(mask=masks.causal()), *heads)
        return out, *pull(2 * out)

    spread = jax.shard_map(both, mesh=mesh, in_specs=(cut,) * 3, out_specs=(cut,) * 4)
    assert_close(parity.quick(spread)(*given(B)), parity.quick(both)(*given(B)))


# Queries in bands, and in blocks --------------------------------------------------------------------------------------

ROW_BY_ROW = np.arange(T)[:, None] > np.array([2, 4, 4, 5, 5, 5, 5, 5, 5, 5, 9])  # the first band sees little
NOTHING_YET = np.arange(T)[:, None] * np.ones(S) > 3  # the first band sees nothing
IN_BANDS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.window(2, after=1),
    "lengths, one of them 0": MASKS["lengths, one of them 0"][0],
    "by head": masks.per_head(HEADS[:K]),
    "by example": masks.per_example(EXAMPLES & CAUSAL),
    "row by row": masks.dense(ROW_BY_ROW),
    "nothing at first": masks.dense(NOTHING_YET),
}


@pytest.fixture
def small(monkeypatch):
    """Bands of at most 4 queries, blocks of at most 2, the last of them padded; 2 heads at a time."""
    for name, value in {"LEAST_ROWS": 1, "TASK": 3, "_BLOCK": 2, "_PAIRS": 2 * 4 * S}.items():
        monkeypatch.setattr(fused_products, name, value)
    for name, value in {"LEAST_ROWS": 1, "_HEIGHT": 3, "_RUN": 4}.items():
        monkeypatch.setattr(bands, name, value)


def ungrouped(*leading, hv=HV):
    return tuple(numbers(i, *leading, K, *shape) for i, shape in enumerate([(T, H), (S, H), (S, hv)]))


def cut(mask, items=6, group=1, t=T, s=S):
    return [tuple(band) for band in bands.cut(mask, masks.tokens(t), masks.tokens(s), items, group)]


def test_a_band_has_the_keys_that_its_queries_may_see(small):
    assert cut(IN_BANDS["none"]) == [(0, 7, 0, 11)]
    assert cut(IN_BANDS["causal"]) == [(0, 4, 0, 4), (4, 7, 0, 8)]
    assert cut(IN_BANDS["window"]) == [(0, 7, 0, 8)]  # twice the same keys are one band
    assert cut(IN_BANDS["lengths, one of them 0"]) == [(0, 7, 0, 11)]
    assert cut(IN_BANDS["row by row"]) == [(0, 4, 0, 4), (4, 7, 0, 11)]
    assert cut(IN_BANDS["nothing at first"]) == [(0, 4, 0, 4), (4, 7, 0, 11)]
    assert cut(IN_BANDS["causal"], group=2) == [(0, 14, 0, 11)]
    assert cut(masks.window(1), t=16, s=16) == [(0, 4, 0, 4), (4, 8, 0, 8), (8, 12, 4, 12), (12, 16, 8, 16)]


def test_bands_are_high_enough_for_all_heads_together():
    heights = {items: cut(masks.causal(), items, t=1024, s=1024)[0][1] for items in (1, 4, 8, 100)}
    assert heights == {1: 1024, 4: 512, 8: 256, 100: 128}
    assert bands.compared(bands.cut(masks.causal(), masks.tokens(512), masks.tokens(512), 32)) == 320


@pytest.mark.parametrize("hv", [H, HV])
@pytest.mark.parametrize("name", IN_BANDS)
def test_in_bands_it_is_the_same(name, hv, small):
    got, expected = (
        parity.quick(with_gradient(attend(kernel, IN_BANDS[name])))(*ungrouped(B, hv=hv))
        for kernel in ("fused", "dense")
    )
    assert_close(got, expected)


def test_in_bands_gradients_of_keys_are_rounded_once(small):
    """Every query sees the first value, with a weight of 1, 1/2, 1/3, …; bfloat16 has no number between 256 and 258."""
    q = k = v = jnp.zeros((B, K, 64, H), jnp.bfloat16)
    assert len(cut(masks.causal(), t=64, s=64)) > 10
    d_out = jnp.ones_like(q).at[:, :, 0].set(256)
    *_, d_v = parity.quick(lambda *heads: jax.vjp(attend(mask=masks.causal()), *heads)[1](d_out))(q, k, v)
    expected = 255 + np.sum(1 / np.arange(1, 65))
    np.testing.assert_allclose(d_v[:, :, 0].astype(np.float32), expected, rtol=2**-8)


@pytest.mark.parametrize("name", ["causal", "by example", "row by row"])
def test_in_bands_too_what_is_not_finite_stays_where_it_is_seen(name, small):
    q, k, v = ungrouped(B)
    k[1, 1, 3, 0], v[0, 0, 4, 2] = np.nan, np.inf
    got, expected = (parity.quick(attend(kernel, IN_BANDS[name]))(q, k, v) for kernel in ("fused", "dense"))
    clean = parity.quick(attend("fused", IN_BANDS[name]))(*ungrouped(B))
    hit = np.isnan(got).any(-1)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(np.asarray(got)[~hit], np.asarray(clean)[~hit])
    assert hit.any() and not hit.all()


def test_in_bands_axes_are_mapped_and_gradients_have_gradients(small):
    def penalty(kernel, length, *heads):
        mask = masks.causal() & masks.lengths(length)
        gradients = jax.grad(lambda *heads: jnp.sum(jnp.sin(attend(kernel, mask)(*heads))), (0, 1, 2))(*heads)
        return sum(jnp.sum(jnp.sin(g)) for g in gradients)

    second = lambda kernel: jax.vmap(jax.grad(partial(penalty, kernel), (1, 2, 3)))  # noqa: E731
    given = np.array([[9, 0], [3, 11]]), *ungrouped(2, B)
    got, expected = (parity.quick(second(kernel))(*given) for kernel in ("fused", "dense"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())


# Where a gradient is taken, in tiles --------------------------------------------------------------------------------


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older compilers do not fuse so many")
def test_without_a_mask_more_than_256_keys_are_fused_for_values_and_tiled_for_gradients():
    q, k, v = numbers(0, B, 2, 9, H), numbers(1, B, 1, 300, H), numbers(2, B, 1, 300, HV)
    value = parity.quick(attend("auto"))(q, k, v)
    np.testing.assert_array_equal(value, parity.quick(attend("fused"))(q, k, v))
    got = parity.quick(jax.vmap(with_gradient(attend("auto"))))(q, k, v)
    for kernel in ("dense", "blockwise"):
        assert_close(got, parity.quick(jax.vmap(with_gradient(attend(kernel))))(q, k, v))
    assert "while" not in str(jax.make_jaxpr(attend("auto"))(q, k, v))


# What the compiler makes of it with all its optimisations -----------------------------------------------------------


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older compilers write the logits down")
@pytest.mark.parametrize(
    ("mask", "batch", "length"),
    [(None, 16, 256), (masks.causal(), 16, 256), (None, 1, 128)],
    ids=["all", "causal", "few queries"],
)
def test_the_logits_of_all_heads_are_not_written_down(mask, batch, length, full_compiles):
    num_heads, width = 8, 16
    heads = jax.ShapeDtypeStruct((batch, num_heads, length, width), jnp.float32)
    # Newer compilers fuse the dense path's too; its gradient keeps the weights.
    fused, kept = (
        full_compiles(function).lower(heads, heads, heads).compile().memory_analysis().temp_size_in_bytes
        for function in (attend("fused", mask), with_gradient(attend("dense", mask)))
    )
    logits = batch * num_heads * length * length * 4
    assert fused < logits / 4
    assert kept >= logits


def test_where_values_and_gradients_go_different_ways_gradients_have_gradients():
    """Without a mask, more keys than one task has room for: fused for values, in tiles for the gradient."""
    q, k, v = numbers(1, 1, 2, 270, 4), numbers(2, 1, 1, 270, 4), numbers(3, 1, 1, 270, 3)
    assert kernels.explain(*[np.zeros((32, 2, 270, 4), np.float32)] * 3).gradient == "blockwise"

    def gradient_of_gradient(path):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(path(q, k, v)))

        return parity.quick(jax.grad(lambda *given: jnp.sum(jax.grad(loss)(*given) ** 2), (0, 1, 2)))(q, k, v)

    got = gradient_of_gradient(partial(either.attend, scale=0.5, tiling=Tiling(1, 90, 135)))
    expected = gradient_of_gradient(attend("dense"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())
