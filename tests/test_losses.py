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


EVERY_PAIR = [  # of chunk, smoothing and weighted
    (1, 0.0, False), (1, 0.1, True), (4, 0.0, True), (4, 0.1, False),
    (15, 0.0, False), (15, 0.1, True), (512, 0.0, True), (512, 0.1, False),
]  # fmt: skip


# There are 15 tokens: 4 does not divide them, 512 is more.
@pytest.mark.parametrize(("chunk", "smoothing", "weighted"), tiered(EVERY_PAIR, (4, 0.0, True), (4, 0.1, False)))
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


@pytest.mark.slow
def test_without_gradient_the_sums_are_the_same():
    ours = jax.jit(partial(losses.linear_cross_entropy, label_smoothing=0.1, chunk=4))
    for got, want in zip(
        ours(FEATURES, TABLE, TARGETS, WEIGHTS), plain(FEATURES, TABLE, TARGETS, WEIGHTS, 0.1), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.slow
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


def test_ignored_targets_are_in_no_sum():
    """-100 as other libraries have it, and numbers of few bits or without a sign; with weights too."""
    kept: Any = _random.random((B, T)) < 0.6
    jitted = jax.jit(partial(losses.linear_cross_entropy, chunk=4), static_argnames="ignore_index")
    wanted = jitted(FEATURES, TABLE, TARGETS, WEIGHTS * kept)
    for ignore, dtype in ((-100, np.int32), (255, np.uint8), (100, np.uint32)):
        targets = np.where(kept, TARGETS, ignore).astype(dtype)
        sums = jitted(FEATURES, TABLE, targets, WEIGHTS, ignore_index=ignore)
        np.testing.assert_array_equal(np.stack(sums), np.stack(wanted))
    sums = losses.linear_cross_entropy(FEATURES, TABLE, jnp.where(kept, TARGETS, -100), ignore_index=-100)
    assert sums.weight == kept.sum()
    np.testing.assert_allclose(sums.loss, plain(FEATURES, TABLE, TARGETS, kept, 0.0).loss, rtol=2e-6)


def test_targets_outside_the_vocabulary_are_refused_or_nan():
    def value_and_gradient(targets, weights):
        def mean(features):
            sums = losses.linear_cross_entropy(features, TABLE, targets, weights)
            return sums.loss / sums.weight, sums

        return jax.value_and_grad(mean, has_aux=True)(FEATURES)

    jitted, ones = jax.jit(value_and_gradient), jnp.ones((B, T))
    for label in (-100, -1, V, 2**31 - 1):
        targets = jnp.array(TARGETS).at[1, 2].set(label)
        for ignore in (None, -7):
            with pytest.raises(ValueError) as caught:
                losses.linear_cross_entropy(jnp.array(FEATURES), jnp.array(TABLE), targets, ignore_index=ignore)
            parts = (f"[0, V={V})", f"got {label} at (1, 2)", "one of 1", f"ignore_index={label}")
            assert [part for part in parts if part not in str(caught.value)] == []
        (value, sums), d_features = jitted(targets, ones)
        assert np.isnan(value) and np.isnan(d_features[1, 2]).all() and np.isnan(np.stack(sums)).all()
        (value, sums), d_features = jitted(targets, ones.at[1, 2].set(0))  # what weighs nothing may be anything
        assert np.isfinite(value) and np.isfinite(d_features).all() and np.isfinite(np.stack(sums)).all()


def test_of_equal_logits_the_first_counts_as_for_argmax():
    features, table = jnp.ones((5, D)), jnp.zeros((V, D))  # the same of every word
    sums = jax.jit(losses.linear_cross_entropy)
    assert sums(features, table, jnp.array([3, 0, 7, V - 1, 0])).correct == 2
    two = table.at[jnp.array([4, 6])].set(1.0)  # two words tie
    assert sums(features, two, jnp.array([4, 6, 4, 0, 5])).correct == 2


ERRORS = {
    "width": ({"features": FEATURES[..., :4]}, ("features [..., D]", "table [V, D]", "(3, 5, 4)", "(11, 7)")),
    "targets": ({"targets": TARGETS[:2]}, ("targets [...]", "(3, 5, 7)", "(2, 5)")),
    "smoothing": ({"label_smoothing": 1.0}, ("label_smoothing must be in [0, 1), got 1.0",)),
    "ids": ({"targets": TARGETS + 0.5}, ("targets must be integers", "float64")),
    "weights": ({"weights": WEIGHTS.T}, ("weights", "(3, 5)", "got (5, 3)")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    wrong, parts = ERRORS[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        losses.linear_cross_entropy(**({"features": FEATURES, "table": TABLE, "targets": TARGETS} | wrong))
    assert [part for part in ("losses.linear_cross_entropy", *parts) if part not in str(caught.value)] == []
