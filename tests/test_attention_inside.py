"""Inside attention: captures, heads as slices, JAX's transformations, dropout."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SMALL, apply, apply_captured, booleans, close, random_params, small
from reference import numbers
from tiers import tiered

from mhajax import attention, masks, positions
from mhajax.attention import Config, Params

init_params = jax.jit(attention.init_params, static_argnums=1)

# Looking inside ---------------------------------------------------------------------------------------------------

FULL = {"mask": masks.lengths(np.array([7, 4])) & masks.causal(), "bias": numbers(30, 1, 3, 5, 7)}
LOOKS = [(False, jnp.float32), (True, jnp.float32), (True, jnp.bfloat16)]


@pytest.mark.parametrize(("jit", "dtype"), tiered(LOOKS, (True, jnp.float32)))
def test_looking_changes_no_bit_of_the_output(jit, dtype, full_compiles):
    params, x, memory = jax.tree.map(lambda a: jnp.asarray(a, dtype), small(memory=7))
    options = FULL | {"gates": numbers(31, 2, 3), "dropout_rate": 0.3, "dropout_key": jax.random.key(3)}
    plain, looking = attention.apply, attention.apply_captured
    if jit:
        plain = full_compiles(plain, static_argnames=("config", "dropout_rate"))
        looking = full_compiles(looking, static_argnames=("config", "dropout_rate", "capture"))
    expected = plain(params, x, SMALL, memory=memory, **options)
    for capture in (attention.CAPTURES, ("weights",))[: 1 + jit]:
        out, seen = looking(params, x, SMALL, memory=memory, capture=capture, **options)
        np.testing.assert_array_equal(out, expected)
        assert set(seen) == set(capture)


def test_what_is_seen_is_what_it_is_called():
    params, x, memory = small(memory=7)
    gates = numbers(31, 2, 3)
    out, seen = apply_captured(params, x, SMALL, memory=memory, gates=gates, capture=attention.CAPTURES, **FULL)
    chex.assert_shape(
        [seen[name] for name in attention.CAPTURES],
        [
            (2, 3, 5, 2),
            (2, 1, 7, 2),
            (2, 1, 7, 5),
            (2, 3, 5, 7),
            (2, 3, 5, 7),
            (2, 3, 5),
            (2, 3, 5),
            (2, 3, 7),
            (2, 3, 5, 5),
            (2, 3, 5, 6),
        ],  # fmt: skip
    )
    allowed = (np.arange(7) < np.array([7, 4])[:, None, None, None]) & np.tri(5, 7, dtype=bool)
    queries = np.einsum("btd,ndh->bnth", x, params.w_q) + params.b_q[:, None]
    keys = np.einsum("bsd,ndh->bnsh", memory, params.w_k) + params.b_k[:, None]
    values = np.einsum("bsd,ndh->bnsh", memory, params.w_v) + params.b_v[:, None]
    logits = np.where(allowed, np.einsum("bnth,bmsh->bnts", queries, keys) / np.sqrt(2) + FULL["bias"], -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bmsh->bnth", weights, values) * gates[..., None, None]
    for name, expected in {
        "queries": queries,
        "keys": keys,
        "values": values,
        "weights": weights,
        "heads": heads,
    }.items():
        close(seen[name], expected, 3e-6)
    close(seen["log_sum_exp"], np.log(np.sum(np.exp(logits), -1)), 3e-6)
    np.testing.assert_array_equal(np.isneginf(seen["logits"]), ~np.broadcast_to(allowed, logits.shape))
    close(np.where(allowed, seen["logits"], 0), np.where(allowed, logits, 0), 3e-6)
    np.testing.assert_allclose(np.sum(seen["weights"], -1), 1, rtol=1e-6)
    assert np.all(np.asarray(seen["weights"])[~np.broadcast_to(allowed, logits.shape)] == 0)
    close(np.sum(seen["contributions"], axis=1) + params.b_o, out, 3e-6)
    close(seen["contributions"], np.einsum("bnth,nhd->bntd", heads, params.w_o), 3e-6)


@pytest.mark.slow
def test_weights_are_seen_before_dropout_and_queries_after_rotation():
    params, x, _ = small()
    look = partial(apply_captured, params, x, SMALL, capture=("weights", "queries", "keys"))
    plain, dropped = look()[1], look(dropout_rate=0.5, dropout_key=jax.random.key(0))[1]
    np.testing.assert_array_equal(plain["weights"], dropped["weights"])
    turned = look(rotate=positions.rotary)[1]
    for name in ("queries", "keys"):
        close(turned[name], positions.rotary(plain[name], jnp.arange(5)), 3e-6)


# What is not asked for costs nothing ------------------------------------------------------------------------------


def lowered(**options):
    params, x, _ = small()

    def function(params, x):
        return attention.apply(params, x, SMALL, **options)

    return jax.jit(function).lower(params, x).as_text()


@pytest.mark.parametrize(
    "options",
    [
        {"gates": None},
        {"mask": None},
        {"bias": None, "rotate": None, "positions": None, "memory_positions": None},
        {"dropout_rate": 0.0, "dropout_key": jax.random.key(0)},
        {"dropout_key": None},
        {"positions": jnp.arange(5) + 3},  # nobody looks at them
    ],
    ids=lambda options: ", ".join(options),
)
def test_what_is_not_asked_for_leaves_no_trace(options):
    assert lowered(**options) == lowered()


def test_capturing_nothing_leaves_no_trace_and_something_does():
    params, x, _ = small()

    def function(params, x):
        return attention.apply_captured(params, x, SMALL, capture=())[0]

    assert jax.jit(function).lower(params, x).as_text() == lowered()
    assert lowered(gates=np.ones(3, np.float32)) != lowered() != lowered(mask=masks.causal())


# Heads are slices -------------------------------------------------------------------------------------------------

PAIR_CONFIG = Config(d_model=6, num_heads=3, head_dim=2, value_dim=5, use_bias=True)


def take_heads(params: Params, heads: list[int]) -> Params:
    """These heads, in this order (of as many key heads as query heads)."""
    chosen = jax.tree.map(lambda w: w[jnp.array(heads)], params._replace(b_o=None))
    return chosen._replace(b_o=params.b_o)


@pytest.mark.slow
def test_a_gate_of_zero_is_a_head_less():
    params, x = random_params(PAIR_CONFIG), numbers(1, 2, 5, 6)
    pruned = Config(d_model=6, num_heads=2, head_dim=2, value_dim=5, use_bias=True)
    out = apply(params, x, PAIR_CONFIG, gates=np.array([1.0, 0.0, 1.0]), mask=masks.causal())
    close(out, apply(take_heads(params, [0, 2]), x, pruned, mask=masks.causal()), 1e-6)
    np.testing.assert_array_equal(
        apply(params, x, PAIR_CONFIG, gates=np.ones(3, np.float32)), apply(params, x, PAIR_CONFIG)
    )


def test_the_gradient_of_a_gate_is_what_the_head_contributes():
    params, x, weight = random_params(PAIR_CONFIG), numbers(1, 2, 5, 6), numbers(2, 2, 5, 6)

    @jax.jit
    @jax.grad
    def gradient(gates):
        return jnp.sum(weight * attention.apply(params, x, PAIR_CONFIG, gates=gates))

    _, seen = apply_captured(params, x, PAIR_CONFIG, capture=("contributions",))
    expected = np.einsum("bntd,btd->bn", seen["contributions"], weight)
    close(gradient(np.full((2, 3), 0.7, np.float32)), expected, 1e-5)  # linear in the gates: the same everywhere
    close(gradient(np.zeros(3, np.float32)), expected.sum(0), 1e-5)


def test_the_order_of_heads_does_not_matter():
    params, x = random_params(PAIR_CONFIG), numbers(1, 2, 5, 6)
    out, seen = apply_captured(params, x, PAIR_CONFIG, mask=masks.causal())
    turned, turned_seen = apply_captured(take_heads(params, [2, 0, 1]), x, PAIR_CONFIG, mask=masks.causal())
    close(turned, out, 1e-6)
    close(turned_seen["weights"], seen["weights"][:, jnp.array([2, 0, 1])], 1e-6)


@pytest.mark.slow
def test_heads_start_different_and_with_the_right_variance():
    config = Config(d_model=101, num_heads=6, num_kv_heads=3, head_dim=31, value_dim=37, use_bias=True)
    params = init_params(jax.random.key(1), config)
    shapes = [(6, 101, 31), (3, 101, 31), (3, 101, 37), (6, 37, 101), (6, 31), (3, 31), (3, 37), (101,)]
    assert [array.shape for array in params] == shapes
    fan_in = {"w_q": 101, "w_k": 101, "w_v": 101, "w_o": 6 * 37}
    for name, size in fan_in.items():
        weights = np.asarray(getattr(params, name))
        np.testing.assert_allclose(weights.std(), size**-0.5, rtol=4 / np.sqrt(2 * weights.size))
        heads = weights.reshape(len(weights), -1)
        assert np.max(np.abs(np.corrcoef(heads) - np.eye(len(heads)))) < 5 / np.sqrt(heads.shape[1])
    assert all(np.all(np.asarray(getattr(params, name)) == 0) for name in ("b_q", "b_k", "b_v", "b_o"))
    again, other = init_params(jax.random.key(1), config), init_params(jax.random.key(2), config)
    chex.assert_trees_all_equal(params, again)
    assert np.all(params.w_q != other.w_q)


# JAX's transformations --------------------------------------------------------------------------------------------


def test_several_seeds_are_one_vmap():
    x = numbers(1, 2, 5, 6)
    alone = [random_params(SMALL, seed) for seed in range(3)]
    many = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    together = jax.jit(jax.vmap(lambda params: attention.apply(params, x, SMALL, mask=masks.causal())))(many)
    for params, out in zip(alone, together, strict=True):
        close(out, apply(params, x, SMALL, mask=masks.causal()), 1e-6)


@pytest.mark.parametrize(
    "mask",
    [
        masks.lengths(np.array([7, 0, 4, 2])),
        masks.dense(booleans(3, 4, 3, 5, 7)),
        masks.per_example(booleans(4, 4, 5, 7)) & masks.lengths(np.array([7, 0, 4, 2])),
    ],
    ids=["lengths", "dense", "both"],
)
def test_a_vmap_over_the_batch_is_the_batch(mask):
    params, x, memory = small(leading=(4,), memory=7)
    one = lambda x, memory, mask: attention.apply(params, x, SMALL, memory=memory, mask=mask)  # noqa: E731
    close(jax.jit(jax.vmap(one))(x, memory, mask), apply(params, x, SMALL, memory=memory, mask=mask), 1e-6)


def test_new_values_do_not_retrace():
    params, x, _ = small()
    chex.clear_trace_counter()
    once = jax.jit(
        chex.assert_max_traces(lambda mask, gates: attention.apply(params, x, SMALL, mask=mask, gates=gates), 1)
    )
    outs = [
        once(masks.causal() & masks.lengths(np.array(lengths)) & masks.dense(booleans(i, 5, 5)), numbers(i, 3))
        for i, lengths in enumerate([[1, 5], [3, 2], [5, 5]])
    ]
    assert len({np.asarray(out).tobytes() for out in outs}) == 3


@pytest.mark.slow
def test_compiled_and_eager_agree():
    params, x, memory = small(memory=7)
    close(
        attention.apply(params, x, SMALL, memory=memory, **FULL), apply(params, x, SMALL, memory=memory, **FULL), 1e-6
    )


def test_an_empty_batch_is_an_empty_result():
    params, x, _ = small()
    assert apply(params, x[:0], SMALL, mask=masks.causal()).shape == (0, 5, 6)


@pytest.mark.slow
def test_the_memory_can_be_projected_once():
    params, x, memory = small(memory=7)
    places = jnp.arange(7) + 2
    answers = attention.keys_values(params, memory, SMALL, positions=places, rotate=positions.rotary)
    assert (answers.k.shape, answers.v.shape) == ((2, 1, 7, 2), (2, 1, 7, 5))
    out, seen = attention.apply_to(
        params, x, answers, SMALL, mask=masks.causal(), keys=masks.tokens(7, places), rotate=positions.rotary
    )
    options = {"memory_positions": places, "rotate": positions.rotary, "mask": masks.causal()}
    close(out, apply(params, x, SMALL, memory=memory, **options), 1e-6)
    assert seen == {}


# Dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_of_weights_keeps_the_mean_and_follows_its_key():
    params, x, _ = small()
    drop = jax.jit(
        jax.vmap(lambda key: attention.apply(params, x, SMALL, mask=masks.causal(), dropout_rate=0.3, dropout_key=key))
    )
    keys = jax.random.split(jax.random.key(0), 4096)
    outs = np.asarray(drop(keys), np.float64)
    np.testing.assert_array_equal(outs[:4], drop(keys)[:4])
    assert len({out.tobytes() for out in outs[:50]}) == 50
    error = np.abs(outs.mean(0) - apply(params, x, SMALL, mask=masks.causal()))
    assert np.all(error < 5 * outs.std(0) / np.sqrt(len(outs)) + 1e-6)
    assert outs.std(0).min() > 0.01


def test_dropout_differs_between_examples_heads_and_queries():
    """Every weight is dropped on its own: with equal inputs everywhere, the heads' outputs differ."""
    params = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), random_params(PAIR_CONFIG))
    x = np.broadcast_to(numbers(1, 1, 1, 6), (2, 11, 6))
    _, seen = apply_captured(
        params, x, PAIR_CONFIG, capture=("heads",), dropout_rate=0.5, dropout_key=jax.random.key(1)
    )
    scale = np.asarray(seen["heads"][..., 0]).reshape(-1)  # the share of the weights that stayed, times a constant
    assert len(np.unique(np.round(scale / np.abs(scale).max(), 3))) > 5
    counts = np.asarray(seen["heads"][..., 0])
    for axis in range(3):
        assert np.any(np.abs(np.diff(counts, axis=axis)) > 1e-3)


def test_gradient_goes_through_the_same_dropout():
    """The derivative of a layer that is linear in w_o: out = grad of out's sum with respect to w_o, times w_o."""
    params, x = random_params(Config(d_model=6, num_heads=3)), numbers(1, 2, 5, 6)
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(1)}
    loss = lambda w_o: jnp.sum(attention.apply(  # noqa: E731
        params._replace(w_o=w_o), x, Config(d_model=6, num_heads=3), **options))  # fmt: skip
    value, gradient = jax.jit(jax.value_and_grad(loss))(params.w_o)
    np.testing.assert_allclose(np.sum(gradient * params.w_o), value, rtol=1e-5)
