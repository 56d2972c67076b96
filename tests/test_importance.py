"""Importance of heads: against loops over heads, finite differences, closed forms, and heads that were planted."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from planted import DEAD, DUPLICATES, HARMFUL, NEEDED, PLANTED, planted
from tiers import tiered

from mhajax import attention, language_model, masks, transformer, translator
from mhajax.attentions import PerAttention
from mhajax.heads import ablation, importance
from mhajax.statistics import Tally

B, S, T, V = 3, 7, 5, 11
COMMON: dict[str, Any] = {"d_model": 12, "d_ff": 10, "vocab_size": V, "encoder_layers": 2, "decoder_layers": 3}
MODELS = {
    "grouped, biases": translator.Config(**COMMON, num_heads=4, num_kv_heads=2, head_dim=2, value_dim=5, use_bias=True),
    "layer norm": translator.Config(**COMMON, num_heads=3, norm="layer", activation="swiglu", positions="sinusoidal"),
}
LENGTHS = np.array([7, 4, 2])


def enable_x64() -> Any:
    """The context that newer versions of JAX have under one name, older ones under another."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()  # pyright: ignore


def noisy(params: Any, dtype: Any = np.float32) -> Any:
    """Parameters none of which is 0 or 1, as biases and norms are at first."""
    random = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: np.asarray(leaf + 0.1 * random.standard_normal(leaf.shape), dtype), params)


def removed(amounts: Any) -> Any:
    """The gates that remove as much."""
    return jax.tree.map(lambda amount: 1 - amount, amounts)


def is_tally(node: Any) -> bool:
    return isinstance(node, Tally)


class Model:
    """A translator with a batch: its losses as a function of gates, and of features."""

    def __init__(self, config: translator.Config, dtype: Any = np.float32):
        random = np.random.default_rng(3)
        self.config = config
        self.params = noisy(translator.init_params(jax.random.key(1), config), dtype)
        self.source, self.target = (jnp.asarray(random.integers(0, V, (B, length))) for length in (S, T))
        self.wanted = random.standard_normal((T, config.d_model)).astype(dtype)
        n, layers = config.num_heads, (config.encoder_layers, config.decoder_layers, config.decoder_layers)
        self.gates = PerAttention(
            **{name: jnp.ones((count, n), dtype) for name, count in zip(translator.NAMES, layers, strict=True)}
        )

    def readout(self, features):
        return jnp.sum((features - self.wanted) ** 2, axis=(-2, -1))

    def loss(self, gates, rows=slice(None)):
        features = translator.features(
            self.params, self.source[rows], self.target[rows], self.config,
            source_lengths=jnp.asarray(LENGTHS)[rows], gates=gates,
        )  # fmt: skip
        return self.readout(features)

    def looped(self):
        """The definition: a loop over heads."""
        loss = jax.jit(self.loss)
        flat, rebuild = ravel_pytree(self.gates)
        return np.array([loss(rebuild(flat.at[head].set(0))) for head in range(flat.size)])


@pytest.fixture(scope="module", params=tiered(MODELS, "layer norm"))
def model(request, quick_compiles):
    return Model(MODELS[request.param])


@pytest.fixture(scope="module")
def looped(model):
    return model.looped()


def by_head(tree: Any) -> np.ndarray:
    """Leaves [L, B, N] as [heads, B]."""
    return np.concatenate([np.moveaxis(np.asarray(leaf), 1, 2).reshape(-1, B) for leaf in jax.tree.leaves(tree)])


def some_at_once(model: Model, some: int) -> int | None:
    """Of the two models one computes all heads at once, the other some."""
    return some if model.config.norm == "layer" else None


@pytest.mark.slow
def test_all_ablations_are_those_of_a_loop(model, looped):
    batch_size = some_at_once(model, 7)
    found = jax.jit(lambda gates: importance.ablations(model.loss, gates, batch_size=batch_size))(model.gates)
    assert isinstance(found, PerAttention) and by_head(found.cross).shape == (3 * model.config.num_heads, B)
    np.testing.assert_allclose(by_head(found), looped, rtol=1e-5)
    assert np.std(looped, axis=0).min() > 0.1  # a swapped head would be seen


@pytest.mark.slow
def test_sharing_work_changes_no_number(model, looped):
    batch_size = some_at_once(model, 2)

    @jax.jit
    def at_once(params):
        stages = translator.stages(params, model.source, model.target, model.config, source_lengths=LENGTHS)
        return ablation.of_stages(stages, model.readout, batch_size=batch_size)

    np.testing.assert_allclose(by_head(at_once(model.params)), looped, rtol=1e-5)


@pytest.mark.slow
def test_the_layers_of_a_language_model(quick_compiles):
    """Longer than what the dense path takes, with segments, positions per example, and leading axes of the mask."""
    length = 50
    config = language_model.Config(d_model=12, num_heads=3, num_kv_heads=1, num_layers=2, vocab_size=V, d_ff=10)
    params = noisy(language_model.init_params(jax.random.key(2), config))
    random = np.random.default_rng(4)
    x = random.standard_normal((2, length, 12), np.float32)
    given: dict[str, Any] = {
        "mask": masks.causal() & masks.segments(np.arange(length) // 30) & masks.lengths(np.array([length, 31])),
        "positions": np.arange(length) + np.array([[0], [9]]),
        "rotate": lambda x, places: x * jnp.cos(places)[..., None],
    }
    readout = lambda features: jnp.sum(features**3, axis=(-2, -1))  # noqa: E731
    run = partial(transformer.apply, params.stack, x, config, **given)
    expected = importance.ablations(lambda g: readout(run(gates=PerAttention(attention=g))), jnp.ones((2, 3)))
    stage = transformer.Stage(params.stack, config, x, given, {"attention": "self"})
    found = jax.jit(lambda x: ablation.of_stages([stage._replace(x=x)], readout))(x)
    assert list(found) == ["self"]
    np.testing.assert_allclose(found.self, expected, rtol=2e-5)


def test_lost_is_a_difference_per_token():
    full, tokens = jnp.array([1.0, 2, 4]), np.array([2, 1, 5])
    without = PerAttention(attention=full[:, None] + jnp.arange(10.0).reshape(5, 1, 2))  # [L, B, N]
    tally = importance.lost(without, full, tokens=tokens).attention
    np.testing.assert_allclose(tally.total, np.broadcast_to(np.arange(10.0).reshape(5, 1, 2), (5, 3, 2)))
    np.testing.assert_allclose(tally.count, tokens[:, None])
    assert not np.any(tally.baseline) and tally.baseline.shape == tally.total.shape
    assert importance.lost(without, full).attention.count.tolist() == [[1], [1], [1]]
    np.testing.assert_array_equal(
        importance.ranking(PerAttention(attention=tally, cross=tally)), np.argsort([*range(10)] * 2, kind="stable")
    )


# Derivatives, in 64 bits


@pytest.fixture(scope="module")
def exact(quick_compiles):
    """Slopes and curvatures of a model, and its loss as a function of flat gates [heads] to [B]."""
    with enable_x64():
        model = Model(MODELS["grouped, biases"], np.float64)
        flat, rebuild = ravel_pytree(model.gates)
        loss = jax.jit(lambda flat: model.loss(rebuild(flat)))
        tallies = jax.jit(
            lambda gates: (
                importance.michel(model.loss, gates, tokens=LENGTHS),
                importance.attribution(lambda a: model.loss(removed(a)), jax.tree.map(jnp.zeros_like, gates)),
                importance.interactions(model.loss, gates, tokens=LENGTHS),
            )
        )(model.gates)  # fmt: skip
    return model, loss, tallies


@pytest.mark.slow
def test_slopes_are_finite_differences(exact):
    model, loss, (michel, attribution, _) = exact
    with enable_x64():
        ones, step = np.ones(ravel_pytree(model.gates)[0].size), 1e-5
        differences = np.array(
            [(loss(ones + step * row) - loss(ones - step * row)) / (2 * step) for row in np.eye(ones.size)]
        )
    assert np.ptp(np.sign(differences), axis=1).any()  # sentences disagree about a head: the absolute value is inside
    np.testing.assert_allclose(
        by_head([t.total for t in jax.tree.leaves(michel, is_leaf=is_tally)]), abs(differences), atol=1e-7
    )
    np.testing.assert_allclose(
        by_head([t.total for t in jax.tree.leaves(attribution, is_leaf=is_tally)]), -differences, atol=1e-7
    )
    np.testing.assert_array_equal(michel.cross.count, LENGTHS[:, None])


@pytest.mark.slow
def test_slopes_are_those_of_one_sentence_at_a_time(exact):
    model, _, (michel, _, _) = exact
    with enable_x64():
        one = lambda gates, row: model.loss(gates, row[None])[0]  # noqa: E731
        slopes = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))(model.gates, jnp.arange(B))
        np.testing.assert_allclose(jnp.swapaxes(jnp.abs(slopes.encoder), 0, 1), michel.encoder.total, rtol=1e-9)


@pytest.mark.slow
def test_interactions_are_second_differences(exact):
    model, loss, (*_, found) = exact
    with enable_x64():
        heads, step = ravel_pytree(model.gates)[0].size, 1e-4
        assert found.total.shape == (B, heads, heads) and found.count.shape == (B, 1, 1)
        np.testing.assert_allclose(found.total, np.swapaxes(found.total, 1, 2), rtol=1e-9, atol=1e-12)
        for i, j in [(0, 3), (2, 9), (8, 30), (5, 5), (31, 17)]:  # within a layer, between kinds of attention
            at = lambda a, b, i=i, j=j: loss(np.ones(heads) + step * (a * np.eye(heads)[i] + b * np.eye(heads)[j]))  # noqa: E731
            difference = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / (4 * step**2)
            np.testing.assert_allclose(found.total[:, i, j], difference, rtol=1e-5, atol=1e-5)


def test_slopes_of_a_product_are_exact():
    """Of Σ a_i a_j g_i g_j / 2: |a_i Σ a_j| at gates of 1, by the tokens that it is divided by."""
    slopes = np.array([[1.0, 2, 3, 4, 5], [0, 1, -2, 3, 1]], np.float32)
    loss = lambda gates: jnp.sum(gates * slopes, axis=-1) ** 2 / 2  # noqa: E731
    found = importance.michel(loss, jnp.ones(5), tokens=np.array([3, 2]))
    np.testing.assert_allclose(found.total, np.abs(slopes * slopes.sum(-1, keepdims=True)), rtol=1e-6)
    np.testing.assert_array_equal(found.count, [[3], [2]])


@pytest.mark.slow
def test_interactions_of_a_product_are_exact():
    """Σ a_i a_j g_i g_j has second derivatives a_i a_j and 2 a_i², at any gates, in a tree of any shape."""
    slopes = np.array([[1.0, 2, 3, 4, 5], [0, 1, -2, 3, 1]], np.float32)
    gates = {"first": jnp.full((1, 2), 0.3), "second": jnp.full((3,), -2.0)}

    def loss(gates):
        both = jnp.concatenate(
            [jnp.moveaxis(gates["first"], 0, -2).reshape(*gates["second"].shape[:-1], 2), gates["second"]], -1
        )
        return jnp.sum(both * slopes, axis=-1) ** 2 / 2

    found = importance.interactions(loss, gates, batch_size=4)
    np.testing.assert_allclose(found.total, slopes[:, :, None] * slopes[:, None, :], rtol=1e-6)


@pytest.mark.slow
def test_second_derivatives_of_the_blockwise_path(quick_compiles):
    config = attention.Config(d_model=6, num_heads=3)
    params = attention.init_params(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (2, 70, 6))

    def interactions(kernel):
        def loss(gates):  # two layers, so that gates go through the weights of the second
            below = attention.apply(params, x, config, kernel=kernel, gates=gates, mask=masks.causal())
            return jnp.sum(attention.apply(params, below, config, kernel=kernel, gates=gates) ** 2, axis=(-2, -1))

        return importance.interactions(loss, jnp.ones(3)).total

    np.testing.assert_allclose(interactions("blockwise"), interactions("dense"), rtol=1e-4)


# Planted heads


@pytest.fixture(scope="module")
def circuit():
    """A loss of gates, and Σ_t contribution² of every head, [B, N]."""
    x = jax.random.normal(jax.random.key(8), (3, 6, 4))
    params, wanted = jax.jit(planted)(x)

    @jax.jit
    def loss(gates):
        return jnp.sum((attention.apply(params, x, PLANTED, gates=gates) - wanted) ** 2, axis=(-2, -1))

    _, seen = attention.apply_captured(params, x, PLANTED, capture=("contributions",))
    return loss, np.sum(seen["contributions"] ** 2, axis=(-2, -1))


def test_removing_planted_heads(circuit):
    loss, size = circuit
    lost = importance.lost(importance.ablations(loss, jnp.ones(5)), loss(jnp.ones(5))).total
    np.testing.assert_allclose(lost[:, DEAD], 0, atol=1e-5)
    np.testing.assert_allclose(lost[:, HARMFUL], -size[:, HARMFUL], rtol=1e-5)  # below 0: better without it
    for head in (*DUPLICATES, NEEDED):
        np.testing.assert_allclose(lost[:, head], size[:, head], rtol=1e-4)
    tally = importance.lost(importance.ablations(loss, jnp.ones(5)), loss(jnp.ones(5)))
    assert importance.ranking(tally)[:2].tolist() == [HARMFUL, DEAD]


def test_slopes_of_planted_heads(circuit):
    """At the optimum the slope of a needed head is 0: only removal sees it. The harmful one has twice its size."""
    loss, size = circuit
    michel = importance.michel(loss, jnp.ones(5)).total
    assert np.all(michel[:, DEAD] == 0)
    np.testing.assert_allclose(michel[:, HARMFUL], 2 * size[:, HARMFUL], rtol=1e-5)
    np.testing.assert_allclose(michel[:, NEEDED], 0, atol=1e-4)
    removal = importance.attribution(lambda amounts: loss(1 - amounts), jnp.zeros(5)).total
    assert np.all(removal[:, DEAD] == 0)
    np.testing.assert_allclose(removal[:, HARMFUL], -2 * size[:, HARMFUL], rtol=1e-5)


def test_interactions_of_planted_heads(circuit):
    """(g_0 + g_1)² c² has 2 c² for the duplicates: removing both costs more than the sum. Other pairs add up."""
    loss, size = circuit
    found = np.array(importance.interactions(loss, jnp.ones(5)).total)
    np.testing.assert_allclose(found[:, 0, 1], 2 * size[:, 0], rtol=1e-5)
    np.testing.assert_allclose(np.diagonal(found, axis1=1, axis2=2), 2 * size, rtol=1e-5)
    found[:, [0, 1], [1, 0]] = 0
    found[:, range(5), range(5)] = 0
    np.testing.assert_allclose(found, 0, atol=1e-4)
    both = loss(jnp.ones(5).at[jnp.array(DUPLICATES)].set(0)) + loss(jnp.ones(5))
    each = [loss(jnp.ones(5).at[head].set(0)) for head in DUPLICATES]
    np.testing.assert_allclose(both - sum(each), 2 * size[:, 0], rtol=1e-4)  # exact, as the loss is quadratic


@pytest.mark.slow
def test_attribution_is_exact_for_a_linear_readout(circuit):
    x = jax.random.normal(jax.random.key(8), (3, 6, 4))
    params, _ = jax.jit(planted)(x)
    weights = jax.random.normal(jax.random.key(9), (6, 4))
    loss = lambda gates: jnp.sum(attention.apply(params, x, PLANTED, gates=gates) * weights, axis=(-2, -1))  # noqa: E731
    without = importance.ablations(loss, jnp.ones(5), batch_size=5)
    exact = importance.lost(without, loss(jnp.ones(5))).total
    patched = lambda amounts: loss(1 - amounts)  # noqa: E731
    np.testing.assert_allclose(importance.attribution(patched, jnp.zeros(5)).total, exact, rtol=1e-3, atol=1e-5)
    directions = np.random.default_rng(6).standard_normal((2, 5)).astype(np.float32)
    along = importance.attribution_along(patched, jnp.zeros(5), directions, tokens=np.array([6, 6, 5]))
    np.testing.assert_allclose(along.total, directions @ exact.T, rtol=1e-3, atol=1e-4)
    assert along.count.tolist() == [6, 6, 5]


def test_a_curve_removes_one_head_after_the_other(circuit):
    loss, _ = circuit
    order = jnp.array([HARMFUL, DEAD, 1])
    found = importance.curve(loss, jnp.ones(5), order, tokens=np.array([6, 6, 6]), batch_size=2)
    gates = np.ones((4, 5), np.float32)
    for row, head in enumerate(order, 1):
        gates[row:, head] = 0
    np.testing.assert_allclose(found.total, [loss(row) for row in gates], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.baseline, found.total[:1])
    np.testing.assert_allclose(found.total[1:3], 0, atol=1e-9)


@pytest.mark.parametrize("name", ["ablations", "michel", "attribution", "interactions"])
def test_a_loss_that_is_one_number_is_refused(name):
    with pytest.raises(ValueError, match=rf"importance.{name}: loss .* \[B\], got shape \(\)"):
        getattr(importance, name)(jnp.sum, jnp.ones(3))


@pytest.mark.slow
def test_what_a_stack_does_not_take(model):
    stage = translator.stages(model.params, model.source[0], model.target[0], model.config)[0]
    with pytest.raises(ValueError, match=r"ablation.of_stages: x of a stage must be \[B, T, D=12\], got \(7, 12\)"):
        ablation.of_stages([stage], jnp.sum)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ablation.of_stages([stage], jnp.sum, batch_size=0)
