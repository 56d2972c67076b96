"""Finite numbers that are large enough to spoil others: behind a mask, or added to a whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import Path, attend
from reference import numbers

from mhajax import kernels, masks
from mhajax.kernels import Tiling

pytestmark = pytest.mark.usefixtures("quick_compiles")

N, T, UNSEEN = 2, 9, slice(7, None)
MASK = masks.causal() & masks.lengths(np.array([7]))
PATHS = {
    "dense": Path("dense"),
    "blockwise": Path("blockwise", Tiling(1, 4, 5)),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_masked_number_that_is_nearly_infinite_changes_nothing(name):
    path = PATHS[name]
    q, k, v, d_heads = (numbers(i, 1, N, T, 4).astype(np.float32) for i in range(4))

    @jax.jit
    def both(q, k, v):
        heads, pull = jax.vjp(lambda *given: attend(path, *given, mask=MASK)[0], q, k, v)
        return heads, *pull(d_heads)

    expected = both(q, k, v)
    for which in (0, 1, 2):
        given = [q.copy(), k.copy(), v.copy()]
        if which:  # of both signs, so that products overflow to NaN too
            given[which][:, :, UNSEEN] = 3e38 * np.sign(given[which][:, :, UNSEEN])
        for a, b in zip(both(*given), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_rows_with_a_constant_bias_have_the_gradient_of_the_dense_path():
    """A padded query's row, hidden by -1e9: where log S is lost, weights of 1 were given to every key."""
    length, hidden = 600, slice(10, 20)
    q, k, v = (numbers(i, 1, 1, length, 4).astype(np.float32) for i in range(3))
    bias = np.zeros((length, length), np.float32)
    bias[hidden] = -1e9
    places = {"queries": masks.tokens(length), "keys": masks.tokens(length)}
    assert kernels.explain(q, k, v, bias=bias).kernel == "blockwise"

    def gradients(kernel):
        loss = lambda *given: jnp.sum(jnp.cos(kernels.attend(*given, bias=bias, kernel=kernel, **places)[0]))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for a, b in zip(gradients("auto"), gradients("dense"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b)))
