"""Paths of accelerators: splash interpreted, cuDNN's arguments, the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_heads import LENGTHS, B, S, T, assert_close, attend, heads_of, with_gradients
from tiers import tiered

from mhajax import kernels, masks, scores
from mhajax.kernels import Inputs
from mhajax.kernels.external import cudnn, guard, splash
from mhajax.masks import Tokens, tokens

RANDOM = np.random.default_rng(7)
QUERY_SEGMENTS, KEY_SEGMENTS = RANDOM.integers(-1, 3, (B, T)), RANDOM.integers(0, 4, (B, S))


# ---- splash attention, interpreted

SPLASH = {
    "no mask, tokens that are no whole block": (None, T, S),
    "causal, several blocks": (masks.causal(), 530, 541),
    "window beyond the last key, lengths": (masks.window(3) & masks.lengths(LENGTHS), 139, S),
    "window to both sides": (masks.window(3, after=2), T, S),
    "traced lengths": (masks.lengths(jnp.array(LENGTHS)), T, S),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLASH)
def test_splash_equals_dense(name, quick_compiles):
    mask, t, s = SPLASH[name]
    given = heads_of(t, s)
    got, expected = (with_gradients(attend(t, s, mask=mask, kernel=path))(*given) for path in ("splash", "dense"))
    assert_close(got, expected)


@pytest.fixture(scope="module")
def everything():
    """Grouped heads, causal, segments of which some match nothing, lengths of which one is 0."""
    return masks.causal() & masks.segments(QUERY_SEGMENTS, KEY_SEGMENTS) & masks.lengths(LENGTHS)


@pytest.fixture(scope="module")
def by_splash(everything, quick_compiles):
    return with_gradients(attend(mask=everything, kernel="splash"))


@pytest.fixture(scope="module")
def by_dense(everything):
    return with_gradients(attend(mask=everything, kernel="dense"))


@pytest.mark.slow
def test_splash_with_everything_equals_dense(by_splash, by_dense):
    given = heads_of()
    got = by_splash(*given)
    assert_close(got, by_dense(*given))
    assert not np.any(got[0][1]) and not np.any([np.any(g[1]) for g in got[1:]])  # nothing to attend to


@pytest.mark.slow
def test_splash_keeps_nan_where_it_is_seen(by_splash, by_dense):
    """A bad value behind the length reaches nothing; a bad key in front of it only the queries that see it."""
    q, k, v = heads_of()
    v[0, :, 10] = np.nan
    assert all(np.all(np.isfinite(a)) for a in by_splash(q, k, v))
    k[0, 0, 2] = np.inf
    got, expected = by_splash(q, k, v)[0], by_dense(q, k, v)[0]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.any(np.isnan(got)) and not np.all(np.isnan(got[0, :2]))


@pytest.mark.slow
def test_asking_splash_for_log_sums_changes_no_bit_of_the_heads(everything, quick_compiles):
    """Splash gives none that have gradients, so the blockwise path is asked beside it."""
    given = heads_of()

    def look(path, capture):
        options = {"queries": tokens(T), "keys": tokens(S), "mask": everything, "kernel": path, "capture": capture}
        return jax.jit(lambda q, k, v: kernels.attend(q, k, v, **options))(*given)

    (heads, seen), (plain, _) = look("splash", ("log_sum_exp",)), look("splash", ())
    np.testing.assert_array_equal(heads, plain)
    np.testing.assert_allclose(seen["log_sum_exp"], look("dense", ("log_sum_exp",))[1]["log_sum_exp"], rtol=2e-6)


def test_segments_are_told_apart_whatever_their_numbers():
    """Renumbering neither overflows nor confuses a key of an unknown segment with another."""
    most = np.iinfo(np.int32)
    asking, answering = np.array([most.max, 5, most.min, 5]), np.array([most.min, 4, most.max, 5, 6])
    a, b = splash._numbered(jnp.asarray(asking), jnp.asarray(answering))
    np.testing.assert_array_equal(a[:, None] == b, asking[:, None] == answering)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 512, 513, 600, 1025, 8192])
def test_blocks_are_whole_lanes_and_padding_is_small(size):
    block = splash._block(size)
    assert block % 128 == 0 and block <= 512
    whole = splash._whole(size, block)
    assert whole >= size and whole - size < 128 * -(-size // 512)


# ---- cuDNN: there is no such GPU here, so its arguments go to JAX's own implementation of the same function

CUDNN = {
    "no mask": (None, S),
    "causal": (masks.causal(), T),
    "causal and window": (masks.causal() & masks.window(3), T),
    "lengths, one of them 0": (masks.lengths(LENGTHS), S),
    "causal and lengths": (masks.causal() & masks.lengths(LENGTHS), T),
}


@pytest.mark.parametrize("name", tiered(CUDNN, "causal and lengths"))
def test_the_arguments_for_cudnn_say_what_the_mask_says(name):
    mask, s = CUDNN[name]
    q, k, v = heads_of(s=s, h=8, hv=8)
    if mask is not None:
        v[0, :, 10] = np.where(name.endswith("lengths") or "0" in name, np.nan, v[0, :, 10])  # behind the length
    call = functools.partial(cudnn.call, mask=mask, scale=0.3, implementation="xla")
    got = with_gradients(lambda q, k, v: guard.around(call, Inputs(q, k, v, tokens(T), tokens(s), mask)))(q, k, v)
    assert_close(got, with_gradients(attend(s=s, mask=mask, scale=0.3, kernel="dense"))(q, k, v))


def test_cudnn_is_refused_without_it():
    assert "NVIDIA" in cudnn.absence()
    with pytest.raises(ValueError, match="kernel='cudnn' cannot do this: cuDNN needs an NVIDIA GPU; use .* dense"):
        attend(kernel="cudnn")(*heads_of())


# ---- which path is taken


def explain(platform, t=4096, s=4096, h=64, hv=64, dtype=jnp.bfloat16, **options):
    shapes = [(1, 8, t, h), (1, 8, s, h), (1, 8, s, hv)]
    return kernels.explain(*(jax.ShapeDtypeStruct(a, dtype) for a in shapes), platform=platform, **options)


def test_each_platform_has_its_path():
    for mask in (None, masks.causal(), masks.causal() & masks.window(200), masks.lengths(jnp.array([7]))):
        assert explain("gpu", mask=mask).kernel == "cudnn"
        assert explain("tpu", mask=mask).kernel == "splash"
        assert explain("cpu", mask=mask).kernel == "blockwise"
    assert {explain(platform, 8, 8).kernel for platform in ("cpu", "gpu", "tpu")} == {"dense"}
    assert explain("tpu", 100).kernel == "blockwise"  # a block would be mostly padding


SHIFTED = Tokens(0, np.arange(4096) + 3)
REFUSED = {  # platform, what is asked for, and what the reason must hold
    "float32": ("gpu", {"dtype": jnp.float32}, "float16 or bfloat16, not float32"),
    "wide": ("gpu", {"h": 136, "hv": 136}, "H=136"),
    "odd width": ("gpu", {"h": 60, "hv": 60}, "H=60"),
    "wider values": ("gpu", {"hv": 128}, "Hv=128"),
    "causal, T ≠ S": ("gpu", {"s": 4000, "mask": masks.causal()}, "T=4096 and S=4000"),
    "window ahead": ("gpu", {"mask": masks.window(2, after=3)}, "look back only"),
    "segments on a GPU": ("gpu", {"mask": masks.segments(np.zeros(4096, int))}, "no segments"),
    "bias": ("tpu", {"bias": np.zeros((1, 1))}, "no bias"),
    "score": ("tpu", {"score": scores.alibi(8)}, "no score function"),
    "dropout": ("tpu", {"dropout_rate": 0.1}, "no dropout"),
    "another mask": ("tpu", {"mask": masks.chunk(64)}, "chunk(64)"),
    "other positions": ("tpu", {"mask": masks.causal(), "queries": SHIFTED}, "compares indices"),
    "other start": ("tpu", {"mask": masks.lengths(3), "keys": tokens(4096)._replace(start=1)}, "start at index 0"),
    "cache": ("tpu", {"cached": True}, "cache"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_path_cannot_do_goes_to_another(name):
    """And asking for it by name is an error that says why, and who can."""
    platform, asked, reason = REFUSED[name]
    path = {"gpu": "cudnn", "tpu": "splash"}[platform]
    picked = explain(platform, **asked)
    assert picked.kernel == ("dense" if "cached" in asked else "blockwise")
    assert reason in picked.others[path] and f"not {path}: " in str(picked)
    with pytest.raises(ValueError) as caught:
        explain(platform, kernel=path, **asked)
    assert reason in str(caught.value) and picked.kernel in str(caught.value)


def test_a_traced_window_is_refused():
    seen = []
    jax.jit(lambda n: seen.append(explain("tpu", mask=masks.window(n))))(3)
    assert seen[0].kernel == "blockwise" and "known when the program is traced" in seen[0].others["splash"]


def test_shifted_together_is_the_same_as_not_shifted():
    assert explain("tpu", mask=masks.causal(), queries=SHIFTED, keys=SHIFTED).kernel == "splash"
