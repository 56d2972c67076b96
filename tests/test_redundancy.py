"""Heads that stand in for one another: shares, joint effects, takeovers, kept sets, against sums over all subsets."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhajax import attention, interventions
from mhajax.heads import importance
from mhajax.statistics import Tally, agreement, bootstrap_stability, difference, estimate, jaccard

SHAPE, HEADS = (2, 3), 6
ONES = jnp.ones(SHAPE)
PRIMARY, BACKUP, DEAD, EXTRA = 0, 4, 2, 5  # in layers 0, 1, 0, 1
WORTH = np.array([3.0, 7, 2, 5], np.float32)  # of the pair, by sentence


def additive(gates):
    """A loss that adds up: head h costs (h + 1) times a number of the sentence."""
    return jnp.asarray(WORTH) * jnp.sum((1 - gates.ravel()) * jnp.arange(1.0, HEADS + 1))


def backed_up(gates):
    """Primary or backup is enough; one more head is needed by itself, the others are dead."""
    flat = gates.ravel()
    return jnp.asarray(WORTH) * (1 - jnp.maximum(flat[PRIMARY], flat[BACKUP])) + 1 - flat[EXTRA]


def mixed(gates):
    """No structure: a quartic in five gates, and the sixth head is dead."""
    flat = gates.ravel()
    products = jnp.stack([flat[0] * flat[1], flat[1] * flat[2] * flat[3], flat[4], flat[0] * flat[4] ** 2, flat[3]])
    return (jnp.arange(1.0, 5)[:, None] * products).sum(-1) ** 2 + jnp.asarray(WORTH) @ jnp.eye(4) * flat[2]


@pytest.fixture(scope="module")
def orders():
    """Pairs of orders, one the reverse of the other."""
    return np.asarray(importance.antithetic(jax.random.key(0), HEADS, 20))


def effects(loss):
    return jax.jit(lambda: importance.lost(importance.ablations(loss, ONES), loss(ONES)))()


def shapley(loss, orders, **options):
    return jax.jit(lambda: importance.shapley(loss, ONES, orders, **options))()


def enumerated(loss):
    """Shapley's formula over all subsets, [heads]; per sentence on average."""
    subsets = [gone for size in range(HEADS + 1) for gone in itertools.combinations(range(HEADS), size)]
    gates = np.array([[head not in gone for head in range(HEADS)] for gone in subsets], np.float32)
    means = jax.jit(jax.vmap(lambda row: jnp.mean(loss(row.reshape(SHAPE)))))(gates)
    losses = dict(zip(subsets, np.asarray(means, float), strict=True))
    shares = np.zeros(HEADS)
    for head in range(HEADS):
        for gone, before in losses.items():
            if head not in gone:
                weight = math.factorial(len(gone)) * math.factorial(HEADS - len(gone) - 1) / math.factorial(HEADS)
                shares[head] += weight * (losses[tuple(sorted((*gone, head)))] - before)
    return shares


def by_head(tally: Tally) -> np.ndarray:
    """[L, B, N] as [heads, B]."""
    return np.moveaxis(np.asarray(tally.total), 1, 2).reshape(HEADS, -1)


def test_shares_of_an_additive_loss_are_the_single_effects(orders):
    np.testing.assert_array_equal(orders[:, 0], orders[:, 1, ::-1])
    found = shapley(additive, orders[:3], batch_size=4)
    np.testing.assert_allclose(found.shares.total, effects(additive).total, rtol=1e-5)
    np.testing.assert_allclose(found.error, 0, atol=1e-5)
    np.testing.assert_array_equal(found.shares.count, np.ones((4, 1)))


def test_a_pair_that_backs_each_other_up_shares_what_both_are_worth(orders):
    assert not by_head(effects(backed_up))[[PRIMARY, BACKUP]].any()  # single effects see nothing
    found = shapley(backed_up, orders[:2])
    shares = by_head(found.shares)
    np.testing.assert_allclose(shares[PRIMARY], WORTH / 2, rtol=1e-6)  # a pair of orders has each once before the other
    np.testing.assert_allclose(shares[BACKUP], WORTH / 2, rtol=1e-6)
    np.testing.assert_array_equal(shares[DEAD], 0)
    np.testing.assert_allclose(found.error, 0, atol=1e-6)


def test_shares_are_those_of_all_subsets(orders):
    exact = enumerated(mixed)
    every = np.array(list(itertools.permutations(range(HEADS))))
    whole = shapley(mixed, every, batch_size=600)
    values = by_head(whole.shares).mean(1)
    np.testing.assert_allclose(values, exact, rtol=1e-4, atol=1e-4)
    assert values[5] == 0 and np.abs(values[:5]).min() > 0.1
    plain, paired = (shapley(mixed, some, batch_size=100) for some in (every[:: 720 // 40], orders))
    for found in (plain, paired):
        off = np.abs(by_head(found.shares).mean(1) - exact)
        assert (off <= 4 * np.ravel(found.error) + 1e-4).all() and np.ravel(found.error)[:5].min() > 0
        totals = np.asarray(found.by_order).reshape(-1, HEADS).sum(1)  # each unit of orders divides up the same
        np.testing.assert_allclose(totals, float(jnp.mean(mixed(0 * ONES) - mixed(ONES))), rtol=1e-5)
    assert np.mean(paired.error) < np.mean(plain.error)


def test_shares_are_per_token_and_of_what_is_left(orders):
    tokens, gates = np.array([2, 1, 4, 3]), ONES.at[0, 1].set(0)
    found = importance.shapley(additive, gates, orders[:2], tokens=tokens)
    expected = np.arange(1, HEADS + 1) * WORTH.sum() / tokens.sum()
    expected[1] = 0
    np.testing.assert_allclose(np.asarray(found.by_order).reshape(2, -1), [expected] * 2, rtol=1e-5)
    np.testing.assert_array_equal(found.shares.count, tokens[:, None])


def test_a_group_costs_more_than_its_heads_where_they_back_each_other_up():
    pair = jnp.zeros((1, HEADS), bool).at[0, jnp.array([PRIMARY, BACKUP])].set(True)
    found = importance.joint(backed_up, ONES, pair, single=effects(backed_up))
    np.testing.assert_allclose(found.total[0], WORTH)
    np.testing.assert_allclose(found.baseline, 0)
    layers = importance.joint(additive, ONES, importance.layers(ONES), single=effects(additive), batch_size=2)
    np.testing.assert_allclose(layers.total, [6 * WORTH, 15 * WORTH], rtol=1e-5)
    np.testing.assert_allclose(layers.total, layers.baseline, rtol=1e-5)
    assert not np.any(importance.joint(additive, ONES, pair).baseline)
    two = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 2))}
    assert importance.layers(two).astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_the_backup_is_found_when_the_primary_is_gone():
    found = importance.conditional(backed_up, ONES, [PRIMARY], batch_size=3)
    risen = difference(found, axis=1).value.ravel()
    assert risen.argmax() == BACKUP and risen[BACKUP] == pytest.approx(WORTH.mean())
    np.testing.assert_allclose(np.delete(risen, BACKUP), 0, atol=1e-6)
    np.testing.assert_allclose(by_head(found)[EXTRA], 1)
    assert not by_head(found)[PRIMARY].any()


def test_what_is_kept_is_faithful_complete_and_minimal():
    rows = np.zeros((3, HEADS), bool)
    rows[0, [PRIMARY, EXTRA]] = rows[1, [PRIMARY]] = True
    found = estimate(importance.faithfulness(backed_up, ONES, rows), axis=1)
    np.testing.assert_allclose(found.value, [1, float(WORTH.sum()) / (float(WORTH.sum()) + 4), 0], rtol=1e-6)
    subsets = np.eye(HEADS, dtype=bool)[[PRIMARY, EXTRA, DEAD]]
    missing = importance.completeness(backed_up, ONES, [PRIMARY, EXTRA], subsets).total
    np.testing.assert_allclose(missing, [WORTH, 0 * WORTH, 0 * WORTH])  # without the primary, the backup is missed
    with_backup = [PRIMARY, BACKUP, EXTRA]
    assert not importance.completeness(backed_up, ONES, with_backup, subsets).total.any()
    lost = [by_head(importance.minimality(backed_up, ONES, with_backup, gone=gone)) for gone in ([], [BACKUP])]
    np.testing.assert_allclose(lost[0][[PRIMARY, EXTRA, DEAD]], [0 * WORTH, 1 + 0 * WORTH, 0 * WORTH])
    np.testing.assert_allclose(lost[1][[PRIMARY, BACKUP]], [WORTH, 0 * WORTH])
    drawn = importance.random_subsets(jax.random.key(0), jnp.array(with_backup), HEADS, 50)
    assert drawn.any(0).tolist() == [head in with_backup for head in range(HEADS)]


@pytest.mark.slow
def test_curves_of_a_ranking_beside_random_orders_of_the_same_layers():
    order = importance.ranking(effects(additive))
    assert order.tolist() == list(range(HEADS))
    random = np.asarray(importance.random_orders(jax.random.key(5), ONES, order[:4], 40))
    assert random.shape == (40, 4) and (random // 3 == np.asarray(order[:4]) // 3).all()
    assert all(len(set(row)) == 4 for row in random) and len({tuple(row[:3]) for row in random}) == 6
    found = importance.curves(additive, ONES, np.concatenate([order[None, :4], random]), [2, 0, 3], batch_size=50)
    np.testing.assert_allclose(found.total[0], [3 * WORTH, 0 * WORTH, 6 * WORTH], rtol=1e-5)
    np.testing.assert_allclose(found.total[:, 2], np.tile(6 * WORTH, (41, 1)), rtol=1e-5)  # the whole layer is gone
    assert np.asarray(found.total[1:, 0]).min() == pytest.approx(3 * 2) and found.baseline.tolist() == [0] * 4
    one = importance.curve(additive, ONES, order, tokens=np.array([2, 1, 4, 3]))
    np.testing.assert_allclose(one.total[2:4], found.total[0, ::2], rtol=1e-5)


@pytest.fixture(scope="module")
def constant_heads():
    """A loss of amounts and constants of an attention with [1, 3] heads; and its mean outputs."""
    config = attention.Config(d_model=5, num_heads=3, head_dim=2)
    params = attention.init_params(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (4, 7, 5)) + 1
    target = jnp.tanh(attention.apply(params, x, config))
    _, seen = attention.apply_captured(params, x, config, capture=("heads",))

    def loss(amounts, constants):
        changed = interventions.patched("heads", constants[0, :, None], amounts[0])
        return jnp.sum((jnp.tanh(attention.apply(params, x, config, intervention=changed)) - target) ** 2, (1, 2))

    return loss, jnp.mean(seen["heads"], axis=(0, 2))[None]  # [1, N, Hv]


def test_zero_and_mean_ablation_are_upper_bounds_of_the_optimal_one(constant_heads):
    loss, means = constant_heads
    none = jnp.zeros(means.shape[:2])
    best = importance.optimal_constants(loss, none, means, optax.adam(0.05), steps=60)
    zero, mean, optimal = (
        np.asarray(importance.replacements(loss, none, constants)).sum(1) for constants in (0 * means, means, best)
    )
    assert (optimal <= np.minimum(zero, mean)).all() and (optimal < mean).all() and optimal.min() > 0.1
    nudged = np.asarray(importance.replacements(loss, none, best + 0.05)).sum(1)
    assert (nudged >= optimal).all()
    start = importance.optimal_constants(loss, none, means, optax.adam(0.05), steps=0, batch_size=1)
    np.testing.assert_array_equal(start, jnp.where((zero < mean)[..., None], 0, means))


def test_how_much_of_the_top_comes_again():
    assert jaccard([3.0, 2, 1], [[1.0, 2, 3], [3, 1, 2]], 1).tolist() == [0, 1]
    random = np.random.default_rng(0)
    noise = Tally(random.normal(size=(30, 4, 5)), np.ones((30, 1, 1)), np.zeros(1))
    signal = noise._replace(total=noise.total + 10 * np.arange(20).reshape(4, 5))
    assert bootstrap_stability(signal, 5).overlap == 1
    fresh = agreement(random.normal(size=(60, 20)), 5)
    assert abs(fresh.overlap - fresh.chance) < 0.01 and fresh.low < fresh.chance < fresh.high
    assert fresh.chance < bootstrap_stability(noise, 5).overlap < 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: importance.shapley(additive, ONES, [[0, 1, 2]]), r"shapley: orders .* the 6 heads .* int\d+ \(1, 3\)"),
        (lambda: importance.shapley(additive, ONES, [[0, 1, 2, 3, 4, 4]]), "must be permutations of the 6 heads"),
        (lambda: importance.shapley(jnp.sum, ONES, [range(6)]), r"shapley: loss .* \[B\], got shape \(\)"),
        (lambda: importance.joint(additive, ONES, ONES), r"joint: groups must be booleans \[R, 6\].* float32 \(2, 3\)"),
        (lambda: importance.conditional(additive, ONES, [6]), r"gone must be from 0 to 5, got \[6\]"),
        (lambda: importance.minimality(additive, ONES, [0.5]), "kept must be numbers of heads, integers"),
        (lambda: importance.curves(additive, ONES, [0, 1], [1]), r"curves: orders .* \[R, heads\] .* \(2,\)"),
        (lambda: importance.curves(additive, ONES, [[0, 1]], [3]), r"counts must be from 0 to 2, .* got \[3\]"),
        (lambda: importance.random_orders(jax.random.key(0), ONES, [1, 1], 2), "must name each head once"),
        (
            lambda: importance.replacements(lambda a, c: c.sum((0, 2)), ONES, jnp.ones((2, 4, 5))),
            r"replacements: constants must be \[..., N, Hv\] .* got \[\(2, 4, 5\)\] for \[\(2, 3\)\]",
        ),
        (lambda: jaccard([1.0, 2], [1.0, 2, 3], 1), r"same M things, .* \(2,\) and \(3,\)"),
        (lambda: agreement([[1.0, 2]], 1), "at least 2 seeds"),
        (
            lambda: bootstrap_stability(Tally(np.ones((3, 2)), np.ones(1), np.ones(1)), 3),
            "top must be from 1 to 2, got 3",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
