"""What heads do: hand-built circuits, closed forms, loops over queries."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhajax import attention, language_model, masks
from mhajax.heads import copying, roles
from tests import circuits

L, B, N, T = 2, 5, 3, 7
START = circuits.VOCABULARY - 1
CAUSAL = np.tril(np.ones((T, T), bool))


def share(tally):
    """Σ total / Σ count over sentences, the second axis, [L, N]; and the baseline's."""
    total, count, baseline = np.broadcast_arrays(*map(np.asarray, tally))
    return total.sum(1) / count.sum(1), baseline.sum(1) / count.sum(1)


def uniform(visible):
    return visible / np.maximum(visible.sum(-1, keepdims=True), 1)


@pytest.fixture(scope="module")
def seen():
    """Weights [2, B, 3, 101, 101] of the induction model on repeated tokens, the tokens, and what is visible."""
    config, params = circuits.induction_model()
    tokens = roles.repeated_tokens(jax.random.key(0), circuits.VOCABULARY - 1, sequences=B, start=START)
    run = jax.jit(partial(language_model.apply_captured, config=config))
    logits, captured = run(params, tokens)
    visible = np.tril(np.ones((tokens.shape[1],) * 2, bool))
    return np.asarray(captured.attention["weights"]), np.asarray(tokens), visible, np.asarray(logits)


@pytest.mark.slow
def test_repeated_tokens():
    tokens = np.asarray(roles.repeated_tokens(jax.random.key(1), np.arange(11, 53), sequences=B, start=3))
    assert tokens.shape == (B, 101) and (tokens[:, 0] == 3).all()
    blocks = tokens[:, 1:].reshape(B, 4, 25)
    assert (blocks == blocks[:, :1]).all() and tokens[:, 1:].min() >= 11 and tokens.max() < 53
    assert all(len(set(row)) == 25 for row in blocks[:, 0]) and len({tuple(row) for row in blocks[:, 0]}) == B
    assert roles.repeated_tokens(jax.random.key(1), 7, length=5, repeats=2).shape == (1, 10)


@pytest.mark.slow
def test_the_induction_circuit_is_what_it_was_built_to_be(seen):
    weights, tokens, visible, logits = seen
    prefix, chance = share(roles.induction(weights, visible, tokens[:, None]))
    assert prefix[1, 1] > 0.9999 and prefix[1, 2] > 0.9999  # prefix matching score 1
    assert np.delete(prefix.ravel(), [4, 5]).max() < 0.1
    # Uniform attention: the query at place t sees floor((t - 1) / 25) such keys of t + 1.
    t = np.arange(26, 101)
    np.testing.assert_allclose(chance, np.full((2, 3), np.mean((t - 1) // 25 / (t + 1))), rtol=1e-5)
    np.testing.assert_allclose(prefix[1, 0], chance[1, 0], rtol=1e-5)  # the dead head looks at all keys alike
    by_strongest, _ = share(roles.induction(weights, visible, tokens[:, None], measure=roles.strongest))
    np.testing.assert_allclose(by_strongest[1], [chance[1, 0], 1, 1], rtol=1e-4)
    assert (logits.argmax(-1)[:, 26:-1] == tokens[:, 27:]).all()  # and the model does know what follows


@pytest.mark.parametrize("measure", [roles.mass, roles.strongest])
def test_previous_and_duplicate_token_heads_are_found(seen, measure):
    weights, tokens, visible, _ = seen
    before, chance = share(roles.previous_token(weights, visible, measure=measure))
    assert before[0, 0] > 0.9999 and before[0, 1] < 0.1
    np.testing.assert_allclose(chance, np.full((2, 3), np.mean(1 / np.arange(2, 102))), rtol=1e-5)
    same, _ = share(roles.duplicate_token(weights, visible, tokens[:, None], measure=measure))
    assert same[0, 1] > 0.9999 and np.delete(same.ravel(), 1).max() < 0.1
    rightmost, _ = share(roles.offset(weights, visible, -2, measure=measure))
    assert rightmost.max() < 0.1


def test_duplicate_heads_look_alike(seen):
    weights, _, visible, _ = seen
    np.testing.assert_array_equal(weights[1, :, 1], weights[1, :, 2])


def _random(seed=0):
    random = np.random.default_rng(seed)
    visible = np.stack([CAUSAL & (np.arange(T) < n) & (np.arange(T)[:, None] < n) for n in (7, 5, 1, 3, 4)])[:, None]
    weights = random.random((L, B, N, T, T)) * visible
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    return weights.astype(np.float32), visible, random.integers(0, 3, (B, 1, T))


def by_loops(weights, visible, wanted):
    """Mass, hits, count, chance of a role given as a function (sentence, query, key), query by query."""
    found = np.zeros((4, L, B, N))
    for where in np.ndindex(L, B, N, T):
        *cell, t = where
        sees = np.flatnonzero(visible[cell[1], 0, t])
        gold = [s for s in sees if wanted(cell[1], t, s)]
        if gold:
            row = weights[where]
            found[(slice(None), *cell)] += (
                row[gold].sum(), row[sees].argmax() in np.flatnonzero(np.isin(sees, gold)), 1, len(gold) / len(sees)
            )  # fmt: skip
    return found


def _cases():
    weights, visible, tokens = _random()
    frequencies = np.array([11, 5, 2])[tokens]
    full_stops = tokens[:, :] == 1
    row = tokens[:, 0]
    rarest = lambda b, t, s: frequencies[b, 0, s] == frequencies[b, 0, visible[b, 0, t]].min()  # noqa: E731
    return weights, visible, {
        "previous": (partial(roles.previous_token), (), lambda b, t, s: s == t - 1),
        "itself": (lambda *a, **k: roles.offset(*a, 0, **k), (), lambda b, t, s: s == t),
        "duplicate": (roles.duplicate_token, (tokens,), lambda b, t, s: s < t and row[b, s] == row[b, t]),
        "induction": (roles.induction, (tokens,), lambda b, t, s: 0 < s <= t and row[b, s - 1] == row[b, t]),
        "first": (roles.sink, (), lambda b, t, s: s == 0),
        "full stops": (roles.sink, (full_stops,), lambda b, t, s: full_stops[b, 0, s]),
        "rare": (roles.rare_words, (frequencies,), rarest),
    }  # fmt: skip


@pytest.mark.parametrize("name", _cases()[2])
def test_roles_are_what_loops_say(name):
    weights, visible, cases = _cases()
    role, given, wanted = cases[name]
    mass, hits, count, chance = by_loops(weights, visible, wanted)
    for measure, total in ((roles.mass, mass), (roles.strongest, hits)):
        tally = role(weights, visible, *given, measure=measure)
        np.testing.assert_allclose(tally.total, total, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.broadcast_to(tally.count, total.shape), count)
        np.testing.assert_allclose(np.broadcast_to(tally.baseline, total.shape), chance, rtol=1e-5)
    assert 0 < mass.sum() < count.sum()


@pytest.mark.parametrize("name", _cases()[2])
def test_padding_changes_nothing(name):
    weights, visible, cases = _cases()
    role, given, _ = cases[name]
    wider = ((0, 0),) * 3 + ((0, 3),) * 2
    padded = role(
        np.pad(weights, wider, constant_values=0.3),
        np.pad(visible, wider[1:]),
        *(np.pad(a, ((0, 0), (0, 0), (0, 3)), constant_values=1) for a in given),
    )
    for one, other in zip(role(weights, visible, *given), padded, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("measure", [roles.mass, roles.strongest])
def test_uniform_attention_is_the_baseline(measure):
    _, visible, tokens = _random()
    weights = np.broadcast_to(uniform(visible), (B, N, T, T)).astype(np.float32)
    for tally in (
        roles.induction(weights, visible, tokens, measure=measure),
        roles.sink(weights, visible, measure=measure),
        roles.rare_words(weights, visible, tokens, measure=measure),
        roles.offset(weights, visible, -2, measure=measure),
    ):
        np.testing.assert_allclose(tally.total, np.broadcast_to(tally.baseline, (B, N)), rtol=1e-5)
        assert np.sum(tally.total) > 0


def test_the_first_token_after_padding_on_the_left():
    visible = CAUSAL & (np.arange(T) >= 2)
    weights = np.zeros((T, T), np.float32)
    weights[2:, 2] = 1
    assert tuple(map(float, roles.sink(weights, visible)))[:2] == (5, 5)


def test_one_of_the_two_least_frequent():
    weights = np.eye(3, dtype=np.float32)[[0, 1, 2]]
    frequencies = np.array([9, 2, 5])
    assert float(roles.rare_words(weights, np.ones((3, 3), bool), frequencies).total) == 1
    assert float(roles.rare_words(weights, np.ones((3, 3), bool), frequencies, least=2).total) == 2


def test_a_relation_is_compared_with_the_best_fixed_offset():
    random = np.random.default_rng(3)
    s = 5
    visible = np.ones((B, 1, T, s), bool)
    visible[1, :, :, 3:] = False
    gold = random.random((B, 1, T, s)) < 0.15
    gold[:2] |= np.eye(T, s, k=1, dtype=bool)
    gold[2:] |= np.eye(T, s, k=-2, dtype=bool)
    weights = random.random((L, B, N, T, s)).astype(np.float32)
    found = roles.relation(weights, gold, visible, offsets=range(-3, 4))
    right = gold & visible
    hits = np.take_along_axis(
        np.broadcast_to(right, weights.shape), np.where(visible, weights, -1).argmax(-1)[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(found.tally.total, hits.sum(-1))
    np.testing.assert_array_equal(found.tally.count, right.any(-1).sum(-1))
    by_hand = np.array(
        [[sum(right[b, 0, t, t + o] for t in range(T) if 0 <= t + o < s) for o in range(-3, 4)] for b in range(B)]
    )
    np.testing.assert_array_equal(found.by_offset[:, 0], by_hand)
    best = by_hand.sum(0).argmax()
    np.testing.assert_array_equal(found.tally.baseline[:, 0], by_hand[:, best])
    half = roles.best_offset(found.by_offset[:2])
    assert half == by_hand[:2].sum(0).argmax() and half != best
    np.testing.assert_array_equal(roles.against_offset(found, half).baseline[:, 0], by_hand[:, half])


def test_a_head_that_follows_gold_is_right_always():
    gold = np.zeros((T, T), bool)
    gold[[2, 4, 6], [5, 1, 6]] = True
    found = jax.jit(roles.relation)(gold.astype(np.float32), gold, np.ones((T, T), bool))
    assert (float(found.tally.total), int(found.tally.count), float(found.tally.baseline)) == (3, 3, 1)


def test_roles_go_through_jit_and_grad():
    weights, visible, tokens = _random()
    induction = jax.jit(roles.induction)(weights, visible, tokens)
    np.testing.assert_allclose(induction.total, roles.induction(weights, visible, tokens).total, rtol=1e-5)
    slope = jax.grad(lambda w: roles.previous_token(w, visible).total.sum())(jnp.asarray(weights))
    np.testing.assert_array_equal(slope, np.broadcast_to(np.eye(T, k=-1) * visible, weights.shape))


def _weights_of(head):
    return (np.asarray(head.w_v)[None], np.asarray(head.w_o)[None])


def _table():
    _, params = circuits.induction_model()
    return np.asarray(params.embedding.tokens)


def test_copying_heads_copy():
    table = _table()
    score = lambda head: copying.by_eigenvalues(*_weights_of(head), table, table.T)  # noqa: E731
    np.testing.assert_allclose(score(circuits.copying()).total, [1], rtol=1e-5)
    np.testing.assert_allclose(score(circuits.copying(-2.0)).total, [-1], rtol=1e-5)
    np.testing.assert_allclose(score(circuits.induction()).total, [1], rtol=1e-5)
    assert score(circuits.dead()).total == 0 == score(circuits.previous_token()).total
    assert abs(score(circuits.copying()).baseline[0]) < 0.2
    logits = lambda head: copying.by_logits(*_weights_of(head), table, table.T)  # noqa: E731
    tally = logits(circuits.copying())
    np.testing.assert_allclose(tally.total / tally.count, [1], rtol=1e-5)
    assert logits(circuits.copying(-2.0)).total == 0 == logits(circuits.dead()).total
    assert 0.5 / 31 < tally.baseline[0] / 31 < 2 / 31


def test_eigenvalues_are_those_of_the_whole_matrix():
    random = np.random.default_rng(0)
    d, hv, v, heads = 11, 5, 13, 6
    w_v, w_o = random.normal(size=(L, heads // 2, d, hv)), random.normal(size=(L, heads, hv, d))
    embedding, unembedding = random.normal(size=(v, d)), random.normal(size=(d, v))
    tally = copying.by_eigenvalues(w_v, w_o, embedding, unembedding)
    share = copying.by_logits(w_v, w_o, embedding, unembedding)
    for layer, n in np.ndindex(L, heads):
        whole = embedding @ w_v[layer, n // 2] @ w_o[layer, n] @ unembedding
        values = np.linalg.eigvals(whole)
        np.testing.assert_allclose(tally.total[layer, n], values.real.sum() / np.abs(values).sum(), rtol=1e-6)
        raised = [np.maximum(row - row.mean(), 0) for row in whole]
        by_hand = sum(row[i] / row.sum() for i, row in enumerate(raised))
        np.testing.assert_allclose(share.total[layer, n], by_hand, rtol=1e-6)
    assert tally.total.shape == (L, heads) and abs(tally.baseline[0, 0]) < 0.2


ERRORS = {
    "integer weights": (lambda: roles.mass(np.eye(3, dtype=int), True, True), ("roles.mass", "int", "(3, 3)")),
    "visible that does not fit": (
        lambda: roles.mass(np.eye(3), np.ones((3, 3), bool), np.ones((2, 3), bool)),
        ("visible", "(3, 3)", "(2, 3)", "visible[:, None]"),
    ),
    "counts of visible keys": (
        lambda: roles.mass(np.eye(3), np.ones((3, 3), bool), np.ones((3, 3))),
        ("visible", "bool", "float"),
    ),
    "tokens of another text": (
        lambda: roles.induction(np.eye(3), np.ones((3, 3), bool), np.arange(4)),
        ("tokens", "(4,)", "(3, 3)"),
    ),
    "too few words": (lambda: roles.repeated_tokens(jax.random.key(0), 11), ("length=25", "got 11")),
    "a table that is not turned": (
        lambda: copying.by_logits(np.ones((2, 5, 3)), np.ones((2, 3, 5)), np.ones((7, 5)), np.ones((7, 5))),
        ("copying.by_logits", "[D, V]", "(7, 5)", "transpose"),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, parts = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.slow
def test_the_circuits_are_parameters_of_attention():
    heads = circuits.layer(circuits.previous_token(), circuits.dead())
    x = np.random.default_rng(0).normal(size=(B, T, circuits.WIDTH)).astype(np.float32)
    config = circuits.attention_config(2)
    both = attention.apply(heads, x, config, mask=masks.causal())
    alone = attention.apply(heads, x, config, mask=masks.causal(), gates=jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(both, alone)  # the dead head may go
