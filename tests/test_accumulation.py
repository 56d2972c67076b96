"""Accumulated batches: one large batch, none lost at the end, each by its weight."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhajax import training


def test_accumulated_batches_are_one_large_batch():
    def plain_loss(params, batch, key):
        return jnp.mean((batch @ params["w"] - 1.0) ** 2), {}

    make = lambda key: {"w": jax.random.normal(key, (3,))}  # noqa: E731
    small = [np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32) for i in range(4)]
    large = [np.concatenate(small[i : i + 2]) for i in (0, 2)]
    options = {"optimizer": "sgd", "beta1": 0.0, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    results = []
    for data, accumulate in ((small, 2), (large, 1)):
        config = training.Config(
            steps=len(data), accumulate=accumulate, learning_rate=0.1, average_decay=0.5, **options
        )
        optimizer = training.optimizer(config)
        state = training.init(make, optimizer, config)
        step = training.make_step(plain_loss, optimizer, config)
        state = training.fit(state, step, lambda seen, data=data: iter(data[seen:]), config)
        results.append((state.params, state.average))
    chex.assert_trees_all_close(*results, rtol=1e-6)


PLAIN = {"optimizer": "sgd", "beta1": 0.0, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}


def trained_on(gradients, weights=None, **changes):
    """Minus the parameter after batches with these gradients (and weights), and the steps at which it changed."""
    config = training.Config(**(PLAIN | {"learning_rate": 1.0, "log_every": 1} | changes))  # pyright: ignore

    def linear_loss(params, batch, key):
        return params["w"] * batch[0], {} if weights is None else {"weight": batch[1]}

    optimizer = training.optimizer(config)
    state = training.init(lambda key: {"w": jnp.float32(0)}, optimizer, config)
    step = training.make_step(linear_loss, optimizer, config)
    values = []
    for batch in zip(jnp.float32(gradients), jnp.float32(weights or gradients), strict=True):
        state, metrics = step(state, batch)
        values.append(float(-state.params["w"][0]))
    assert set(metrics) == {"loss", "gradient_norm"}
    return values[-1], [i + 1 for i, (old, new) in enumerate(zip([0.0, *values], values, strict=False)) if old != new]


@pytest.mark.parametrize(
    ("steps", "accumulate", "expected", "changed"),
    [
        (5, 2, 5.5 + 550 + 10_000, [2, 4, 5]),  # the last update has one batch
        (3, 4, (1 + 10 + 100) / 3, [3]),  # fewer batches than an update should have
        (4, 2, 5.5 + 550, [2, 4]),
        (3, 1, 111, [1, 2, 3]),
    ],
)
def test_no_batch_is_lost_at_the_end(steps, accumulate, expected, changed):
    total, at = trained_on([1, 10, 100, 1000, 10_000][:steps], steps=steps, accumulate=accumulate)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert at == changed


def test_accumulated_batches_count_by_their_weight():
    """Gradients of means over 10, 2, 4 and 1 tokens; the last group is one batch, whatever its weight."""
    total, at = trained_on([1.0, 7.0, 3.0, 5.0], [10, 2, 4, 1], steps=4, accumulate=3)
    np.testing.assert_allclose(total, (10 * 1 + 2 * 7 + 4 * 3) / 16 + 5, rtol=1e-6)
    assert at == [3, 4]


def test_batches_of_different_lengths_accumulate_to_the_mean_per_token_of_one_large_batch():
    def token_loss(params, batch, key):
        x, valid = batch
        sums = jnp.sum(valid * (x @ params["w"] - 1.0) ** 2), jnp.sum(valid)
        return sums[0] / sums[1], {"weight": sums[1]}

    x = np.random.default_rng(0).normal(size=(2, 10, 3)).astype(np.float32)
    valid = np.arange(10) < np.array([[10], [2]])
    results = []
    for data, accumulate in (([(x[0], valid[0]), (x[1], valid[1])], 2), ([(x.reshape(20, 3), valid.reshape(20))], 1)):
        config = training.Config(**(PLAIN | {"steps": len(data), "accumulate": accumulate, "learning_rate": 0.1}))  # pyright: ignore
        optimizer = training.optimizer(config)
        state = training.init(lambda key: {"w": jnp.ones(3)}, optimizer, config)
        step = training.make_step(token_loss, optimizer, config)
        results.append(training.fit(state, step, lambda seen, data=data: iter(data[seen:]), config).params["w"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    assert np.max(np.abs(results[0] - 1)) > 0.05


def test_an_optimizer_that_does_not_accumulate_is_refused():
    config = training.Config(**(PLAIN | {"steps": 4, "accumulate": 2}))  # pyright: ignore
    quadratic = lambda params, batch, key: (jnp.sum(params["w"] ** 2), {})  # noqa: E731
    own = optax.sgd(1.0)
    state = training.init(lambda key: {"w": jnp.ones(2)}, own, config)
    with pytest.raises(ValueError, match=r"accumulate=2,.*accumulation.accumulate\(optimizer, 2, steps=4\)"):
        training.make_step(quadratic, own, config)(state, jnp.zeros(()))
