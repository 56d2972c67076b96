"""Dropout: the right share, no structure, the same bits everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhajax import dropout

KEY = jax.random.key(5)
keep = jax.jit(dropout.keep, static_argnums=(1, 2))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_stays_is_binomial(rate):
    count = 2**18
    spread = np.sqrt(rate * (1 - rate) / count)
    shares = [np.mean(keep(jax.random.key(seed), rate, (count,))) for seed in range(8)]
    assert np.max(np.abs(np.array(shares) - (1 - rate))) < 4 * spread
    assert abs(np.mean(shares) - (1 - rate)) < 4 * spread / np.sqrt(8)
    assert np.std(shares) > spread / 4  # the keys do differ


def test_elements_rows_and_keys_are_uncorrelated():
    rows, columns = 512, 512
    bits = np.asarray(keep(KEY, 0.3, (rows, columns)), float)
    other = np.asarray(keep(jax.random.key(6), 0.3, (rows, columns)), float)
    folded = np.asarray(keep(jax.random.fold_in(KEY, 1), 0.3, (rows, columns)), float)
    pairs = {
        "neighbours in a row": (bits[:, 1:], bits[:, :-1]),
        "neighbours in a column": (bits[1:], bits[:-1]),
        "every second": (bits[:, 2:], bits[:, :-2]),
        "distance 64": (bits[:, 64:], bits[:, :-64]),
        "across the diagonal": (bits, bits.T),
        "keys": (bits, other),
        "folded keys": (bits, folded),
        "a key and another shifted by one": (bits[:, 1:], other[:, :-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size), name
    for axis in (0, 1):  # sums of rows and columns are binomial too
        assert abs(np.std(bits.sum(axis)) / np.sqrt(512 * 0.3 * 0.7) - 1) < 0.15


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1, 5), (2, 3, 5, 7), (0, 3)])
def test_any_shape_is_the_same_stream_in_row_major_order(shape):
    """An element's bit depends on the key and its own index: the contract with paths that work in blocks."""
    got = keep(KEY, 0.4, shape)
    assert got.shape == shape and got.dtype == bool
    flat = keep(KEY, 0.4, (max(got.size, 1),))[: got.size]
    np.testing.assert_array_equal(got, flat.reshape(shape))


def test_bits_are_these():
    """Runs are exact from version to version: these were written down once."""
    bits = np.asarray(keep(jax.random.key(0), 0.5, (4, 8))).astype(int)
    assert ["".join(map(str, row)) for row in bits] == ["11000101", "01001111", "00110100", "01111000"]


def test_eager_and_compiled_are_the_same():
    np.testing.assert_array_equal(dropout.keep(KEY, 0.4, (3, 5)), keep(KEY, 0.4, (3, 5)))
    np.testing.assert_array_equal(keep(KEY, 0.4, (3, 5)), keep(KEY, 0.4, (3, 5)))


def test_vmap_over_keys_is_a_loop():
    keys = jax.random.split(KEY, 4)
    together = jax.jit(jax.vmap(lambda key: dropout.keep(key, 0.4, (3, 5))))(keys)
    np.testing.assert_array_equal(together, jnp.stack([keep(key, 0.4, (3, 5)) for key in keys]))
    assert len({bits.tobytes() for bits in np.asarray(together)}) == 4


def test_what_stays_is_scaled_and_the_mean_is_kept():
    x = jnp.full((64, 1024), 3.0)
    out = dropout.dropout(x, 0.25, KEY)
    np.testing.assert_allclose(np.unique(out), [0, 4], rtol=1e-6)
    assert abs(float(jnp.mean(out)) - 3) < 4 * 3 * np.sqrt(0.25 / 0.75 / x.size)
    assert dropout.dropout(x.astype(jnp.bfloat16), 0.25, KEY).dtype == jnp.bfloat16


def test_without_key_or_rate_nothing_happens():
    x = jnp.arange(6.0)
    assert dropout.dropout(x, 0.5, None) is x
    assert dropout.dropout(x, 0.0, KEY) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_is_a_probability_below_one(rate):
    with pytest.raises(ValueError, match=r"who: name must be in \[0, 1\), got .*share that is set to zero"):
        dropout.check_rate("who", "name", rate)
