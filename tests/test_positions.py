"""Rotary positions turn, and only their difference counts; frequencies are those of the papers; sinusoids are sines."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhajax import positions

T, H = 7, 10
rotary = jax.jit(positions.rotary, static_argnames="base")


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (3, T, H))


@pytest.mark.parametrize("base", [10_000.0, 7.0])
def test_rotary_is_this_rotation(x, base):
    angles = np.arange(T)[:, None] * base ** (-2 * np.arange(H // 2) / H)
    turned = (np.float64(x[..., : H // 2]) + 1j * np.float64(x[..., H // 2 :])) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotary(x, jnp.arange(T), base=base), expected, atol=3e-6)


def test_logits_depend_on_the_difference_of_positions_only(x):
    q, k = x[:2]
    dots = lambda shift: rotary(q, jnp.arange(T) + shift) @ rotary(k, jnp.arange(T) + shift).T  # noqa: E731
    np.testing.assert_allclose(dots(0), dots(113), atol=1e-4)
    moved = rotary(q, jnp.arange(T) + 1) @ rotary(k, jnp.arange(T)).T
    assert np.max(np.abs(moved - dots(0))) > 0.5


def test_norms_are_kept_and_position_0_is_left_alone(x):
    turned = rotary(x, 1000 + jnp.arange(T))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(rotary(x, jnp.zeros(T, int)), x)


def test_positions_may_differ_between_sequences(x):
    places = jnp.array([np.arange(T), np.arange(T)[::-1], np.arange(T) * 3])
    together = rotary(x, places)
    np.testing.assert_allclose(together, jnp.stack([rotary(*one) for one in zip(x, places, strict=True)]), atol=1e-6)


def test_rotary_keeps_the_dtype_and_computes_in_float32(x):
    half = x.astype(jnp.bfloat16)
    turned = rotary(half, 500 + jnp.arange(T))
    assert turned.dtype == jnp.bfloat16
    exact = rotary(half.astype(jnp.float32), 500 + jnp.arange(T))
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("fewer", [0, 1, 2])
def test_interleaved_pairs_are_neighbours_and_few_frequencies_turn_the_first_channels(x, fewer):
    """The two conventions are one rotation with the channels in another order."""
    turned = H - 2 * fewer
    speeds = np.float32([1.0, 0.3, 0.02, 0.7, 0.001])[: turned // 2]
    angles = np.arange(50, 50 + T)[:, None] * np.float64(speeds)
    for function, first, second in (
        (positions.rotary, slice(0, turned // 2), slice(turned // 2, turned)),
        (positions.rotary_interleaved, slice(0, turned, 2), slice(1, turned, 2)),
    ):
        pairs = 1.5 * (np.float64(x[..., first]) + 1j * np.float64(x[..., second])) * np.exp(1j * angles)
        expected = np.array(x, np.float64)
        expected[..., first], expected[..., second] = pairs.real, pairs.imag
        got = function(x, 50 + jnp.arange(T), frequencies=speeds, magnitude=1.5)
        np.testing.assert_allclose(got, expected, atol=3e-5)
        np.testing.assert_array_equal(got[..., turned:], x[..., turned:])


@pytest.mark.parametrize("function", [positions.rotary, positions.rotary_interleaved])
def test_frequencies_of_the_base_are_the_base(x, function):
    places = jnp.arange(T) * 11
    by_base = function(x, places, base=500.0)
    np.testing.assert_allclose(function(x, places, frequencies=positions.frequencies(H, 500.0)), by_base, atol=1e-5)
    assert np.max(np.abs(function(x, places) - by_base)) > 0.1


# What transformers 5.24.0 gives for these: `ROPE_INIT_FUNCTIONS` (frequencies, and the factor of cosines and sines).
OF_TRANSFORMERS = {
    "linear": (
        lambda: positions.linear(positions.frequencies(10), 4.0),
        [0.25, 0.03962232917547226, 0.0062797158025205135, 0.0009952676482498646, 0.00015773932682350278],
    ),
    "dynamic": (
        lambda: positions.dynamic_ntk(positions.frequencies(10), 2.0, length=5000, original_length=2048),
        [1.0, 0.11290505528450012, 0.012747550383210182, 0.0014392627635970712, 0.00016250005865003914],
    ),
    "yarn": (
        lambda: positions.yarn(positions.frequencies(22), 4.0, original_length=4096),
        [1.0, 0.4328761398792267, 0.18738172948360443, 0.08111307770013809, 0.02984512411057949, 0.010639376938343048,
         0.0036186319775879383, 0.0011392144951969385, 0.00030821163090877235, 0.00013341748854145408,
         5.775323006673716e-05],
    ),
    "yarn, as in gpt-oss": (
        lambda: positions.yarn(positions.frequencies(22, 150_000.0), 32.0, original_length=4096, whole=False),
        [1.0, 0.3384123742580414, 0.11452293395996094, 0.036195918917655945, 0.008276992477476597,
         0.0014568106271326542, 4.6938308514654636e-05, 1.5884510503383353e-05, 5.375512955652084e-06,
         1.8191408344137017e-06, 6.156195127005049e-07],
    ),
    "llama3": (
        lambda: positions.llama3(positions.frequencies(22, 500_000.0), 8.0, original_length=8192),
        [1.0, 0.3033275306224823, 0.0920075848698616, 0.027908431366086006, 0.008465394377708435,
         0.0020793848671019077, 0.00010088174894917756, 2.9531996915466152e-05, 8.957863428804558e-06,
         2.7171674901182996e-06, 8.241913178608229e-07],
    ),
    "longrope, short": (
        lambda: _longrope(4096),
        [0.9523810148239136, 0.14408119022846222, 0.020932385697960854, 0.002948941197246313, 0.0004206382145639509],
    ),
    "longrope, long": (
        lambda: _longrope(4097),
        [0.9090908765792847, 0.06339572370052338, 0.002790984697639942, 0.00013270236377138644, 1.009531752060866e-05],
    ),
}  # fmt: skip
SHORT, LONG = [1.05, 1.1, 1.2, 1.35, 1.5], [1.1, 2.5, 9.0, 30.0, 62.5]


def _longrope(length):
    return positions.longrope(positions.frequencies(10), SHORT, LONG, length=length, original_length=4096)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_frequencies_are_those_of_transformers(name):
    make, expected = OF_TRANSFORMERS[name]
    np.testing.assert_allclose(make(), expected, rtol=2e-6)


def test_the_magnitude_of_yarn_is_that_of_transformers():
    np.testing.assert_allclose(
        [positions.yarn_magnitude(factor) for factor in (0.5, 1.0, 4.0, 32.0)],
        [1.0, 1.0, 1.138629436111989, 1.3465735902799727],
        rtol=1e-12,
    )


def test_the_magnitudes_of_deepseek_and_of_longrope_are_those_of_transformers():
    of_deepseek = [(1.0, 1.0), (1.0, 0.8), (0.707, 0.707), (0.7, 1.4)]
    np.testing.assert_allclose(
        [positions.yarn_magnitude(40.0, mscale=one, mscale_all_dim=other) for one, other in of_deepseek],
        [1.0, 1.0569662567531275, 1.0, 0.8297189272888398],
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        [positions.longrope_magnitude(factor, 4096) for factor in (0.5, 1.0, 32.0)],
        [1.0, 1.0, 1.1902380714238083],
        rtol=1e-12,
    )


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("slow, fast", [(1.0, 32.0), (2.0, 16.0)])
def test_yarn_is_the_formula_of_transformers(whole, slow, fast):
    """`rope_type` "yarn", written again in NumPy: beta_slow, beta_fast, truncate."""
    width, base, factor, length = 64, 500_000.0, 8.0, 4096
    index = lambda turns: width * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(base))  # noqa: E731
    first, last = index(fast), index(slow)
    if whole:
        first, last = np.floor(first), np.ceil(last)
    plain = base ** (-2 * np.arange(width // 2) / width)
    slowed = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    assert 2 < np.sum((slowed > 0) & (slowed < 1)) < width // 2 - 2
    got = positions.yarn(
        positions.frequencies(width, base), factor, original_length=length, slow=slow, fast=fast, whole=whole
    )
    np.testing.assert_allclose(got, plain / factor * slowed + plain * (1 - slowed), rtol=1e-5)


def test_longrope_is_one_program_for_short_and_long_texts():
    traced = jax.jit(chex.assert_max_traces(_longrope, 1))
    for length, factors in ((1, SHORT), (4096, SHORT), (4097, LONG)):
        expected = 10_000.0 ** (-2 * np.arange(5) / 10) / np.array(factors)
        np.testing.assert_allclose(traced(length), expected, rtol=1e-6)


def test_ntk_is_another_base():
    """Definition 1 of the YaRN paper."""
    base, factor, width = 300.0, 5.0, 14
    expected = (base * factor ** (width / (width - 2))) ** (-2 * np.arange(width // 2) / width)
    np.testing.assert_allclose(positions.ntk(positions.frequencies(width, base), factor), expected, rtol=1e-6)


def test_dynamic_ntk_leaves_short_texts_alone():
    plain = positions.frequencies(H)
    grow = jax.jit(lambda length: positions.dynamic_ntk(plain, 3.0, length=length, original_length=100))
    np.testing.assert_array_equal(grow(100), plain)
    np.testing.assert_array_equal(grow(7), plain)
    np.testing.assert_allclose(grow(250), positions.ntk(plain, 3 * 2.5 - 2), rtol=1e-6)


def test_the_ramp_of_the_yarn_paper_goes_by_turns():
    """Section 3.2, equations of γ and h, which `yarn` says is `llama3` with 1 and 32."""
    plain, length, factor = np.float64(positions.frequencies(24, 10_000.0)), 2048, 8.0
    turns = length / (2 * np.pi / plain)
    gamma = np.where(turns < 1, 0, np.where(turns > 32, 1, (turns - 1) / 31))
    assert 0 < np.sum((gamma > 0) & (gamma < 1))
    got = positions.llama3(positions.frequencies(24), factor, original_length=length, low=1, high=32)
    np.testing.assert_allclose(got, (1 - gamma) * plain / factor + gamma * plain, rtol=1e-6)


def test_yarn_leaves_pairs_alone_that_are_all_fast():
    plain = positions.frequencies(8, 10.0)
    np.testing.assert_array_equal(positions.yarn(plain, 4.0, original_length=1_000_000), plain)


@pytest.mark.parametrize("base", [10_000.0, 7.0])
def test_sinusoids_are_sines_and_cosines(base):
    places = np.array([[0, 1, 5], [2, 100, 3]])
    angles = places[..., None] * base ** (-2 * np.arange(H // 2) / H)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    got = positions.sinusoids(jnp.asarray(places), H, base=base)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("do", "parts"),
    [
        (partial(positions.rotary, jnp.ones((T, 5)), jnp.arange(T)), ("positions.rotary", "even", "H=5", "head_dim")),
        (
            partial(positions.rotary_interleaved, jnp.ones((T, 5)), jnp.arange(T)),
            ("positions.rotary_interleaved", "even", "H=5", "head_dim"),
        ),
        (partial(positions.frequencies, 5), ("positions.frequencies", "even", "5")),
        (partial(positions.sinusoids, jnp.arange(T), 5), ("positions.sinusoids", "even", "5", "d_model")),
    ],
)
def test_odd_widths_are_refused(do, parts):
    with pytest.raises(ValueError) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("do", "parts"),
    [
        (
            partial(positions.rotary, jnp.ones((T, H)), jnp.arange(T), base=7.0, frequencies=jnp.ones(4)),
            ("positions.rotary", "base=7.0", "positions.frequencies(8, 7.0)"),
        ),
        (
            partial(positions.rotary, jnp.ones((T, H)), jnp.arange(T), frequencies=jnp.ones(6)),
            ("positions.rotary", "H/2 = 5", "(6,)", "H=10"),
        ),
        (
            partial(positions.rotary, jnp.ones((T, H)), jnp.arange(T), frequencies=jnp.ones((2, 3))),
            ("positions.rotary", "[R]", "(2, 3)"),
        ),
        (partial(positions.ntk, jnp.ones(1), 2.0), ("positions.ntk", "at least 2", "1")),
        (partial(positions.yarn, jnp.ones(1), 2.0, original_length=9), ("positions.yarn", "at least 2", "1")),
        (
            partial(positions.llama3, jnp.ones(3), 2.0, original_length=9, low=4.0, high=4.0),
            ("positions.llama3", "above low", "low=4.0", "high=4.0"),
        ),
        (
            partial(positions.longrope, jnp.ones(5), SHORT, LONG[:4], length=9, original_length=9),
            ("positions.longrope", "long_factor", "(5,)", "(4,)"),
        ),
        (
            partial(positions.yarn_magnitude, 2.0, mscale=-1.0, mscale_all_dim=1.0),
            ("positions.yarn_magnitude", "negative", "-1.0"),
        ),
    ],
)
def test_frequencies_that_do_not_fit_are_refused(do, parts):
    with pytest.raises(ValueError) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("wrong", [0.0, -2.0, float("nan"), float("inf")])
def test_nothing_is_scaled_by_what_is_no_factor(wrong):
    given, refused = positions.frequencies(8), r"positions\..*must be finite and above 0, got"
    x = jnp.ones((2, 3, 8))
    for do in (
        lambda: positions.linear(given, wrong),
        lambda: positions.ntk(given, wrong),
        lambda: positions.dynamic_ntk(given, wrong, length=9, original_length=8),
        lambda: positions.yarn(given, wrong, original_length=8),
        lambda: positions.yarn(given, 2.0, original_length=wrong),  # pyright: ignore[reportArgumentType]
        lambda: positions.llama3(given, wrong, original_length=8),
        lambda: positions.longrope(given, [1.0] * 4, [1.0, 1.0, wrong, 1.0], length=9, original_length=8),
        lambda: positions.frequencies(8, wrong),
        lambda: positions.rotary(x, jnp.arange(3), base=wrong),
    ):
        with pytest.raises(ValueError, match=refused):
            do()


def test_sizes_and_turns_out_of_range_are_refused():
    with pytest.raises(ValueError, match="positions.frequencies: width must be at least 1, got 0"):
        positions.frequencies(0)
    with pytest.raises(ValueError, match="slow must be above 0 and below fast, got slow=40.0 and fast=32.0"):
        positions.yarn(positions.frequencies(8), 2.0, original_length=8, slow=40.0)
