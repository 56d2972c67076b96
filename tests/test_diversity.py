"""How much heads differ: closed forms, loops, and what is known about random subspaces."""

from functools import partial

import jax
import numpy as np
import pytest
import scipy.linalg

from mhajax import attention
from mhajax.heads import circuits as weights_of
from mhajax.heads import diversity
from tests import circuits
from tests.reference import numbers, random_params

B, N, T, S, H, D = 2, 3, 5, 7, 4, 11
REAL = np.arange(T) < np.array([[4], [5]])  # [B, T]
VISIBLE = (REAL[:, :, None] & (np.arange(S) < np.array([[6], [3]]))[:, None])[:, None]  # [B, 1, T, S]


def patterns(seed=0):
    weights = np.exp(2 * numbers(seed, B, N, T, S)) * VISIBLE
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9)


def by_pairs(measure, *, over=(B,)):
    """measure(sentence, head, head) for all."""
    return np.array([[[measure(b, n, m) for m in range(N)] for n in range(N)] for b in range(*over)])


def test_cosines_are_those_of_every_token():
    x = numbers(0, B, N, T, H)
    tally = diversity.cosines(x, REAL)

    def one(b, n, m):
        return sum(x[b, n, t] @ x[b, m, t] / np.linalg.norm(x[b, n, t]) / np.linalg.norm(x[b, m, t])
                   for t in range(T) if REAL[b, t])  # fmt: skip

    np.testing.assert_allclose(tally.total, by_pairs(one), rtol=1e-5, atol=1e-6)
    assert tally.count.ravel().tolist() == [4, 5]
    np.testing.assert_array_equal(tally.baseline, REAL.sum(-1)[:, None, None] * np.eye(N))


def test_disagreement_of_li_counts_a_head_with_itself_and_between_does_not():
    x = numbers(0, B, N, T, H)
    pairs = diversity.cosines(x, REAL)
    li, apart = diversity.disagreement(pairs), diversity.between(pairs)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    d_output = [-sum(np.sum(unit[b, :, t] @ unit[b, :, t].T) for t in range(T) if REAL[b, t]) / N**2 for b in range(B)]
    np.testing.assert_allclose(li.total, d_output, rtol=1e-5)
    np.testing.assert_allclose(apart.total, (-np.array(d_output) * N**2 - REAL.sum(-1) * N) / (N * (N - 1)), rtol=1e-4)
    np.testing.assert_allclose(li.baseline, -REAL.sum(-1) / N, rtol=1e-6)
    assert apart.baseline.tolist() == [0, 0] and apart.count.tolist() == [4, 5]


def test_duplicate_and_opposite_heads():
    one = numbers(1, T, H)
    tally = diversity.cosines(np.stack([one, 3 * one, -one, 0 * one]))
    expected = T * np.array([[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(tally.total, expected, atol=1e-5)


def test_overlaps():
    weights = patterns()
    tally = diversity.overlaps(weights, VISIBLE)
    np.testing.assert_allclose(tally.total, by_pairs(lambda b, n, m: np.sum(weights[b, n] * weights[b, m])), rtol=1e-5)
    np.testing.assert_allclose(tally.baseline[:, 0, 1], [4 / 6, 5 / 3], rtol=1e-6)
    uniform = np.broadcast_to(VISIBLE / np.maximum(VISIBLE.sum(-1, keepdims=True), 1), (B, N, T, S))
    uniform = diversity.overlaps(uniform, VISIBLE)
    np.testing.assert_allclose(uniform.total, uniform.baseline, rtol=1e-6)


def test_jensen_shannon():
    weights = patterns()
    tally = jax.jit(diversity.jensen_shannon)(weights, VISIBLE)

    def divergence(p, q):
        m = (p + q) / 2
        kl = lambda a: sum(x * np.log2(x / y) for x, y in zip(a, m, strict=True) if x > 0)  # noqa: E731
        return (kl(p) + kl(q)) / 2

    one = lambda b, n, m: sum(divergence(weights[b, n, t], weights[b, m, t]) for t in range(T))  # noqa: E731
    np.testing.assert_allclose(tally.total, by_pairs(one), rtol=1e-4, atol=1e-5)
    assert tally.count.ravel().tolist() == [4, 5]


def test_jensen_shannon_is_0_for_the_same_keys_and_1_for_others():
    weights = np.eye(6, dtype=np.float32)[[[0, 1, 2], [0, 1, 2], [3, 4, 5]]]  # 3 heads, 3 queries
    tally = diversity.jensen_shannon(weights, np.ones((3, 6), bool))
    np.testing.assert_allclose(tally.total / tally.count, [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-6)


@pytest.mark.slow
def test_the_baseline_of_jensen_shannon_is_as_sharp_but_elsewhere():
    """One key of k, shuffled: another key but for one time in k, so 1 - 1/k bits on average."""
    queries, keys = 2003, 5
    weights = np.zeros((2, queries, keys + 2), np.float32)
    weights[..., 1] = 1
    visible = np.arange(keys + 2) < keys
    tally = diversity.jensen_shannon(weights, np.broadcast_to(visible, (queries, keys + 2)))
    assert np.abs(tally.baseline / queries - (1 - 1 / keys)).max() < 4 * 0.4 / queries**0.5
    shuffled = diversity._shuffled(jax.random.key(0), patterns(), np.broadcast_to(VISIBLE, (B, N, T, S)))
    np.testing.assert_allclose(np.sort(shuffled, axis=-1), np.sort(patterns(), axis=-1), rtol=1e-6)
    assert (np.asarray(shuffled)[~np.broadcast_to(VISIBLE, shuffled.shape)] == 0).all()


def cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def unbiased(x, y):
    """Song et al.'s estimator, with whole n × n matrices."""
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0), np.fill_diagonal(m, 0)
    n = len(k)
    return np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ m).sum()


@pytest.fixture(scope="module")
def measured():
    x = numbers(2, B, N, 13, H) + 5  # a mean far from 0
    x[:, 1] = x[:, 0] + 0.3 * x[:, 1]
    real = np.arange(13) < np.array([[11], [13]])
    x[0, :, 11:] = 1e3
    both = jax.jit(lambda x, real: (diversity.linear_cka(x, real), diversity.debiased_cka(x, real)))(x, real)
    return x.astype(np.float64), both


def test_linear_cka(measured):
    x, (tally, _) = measured
    n = (11, 13)
    one = lambda b, i, j: cka(x[b, i, : n[b]], x[b, j, : n[b]])  # noqa: E731
    np.testing.assert_allclose(tally.total, by_pairs(one), rtol=1e-4)
    random = np.random.default_rng(0)
    shuffled = np.mean([cka(x[0, 0, :11], random.permutation(x[0, 2, :11])) for _ in range(3000)])
    np.testing.assert_allclose(tally.baseline[0, 0, 2], shuffled, rtol=0.03)


@pytest.mark.slow
def test_debiased_cka(measured):
    x, (_, tally) = measured
    n = (11, 13)

    def one(b, i, j):
        p, q = x[b, i, : n[b]], x[b, j, : n[b]]
        return unbiased(p, q) / np.sqrt(unbiased(p, p) * unbiased(q, q))

    np.testing.assert_allclose(tally.total, by_pairs(one), rtol=1e-3, atol=1e-4)
    random = np.random.default_rng(0)
    unrelated = random.normal(size=(200, 2, 17, H)).astype(np.float32)
    chance = diversity.debiased_cka(unrelated).total[:, 0, 1]
    assert abs(np.mean(chance)) < 4 * np.std(chance) / 200**0.5  # where the other has
    plain = diversity.linear_cka(unrelated)
    assert np.mean(plain.total[:, 0, 1]) > 0.15
    np.testing.assert_allclose(np.mean(plain.total[:, 0, 1]), np.mean(plain.baseline[:, 0, 1]), rtol=0.05)


@pytest.mark.slow
def test_cka_knows_no_rotation_and_no_scale():
    x = numbers(3, 19, H)
    turn = np.linalg.qr(numbers(4, H, H))[0]
    for measure in (diversity.linear_cka, diversity.debiased_cka):
        np.testing.assert_allclose(measure(np.stack([x, 7 * x @ turn + 2])).total, np.ones((2, 2)), rtol=1e-4)


@pytest.mark.slow
def test_principal_angles():
    w = numbers(0, N, D, H)
    w[1] = w[0] @ numbers(5, H, H)  # the same subspace
    w[2, :, :2] = w[0, :, 2:]  # two directions in common
    tally = weights_of.principal_angles(w)
    for n, m in np.ndindex(N, N):
        expected = np.sort(scipy.linalg.subspace_angles(w[n].astype(float), w[m].astype(float)))
        np.testing.assert_allclose(tally.total[n, m], expected, atol=1e-5)
    overlap = weights_of.subspace_overlap(w)
    np.testing.assert_allclose(overlap.total, np.mean(np.cos(tally.total) ** 2, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(overlap.baseline, np.where(np.eye(N), 1, H / D), rtol=1e-6)


@pytest.mark.slow
def test_random_subspaces_are_the_baseline_of_angles():
    tally = weights_of.principal_angles(numbers(0, 2, D, H), draws=500)
    np.testing.assert_allclose(np.mean(np.cos(tally.baseline[0, 1]) ** 2), H / D, rtol=0.03)
    assert (np.diff(tally.baseline[0, 1]) > 0).all()


@pytest.mark.slow
def test_effective_rank():
    left = np.linalg.qr(numbers(0, D, H))[0]
    values = np.array([[4, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0], [4, 2, 1, 1]], np.float32)
    turn = np.linalg.qr(numbers(1, H, H))[0]
    right = np.stack([turn @ np.diag(v) @ np.linalg.qr(numbers(2, D, H))[0].T for v in values])
    tally = weights_of.effective_rank((left @ turn.T)[None], right)
    shares = np.array([4, 2, 1, 1]) / 8
    np.testing.assert_allclose(tally.total, [1, 4, 2, np.exp(-np.sum(shares * np.log(shares)))], rtol=1e-4)
    assert 1 < tally.baseline[0] < H
    assert weights_of.effective_rank(np.zeros((1, D, H)), right[:1]).total == 0


@pytest.fixture(scope="module")
def layers():
    config = attention.Config(d_model=D, num_heads=6, num_kv_heads=3, head_dim=H, value_dim=5)
    return [random_params(attention.init_params, config, seed=seed) for seed in (0, 1)]


def test_composition(layers):
    found = jax.jit(weights_of.composition)(*layers)
    one, two = layers
    norm = np.linalg.norm
    for n, m in np.ndindex(6, 6):
        ov = one.w_v[n // 2] @ one.w_o[n]
        qk, later_ov = two.w_q[m] @ two.w_k[m // 2].T, two.w_v[m // 2] @ two.w_o[m]
        for tally, x in zip(found, (qk, qk.T, later_ov), strict=True):
            np.testing.assert_allclose(tally.total[n, m], norm(ov @ x) / norm(ov) / norm(x), rtol=1e-4)
            np.testing.assert_allclose(tally.baseline[n, m], D**-0.5, rtol=1e-6)


@pytest.mark.slow
def test_the_baseline_of_composition_is_what_random_heads_have():
    config = attention.Config(d_model=23, num_heads=17, head_dim=H)
    random = [random_params(attention.init_params, config, seed=seed) for seed in (2, 3)]
    for tally in weights_of.composition(*random):
        np.testing.assert_allclose(np.mean(np.square(tally.total)), 1 / 23, rtol=0.05)


@pytest.mark.slow
def test_the_induction_circuit_composes_by_its_keys():
    below = circuits.layer(circuits.previous_token(), circuits.dead())
    found = weights_of.composition(below, circuits.layer(circuits.induction(), circuits.dead()))
    # All of what the head below writes is read: ‖AB‖ = ‖A‖ ‖B‖ / √rank for orthogonal factors of the same rank.
    expected = np.zeros((2, 2))
    expected[0, 0] = circuits.VOCABULARY**-0.5
    np.testing.assert_allclose(found.keys.total, expected, rtol=1e-4, atol=1e-6)
    assert found.keys.total[0, 0] > 1.5 * found.keys.baseline[0, 0]
    np.testing.assert_allclose(found.queries.total, np.zeros((2, 2)), atol=1e-6)
    np.testing.assert_allclose(found.values.total, np.zeros((2, 2)), atol=1e-6)


@pytest.mark.slow
def test_padding_changes_nothing():
    weights, x = patterns(), numbers(0, B, N, T, H)
    wide, real = ((0, 0), (0, 0), (0, 2), (0, 3)), np.pad(REAL, ((0, 0), (0, 2)))
    more, visible = np.pad(weights, wide, constant_values=0.2), np.pad(VISIBLE, wide)
    tokens = np.pad(x, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=9)
    for one, other in (
        (diversity.overlaps(weights, VISIBLE), diversity.overlaps(more, visible)),
        (diversity.cosines(x, REAL), diversity.cosines(tokens, real)),
        (diversity.linear_cka(x, REAL), diversity.linear_cka(tokens, real)),
        (diversity.debiased_cka(x, REAL), diversity.debiased_cka(tokens, real)),
        (diversity.jensen_shannon(weights, VISIBLE)[:2], diversity.jensen_shannon(more, visible)[:2]),
    ):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


ERRORS = {
    "integers": (partial(diversity.cosines, np.ones((2, 3, 4), int)), ("diversity.cosines", "int", "(2, 3, 4)")),
    "two axes": (partial(diversity.linear_cka, np.ones((3, 4))), ("diversity.linear_cka", "[..., N, T, H]", "(3, 4)")),
    "heads that see different keys": (
        partial(diversity.overlaps, patterns(), np.broadcast_to(VISIBLE, (B, N, T, S))),
        ("diversity.overlaps", "1 on the axis of heads", "(2, 3, 5, 7)"),
    ),
    "w_o as it is": (
        partial(weights_of.principal_angles, np.ones((3, 4, 11))),
        ("circuits.principal_angles", "H ≤ D", "(3, 4, 11)", "swap"),
    ),
    "w_k as it is": (
        partial(weights_of.effective_rank, np.ones((3, 11, 4)), np.ones((3, 11, 4))),
        ("circuits.effective_rank", "(3, 11, 4)", "w_k"),
    ),
    "heads that do not divide": (
        partial(weights_of.effective_rank, np.ones((2, 11, 4)), np.ones((3, 4, 11))),
        ("2 heads", "3"),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, parts = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []
