"""The chunked loss against the plain one: value, gradient, weights, label smoothing."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import tiered

from mhajax import losses

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, V = 3, 5, 7, 11
_random = np.random.default_rng(0)
FEATURES: Any = _random.normal(size=(B, T, D)).astype(np.float32)
TABLE: Any = _random.normal(size=(V, D)).astype(np.float32)
TARGETS: Any = _random.integers(0, V, (B, T))
WEIGHTS: Any = _random.random((B, T)).astype(np.float32) * (_random.random((B, T)) < 0.7)


def plain(features, table, targets, weights, smoothing):
    """With all logits at once, by Optax and by the dense formula of label smoothing."""
    logits = features @ table.T
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    wanted = optax.smooth_labels(jax.nn.one_hot(targets, table.shape[0]), smoothing)
    loss = optax.softmax_cross_entropy(logits, wanted)
    correct = jnp.argmax(logits, -1) == targets
    return losses.Sums(*(jnp.sum(weights * a) for a in (loss, cross_entropy, correct, jnp.ones_like(loss))))


def value_gradient(function):
    """All sums, and the gradient of twice the loss with respect to features and table."""

    def twice(features, table):
        sums = function(features, table)
        return 2 * sums.loss, sums

    (_, sums), gradient = jax.jit(jax.value_and_grad(twice, argnums=(0, 1), has_aux=True))(FEATURES, TABLE)
    return sums, gradient


@pytest.mark.parametrize("chunk", tiered([1, 4, 15, 512], 4))  # 15 tokens: 4 does not divide, 512 is more
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_plain_loss_and_its_gradient(chunk, smoothing, weighted):
    weights = WEIGHTS if weighted else None
    ours = partial(
        losses.linear_cross_entropy, targets=TARGETS, weights=weights, label_smoothing=smoothing, chunk=chunk
    )
    theirs = partial(plain, targets=TARGETS, weights=WEIGHTS if weighted else 1.0, smoothing=smoothing)
    (sums, gradient), (expected, expected_gradient) = value_gradient(ours), value_gradient(theirs)
    for got, want in zip(sums, expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-6)
    for got, want in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_without_gradient_the_sums_are_the_same():
    ours = jax.jit(partial(losses.linear_cross_entropy, label_smoothing=0.1, chunk=4))
    for got, want in zip(
        ours(FEATURES, TABLE, TARGETS, WEIGHTS), plain(FEATURES, TABLE, TARGETS, WEIGHTS, 0.1), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-6)


def test_vmap_over_seeds_is_a_loop():
    features, table = np.stack([FEATURES, FEATURES[::-1]]), np.stack([TABLE, 2 * TABLE])
    loss = lambda f, t: losses.linear_cross_entropy(f, t, TARGETS, WEIGHTS, chunk=4).loss  # noqa: E731
    function = jax.value_and_grad(loss, argnums=(0, 1))
    together = jax.jit(jax.vmap(function))(features, table)
    once = jax.jit(function)
    for i in range(2):
        jax.tree.map(
            lambda got, want, i=i: np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6),
            together,
            once(features[i], table[i]),
        )


def test_features_may_have_any_leading_axes():
    loss = jax.jit(losses.linear_cross_entropy)
    whole = loss(FEATURES, TABLE, TARGETS).loss
    np.testing.assert_allclose(loss(FEATURES.reshape(-1, D), TABLE, TARGETS.reshape(-1)).loss, whole, rtol=1e-6)
    one = loss(FEATURES[0, 0], TABLE, TARGETS[0, 0])
    assert one.weight == 1 and one.loss.shape == ()


@pytest.mark.slow
def test_bfloat16_features_give_float32_sums_and_bfloat16_gradients():
    features = jnp.asarray(FEATURES, jnp.bfloat16)

    def loss(features, table):
        sums = losses.linear_cross_entropy(features, table, TARGETS, label_smoothing=0.1, chunk=4)
        return sums.loss, sums

    (_, sums), (d_features, d_table) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(features, TABLE)
    assert all(a.dtype == jnp.float32 for a in (*sums, d_table)) and d_features.dtype == jnp.bfloat16
    exact = features.astype(jnp.float32)
    np.testing.assert_allclose(sums.loss, jax.jit(plain)(exact, TABLE, TARGETS, 1.0, 0.1).loss, rtol=1e-5)
    naive = lambda f, t: plain(f, t.astype(f.dtype), TARGETS, 1.0, 0.1).loss  # noqa: E731
    wanted = jax.grad(naive, argnums=(0, 1))(exact, TABLE)
    for got, rough, want in zip(
        (d_features, d_table), jax.grad(naive, argnums=(0, 1))(features, TABLE), wanted, strict=True
    ):
        error = lambda a, want=want: np.max(np.abs(np.asarray(a, np.float32) - want))  # noqa: E731
        assert error(got) <= 2 * error(rough) + 1e-5


def test_large_logits_do_not_overflow():
    sums = jax.jit(losses.linear_cross_entropy)(1e4 * FEATURES, TABLE, TARGETS)
    np.testing.assert_allclose(sums.loss, jax.jit(plain)(1e4 * FEATURES, TABLE, TARGETS, 1.0, 0.0).loss, rtol=1e-6)


ERRORS = {
    "width": ({"features": FEATURES[..., :4]}, ("features [..., D]", "table [V, D]", "(3, 5, 4)", "(11, 7)")),
    "targets": ({"targets": TARGETS[:2]}, ("targets [...]", "(3, 5, 7)", "(2, 5)")),
    "smoothing": ({"label_smoothing": 1.0}, ("label_smoothing must be in [0, 1), got 1.0",)),
    "weights": ({"weights": WEIGHTS.T}, ("weights", "(3, 5)", "got (5, 3)")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    wrong, parts = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        losses.linear_cross_entropy(**({"features": FEATURES, "table": TABLE, "targets": TARGETS} | wrong))
    assert [part for part in ("losses.linear_cross_entropy", *parts) if part not in str(caught.value)] == []
