"""Rotary positions turn, and only their difference counts; sinusoids are sines."""

from functools import partial

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
        (partial(positions.sinusoids, jnp.arange(T), 5), ("positions.sinusoids", "even", "5", "d_model")),
    ],
)
def test_odd_widths_are_refused(do, parts):
    with pytest.raises(ValueError) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []
