"""Gates that are learned: the hard concrete against its closed forms, and planted heads that must be found."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from planted import DEAD, DUPLICATES, HARMFUL, NEEDED, PLANTED, planted

from mhajax import attention
from mhajax.heads import gates

BETA, LOW, HIGH = 0.33, -0.1, 1.1
LOG_ALPHA = np.array([-3.0, -1, 0, 0.5, 2.5])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def at_most(t, log_alpha):
    """P(gate ≤ t) for 0 ≤ t < 1: the CDF of the binary concrete at the point that is stretched to t."""
    s = (t - LOW) / (HIGH - LOW)
    return sigmoid(BETA * (np.log(s) - np.log(1 - s)) - log_alpha)


# The hard concrete


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(0), 40_000)
    tree = {"a": jnp.array(LOG_ALPHA[:2]), "b": jnp.array(LOG_ALPHA[2:])}
    found = jax.jit(jax.vmap(gates.sample, in_axes=(None, 0)))(tree, keys)
    return np.concatenate([found["a"], found["b"]], axis=-1)  # [draws, heads]


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.93])
def test_draws_have_the_distribution_of_the_paper(drawn, t):
    expected = at_most(t, LOG_ALPHA)
    np.testing.assert_allclose(np.mean(drawn <= t, axis=0), expected, atol=4 * 0.5 / 200)  # four standard errors


def test_zero_and_one_have_probabilities_of_their_own(drawn):
    assert drawn.min() == 0 and drawn.max() == 1
    np.testing.assert_allclose(gates.open_probability(jnp.array(LOG_ALPHA)), 1 - at_most(0.0, LOG_ALPHA), rtol=1e-5)
    np.testing.assert_allclose(
        gates.open_probability(jnp.array(LOG_ALPHA)), sigmoid(LOG_ALPHA - BETA * np.log(0.1 / 1.1)), rtol=1e-5
    )
    np.testing.assert_allclose(np.mean(drawn == 1, axis=0), 1 - at_most(1 - 1e-9, LOG_ALPHA), atol=0.01)
    apart = np.corrcoef(drawn[:, 1:4].T) - np.eye(3)
    assert np.abs(apart).max() < 0.03  # every head draws on its own, also across leaves


def test_the_gate_without_noise():
    closed, half, whole = np.log(1 / 11), 0.0, np.log(11)  # σ = 1/12, 1/2, 11/12
    found = gates.deterministic(jnp.array([closed - 0.01, closed + 0.01, half, 1.0, whole - 0.01, whole + 0.01]))
    assert found[0] == 0 < found[1] < 0.01 and 0.99 < found[4] < 1 == found[5]
    np.testing.assert_allclose(found[2:4], 1.2 * sigmoid([0, 1]) - 0.1, rtol=1e-6)


def test_the_penalty_counts_heads_that_may_be_open():
    tree = {"a": jnp.full((2, 3), 30.0), "b": jnp.full((4,), -30.0)}
    assert gates.penalty(tree) == pytest.approx(6)
    slope = jax.grad(gates.penalty)({"a": jnp.zeros(1)})["a"]
    p = sigmoid(-BETA * np.log(1 / 11))
    np.testing.assert_allclose(slope, p * (1 - p), rtol=1e-5)


@pytest.mark.slow
def test_draws_have_a_derivative():
    key, at = jax.random.key(3), jnp.array(LOG_ALPHA)
    slope = jax.grad(lambda a: jnp.sum(gates.sample(a, key)))(at)
    difference = (gates.sample(at + 1e-2, key) - gates.sample(at - 1e-2, key)) / 2e-2
    between = (gates.sample(at, key) > 0.05) & (gates.sample(at, key) < 0.95)
    assert between.any() and not between.all()
    np.testing.assert_allclose(slope[between], difference[between], rtol=1e-2)


# Subsets


SCORES = np.array([0.3, -1.0, 2.0, 0.9, 0.0], np.float32)


def test_exactly_as_many_heads():
    tree = {"a": jnp.array(SCORES[:2]), "b": jnp.array(SCORES[2:])}
    found = gates.exactly(tree, 3)
    np.testing.assert_array_equal(np.concatenate([found["a"], found["b"]]), [1, 0, 1, 1, 0])
    with pytest.raises(ValueError, match="gates.exactly: count must be from 1 to 5, the number of heads, got 6"):
        gates.exactly(tree, 6)


def test_a_soft_choice_sums_to_the_count_and_sharpens():
    np.testing.assert_allclose(
        gates.relaxed(SCORES, 1, 0.7), np.exp(SCORES / 0.7) / np.exp(SCORES / 0.7).sum(), rtol=1e-5
    )
    for temperature in (2.0, 0.5, 0.05):
        assert jnp.sum(gates.relaxed(SCORES, 3, temperature)) == pytest.approx(3, rel=1e-5)
    np.testing.assert_allclose(gates.relaxed(SCORES, 3, 0.02), gates.exactly(SCORES, 3), atol=1e-4)


def test_straight_through():
    weights = np.arange(1.0, 6)
    slope = jax.grad(lambda s: jnp.vdot(gates.subset(s, 2, 0.8), weights))(SCORES)
    np.testing.assert_allclose(
        slope, jax.grad(lambda s: jnp.vdot(gates.relaxed(s, 2, 0.8), weights))(SCORES), rtol=1e-5
    )
    assert np.abs(slope).min() > 1e-3
    np.testing.assert_allclose(gates.subset(SCORES, 2, 0.8), [0, 0, 1, 1, 0], atol=1e-6)


def test_subsets_are_drawn_with_the_odds_of_the_scores():
    """Plackett–Luce: i then j with p_i p_j / (1 - p_i)."""
    keys = jax.random.split(jax.random.key(1), 20_000)
    found = jax.jit(jax.vmap(lambda key: gates.subset(SCORES, 2, 0.5, key)))(keys)
    p = np.exp(SCORES) / np.exp(SCORES).sum()
    order = p[:, None] * p / (1 - p)[:, None] * (1 - np.eye(5))
    np.testing.assert_allclose(np.mean(found, axis=0), order.sum(1) + order.sum(0), atol=4 * 0.5 / 141)
    np.testing.assert_allclose(np.sum(found, axis=1), 2, rtol=1e-5)


# Fitting


class Descent:
    """An optimizer that is none of Optax's: descent with a rate that halves after the first step."""

    def init(self, params, /):
        return jnp.float32(1.0)

    def update(self, updates, state, params, /):
        return jax.tree.map(lambda slope: -0.5 * state * slope, updates), state * 0.5


def test_the_loop_is_descent_over_batches_in_turns():
    batches = {"x": jnp.array([1.0, 10.0])}
    objective = lambda v, batch, key, done: jnp.sum(v["w"] * batch["x"]) + 0 * done  # noqa: E731
    found = gates.fit(objective, {"w": jnp.zeros(2)}, Descent(), jax.random.key(0), batches, steps=3)
    np.testing.assert_allclose(found.variables["w"], -(0.5 * 1 + 0.25 * 10 + 0.125 * 1) * np.ones(2))
    np.testing.assert_allclose(found.objective, [0, 2 * 10 * -0.5, 2 * 1 * -3.0])


@pytest.fixture(scope="module")
def task():
    """Two batches for planted heads, and their loss, in units of what one needed head is worth."""
    x = jax.random.normal(jax.random.key(8), (2, 3, 6, 4))  # [batches, B, T, D]
    params, wanted = jax.jit(planted)(x)

    def loss(gates, batch):
        x, wanted = batch
        return jnp.sum((attention.apply(params, x, PLANTED, gates=gates) - wanted) ** 2, axis=(-2, -1))

    return loss, (x, wanted)


@pytest.mark.slow
def test_l0_closes_what_is_not_needed(task):
    """The dead and the harmful head close, the needed one stays open, and one of the duplicates at least."""
    loss, batches = task
    found = gates.fit_hard_concrete(
        loss, jnp.full(5, 2.0), optax.adam(0.1), jax.random.key(2), batches, weight=0.3, steps=300
    )
    final = np.asarray(gates.deterministic(found.variables))
    assert final[DEAD] == 0 and final[HARMFUL] == 0 and final[NEEDED] == 1, final
    assert final[list(DUPLICATES)].max() == 1, final
    assert found.objective.shape == (300,)
    before, after = (np.mean(loss(g, jax.tree.map(lambda a: a[0], batches))) for g in (np.ones(5), final))
    assert after < before


@pytest.mark.slow
def test_causal_gates_give_planted_heads_their_roles(task):
    loss, batches = task
    found = gates.fit_causal(loss, jnp.ones(5), optax.adam(0.1), jax.random.key(2), batches, weight=0.01, steps=400)
    facilitating, irrelevant, interfering = (np.asarray(role) for role in gates.roles(found))
    assert facilitating[NEEDED] > 0.8 and irrelevant[DEAD] > 0.9 and interfering[HARMFUL] > 0.8
    for role, head in ((facilitating, DEAD), (facilitating, HARMFUL), (interfering, NEEDED), (interfering, DEAD)):
        assert role[head] < 0.2
    np.testing.assert_allclose(facilitating + irrelevant + interfering >= 1, True)


@pytest.mark.slow
def test_the_subset_has_the_heads_that_matter(task):
    """All three that matter if three may stay, whatever the first scores say; two of them if two may."""
    loss, batches = task
    fit = jax.jit(
        lambda scores, key, count: gates.fit_subset(loss, scores, count, optax.adam(0.1), key, batches, steps=300),
        static_argnums=2,
    )
    misled = jnp.zeros(5).at[jnp.array([DEAD, HARMFUL])].set(0.5)
    three = gates.exactly(fit(misled, jax.random.key(4), 3).variables, 3)
    np.testing.assert_array_equal(three, [1, 1, 0, 0, 1])
    two = gates.exactly(fit(misled, jax.random.key(4), 2).variables, 2)
    assert np.sum(two) == 2 and two[DEAD] == two[HARMFUL] == 0
