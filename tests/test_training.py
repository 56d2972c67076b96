"""The training loop on problems whose answers are known; it is handed functions, never a model of this library."""

import os
import signal
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import tiered

from mhajax import training

CONFIG = training.Config(
    steps=12, warmup_steps=2, learning_rate=0.05, log_every=3, evaluate_every=6, checkpoint_every=4, average_decay=0.9
)


class UsersModel(nn.Module):
    """A module that somebody else wrote."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.relu(nn.Dense(7)(x))
        x = nn.Dropout(0.1, deterministic=deterministic)(x)
        return nn.Dense(1)(x)[..., 0]


def init_params(key):
    return UsersModel().init(key, jnp.zeros((1, 3)))["params"]


def loss(params, batch, key):
    x, y = batch
    out = UsersModel().apply({"params": params}, x, deterministic=False, rngs={"dropout": key})
    value = jnp.mean((out - y) ** 2)
    return value, {"error": jnp.sqrt(value)}


def batches(seen):
    while True:
        rng = np.random.default_rng(seen)
        x = rng.normal(size=(8, 3)).astype(np.float32)
        yield x, x.sum(-1)
        seen += 1


def parts(config):
    optimizer = training.optimizer(config)
    return training.init(init_params, optimizer, config), training.make_step(loss, optimizer, config)


@pytest.fixture(scope="module")
def step():
    return parts(CONFIG)[1]


def start(config=CONFIG):
    return training.init(init_params, training.optimizer(config), config)


def test_a_users_flax_module_learns_and_every_batch_is_recorded(step):
    lines = []
    state = training.fit(start(), step, batches, CONFIG, record=lines.extend)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert set(lines[0]) == {"step", "loss", "error", "gradient_norm"}
    assert lines[-1]["loss"][0] < 0.7 * lines[0]["loss"][0]
    assert int(state.step) == 12


def test_two_runs_are_the_same_bit_for_bit(step):
    first, second = (training.fit(start(), step, batches, CONFIG) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


def test_the_step_compiles_once_and_takes_its_state_over():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return loss(params, batch, key)

    optimizer = training.optimizer(CONFIG)
    step = training.make_step(counted, optimizer, CONFIG)
    state = start()
    before = jax.tree.leaves(state.params)[0]
    for batch, _ in zip(batches(0), range(3), strict=False):
        state, _ = step(state, batch)
    assert len(traces) == 1
    assert before.is_deleted()


@pytest.mark.slow
def test_seeds_side_by_side_are_the_seeds_one_by_one():
    config = replace(CONFIG, seeds=3, steps=4, seed=5)
    together = training.fit(*parts(config), batches, config)
    for i in range(3):
        alone_config = replace(config, seeds=1, seed=5 + i)
        alone = training.fit(*parts(alone_config), batches, alone_config)
        one_of_three = jax.tree.map(lambda a, i=i: a[i : i + 1], together.params)
        chex.assert_trees_all_close(one_of_three, alone.params, rtol=1e-5, atol=1e-6)


def test_seeds_differ_from_each_other():
    params = start(replace(CONFIG, seeds=2)).params["Dense_0"]["kernel"]
    assert params.shape == (2, 3, 7)
    assert np.abs(params[0] - params[1]).max() > 0.1


def rates(config):
    """Of every update that a run makes."""
    return np.array([training.schedule(config)(count) for count in range(config.updates)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5, 1, *(0.5 + 0.5 * np.cos(np.pi * np.array([1, 2, 3, 4]) / 4))]),
        ("inverse_sqrt", [0.5, 1, *(2 / np.array([3, 4, 5, 6])) ** 0.5]),  # Vaswani's: min(n^-0.5, n · 2^-1.5) / 2^-0.5
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_schedules(name, expected, accumulate):
    steps, warmup = 6 * accumulate - (accumulate > 1), 2 * accumulate
    config = training.Config(steps=steps, warmup_steps=warmup, accumulate=accumulate, learning_rate=1.0, schedule=name)
    np.testing.assert_allclose(rates(config), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_no_update_is_wasted_at_the_start_and_the_last_is_zero_only_after_the_whole_rate(name):
    for steps, warmup, accumulate in ((1, 0, 1), (3, 0, 4), (2, 0, 1), (5, 4, 1), (7, 3, 3), (9, 8, 8)):
        config = training.Config(
            steps=steps, warmup_steps=warmup, accumulate=accumulate, learning_rate=2.0, schedule=name
        )
        found = rates(config)
        assert len(found) == -(-steps // accumulate) and found[0] > 0 and found.max() == 2
        peak = max(warmup // accumulate, 1)
        if name in ("linear", "cosine") and config.updates > peak:
            assert found[-1] == 0 and (found[:-1] > 0).all()
        else:
            assert (found > 0).all()


@pytest.mark.slow
def test_weight_decay_spares_vectors():
    config = training.Config(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, steps=2)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    optimizer = training.optimizer(config)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert np.all(np.asarray(updates["matrix"]) < 0)
    assert np.all(np.asarray(updates["vector"]) == 0)


def test_a_step_with_weight_decay_and_no_gradient_changes_matrices_only():
    """Layers are stacked, so that a scale has two axes."""
    config = training.Config(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5, steps=2)
    params = {"norm": {"scale": jnp.ones((3, 2))}, "b_in": jnp.ones((3, 2)), "w_in": jnp.ones((3, 2, 2))}
    for optimizer, changed in (
        (training.optimizer(config), {"w_in"}),
        (training.optimizer(config, decayed=lambda params: jax.tree.map(lambda _: True, params)), set(params)),
    ):
        state, zeros = jax.jit(optimizer.init)(params), jax.tree.map(jnp.zeros_like, params)
        updates: Any = jax.jit(optimizer.update)(zeros, state, params)[0]
        moved = {name for name, part in updates.items() if all(np.all(leaf < 0) for leaf in jax.tree.leaves(part))}
        assert moved == changed


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weight_decay_that_would_do_nothing_is_refused(name):
    with pytest.raises(ValueError) as caught:
        training.Config(optimizer=name, weight_decay=0.1)
    for part in ("weight_decay must be 0", repr(name), "0.1", "'adamw'", "'lion'"):
        assert part in str(caught.value)
    assert not training.Config(optimizer=name).weight_decay and not training.Config(weight_decay=0.0).weight_decay


@pytest.mark.slow
def test_clipping_scales_the_global_norm():
    config = training.Config(
        optimizer="sgd", beta1=0.0, learning_rate=1.0, warmup_steps=0, schedule="constant", clip_norm=2.0
    )
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    optimizer = training.optimizer(config)
    gradient = {"a": jnp.full(3, 30.0), "b": jnp.full(4, -40.0)}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 2.0, rtol=1e-6)


@pytest.mark.slow
def test_the_average_follows_its_recurrence():
    config = replace(CONFIG, steps=5)
    state, step = parts(config)
    expected = jax.tree.map(jnp.copy, state.params)
    for i, batch in zip(range(5), batches(0), strict=False):
        state, _ = step(state, batch)
        decay = min(0.9, (2 + i) / (11 + i))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, state.params)
    chex.assert_trees_all_close(state.average, expected, rtol=1e-5, atol=1e-6)
    assert state.evaluated is state.average


@pytest.mark.slow
def test_resumed_inside_a_group_of_accumulated_batches_ends_with_the_same_bits(tmp_path):
    config = replace(CONFIG, accumulate=5)
    start, step = parts(config)
    whole = training.fit(start, step, batches, config)
    checkpoints = training.Checkpoints(tmp_path)
    with pytest.raises(training.Interrupted):
        training.fit(parts(config)[0], step, _signalled(7), config, checkpoints=checkpoints)
    state = checkpoints.restore(parts(config)[0])
    assert int(state.step) == 7
    chex.assert_trees_all_equal(training.fit(state, step, batches, config), whole)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_after", tiered([1, 5, 6, 11], 5))
def test_resumed_from_a_checkpoint_ends_with_the_same_bits(tmp_path, step, stopped_after):
    whole_lines, lines = [], []
    whole = training.fit(start(), step, batches, CONFIG, record=whole_lines.extend)

    checkpoints = training.Checkpoints(tmp_path)
    with pytest.raises(training.Interrupted):
        training.fit(start(), step, _signalled(stopped_after), CONFIG, checkpoints=checkpoints, record=lines.extend)
    checkpoints.close()

    checkpoints = training.Checkpoints(tmp_path)
    assert checkpoints.latest_step() == stopped_after
    state = checkpoints.restore(start())
    state = training.fit(state, step, batches, CONFIG, checkpoints=checkpoints, record=lines.extend)
    chex.assert_trees_all_equal(state, whole)
    assert lines == whole_lines


def _signalled(after):
    def stream(seen):
        for batch in batches(seen):
            seen += 1
            if seen == after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return stream


def test_handlers_of_signals_are_put_back(step):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    training.fit(start(), step, batches, CONFIG)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("bad", tiered([np.nan, np.inf], np.inf))
def test_a_loss_that_is_not_finite_stops_with_step_checkpoint_and_advice(tmp_path, step, bad):
    def spoilt(seen):
        for number, (x, y) in enumerate(batches(seen), start=seen + 1):
            yield (x, y * bad) if number == 8 else (x, y)

    checkpoints = training.Checkpoints(tmp_path)
    lines = []
    with pytest.raises(training.NonFinite) as error:
        training.fit(start(), step, spoilt, CONFIG, checkpoints=checkpoints, record=lines.extend)
    for part in ("batch 8", "after batch 4", "learning_rate", "warmup_steps", "clip_norm"):
        assert part in str(error.value)
    assert max(line["step"] for line in lines) == 6  # nothing of the spoilt stretch was recorded or saved
    saved = checkpoints.restore(start())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved.params))


@pytest.mark.parametrize("at", tiered([4, 12], 4))
def test_an_update_that_is_not_finite_is_neither_judged_nor_saved(tmp_path, step, at):
    def spoilt(state, batch):  # loss and gradient are finite, what the update makes is not
        state, metrics = step(state, batch)
        if int(state.step) == at:
            state = state._replace(params=jax.tree.map(lambda a: a.at[0].set(jnp.inf), state.params))
        return state, metrics

    checkpoints, judged = training.Checkpoints(tmp_path), []

    def evaluate(params):
        judged.append(all(np.isfinite(a).all() for a in jax.tree.leaves(params)))
        return {"score": 1.0}

    with pytest.raises(training.NonFinite, match=f"batch {at}: a parameter after its update is not finite") as error:
        training.fit(start(), spoilt, batches, CONFIG, evaluate=evaluate, checkpoints=checkpoints)
    assert error.value.batch == at and all(judged)
    assert checkpoints.latest_step() == (None if at == 4 else 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 1e300},
        {"weight_decay": 1e39},
        {"clip_norm": 1e39},
        {"beta1": 1 - 1e-12},
        {"beta2": 1 - 1e-9},
        {"label_smoothing": 1 - 1e-9},
        {"average_decay": 1 - 1e-12},
    ],
)
def test_numbers_that_a_float32_does_not_hold_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be .*float32"):
        training.Config(**wrong)


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"optimizer": "adma"}, ValueError, "one of 'adamw', 'adam', 'sgd', 'lion', got 'adma'; did you mean 'adam'?"),
        ({"schedule": "cos"}, ValueError, "one of 'cosine', .*, got 'cos'"),
        ({"seed": True}, TypeError, "an integer, got True"),
        ({"steps": 200.0}, TypeError, "an integer, got 200.0; write 200"),
        ({"beta1": "0.9"}, TypeError, "a number, got '0.9'"),
        ({"learning_rate": float("nan")}, ValueError, "finite, got nan"),
        ({"clip_norm": float("inf")}, ValueError, "finite"),
        ({"weight_decay": float("nan")}, ValueError, "finite, got nan"),
        ({"seed": -1}, ValueError, "at least 0, got -1"),
    ],
)
def test_every_field_of_the_config_is_of_its_kind(wrong, kind, said):
    (name,) = wrong
    with pytest.raises(kind, match=f"^{name} must be {said}"):
        training.Config(**wrong)


@pytest.mark.slow
def test_the_best_parameters_are_kept(tmp_path, step):
    checkpoints = training.Checkpoints(tmp_path)
    scores = iter([3.0, 1.0])
    seen = []

    def evaluate(params):
        seen.append(jax.device_get(params))
        return {"score": next(scores)}

    lines = []
    training.fit(start(), step, batches, CONFIG, evaluate=evaluate, checkpoints=checkpoints, record=lines.extend)
    assert checkpoints.best_score() == {"step": 6, "score": 3.0}
    chex.assert_trees_all_equal(checkpoints.best(start().params), seen[0])
    assert [line for line in lines if "score" in line] == [{"step": 6, "score": 3.0}, {"step": 12, "score": 1.0}]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    state = start()
    checkpoints.save(state)
    other = state._replace(params={"w": jnp.zeros((1, 3))})
    with pytest.raises(ValueError, match="another config"):
        checkpoints.restore(other)
    with pytest.raises(ValueError, match="holds no state"):
        training.Checkpoints(tmp_path / "empty").restore(state)


def test_an_unfinished_save_is_not_seen(tmp_path):
    checkpoints = training.Checkpoints(tmp_path)
    checkpoints.save(start())
    checkpoints.close()
    (tmp_path / "latest" / "7.orbax-checkpoint-tmp").mkdir()
    assert training.Checkpoints(tmp_path).latest_step() == 0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"learning_rate": -1.0}, ["learning_rate", "above 0", "-1.0"]),
        ({"steps": 0}, ["steps", "at least 1", "0"]),
        ({"average_decay": 1.0}, ["average_decay", "[0, 1)", "1.0"]),
        ({"warmup_steps": 50, "steps": 50}, ["warmup_steps=50", "steps=50"]),
        ({"clip_norm": -0.5}, ["clip_norm", "negative"]),
    ],
)
def test_configs_that_make_no_sense_are_refused(change, parts):
    with pytest.raises(ValueError) as error:
        replace(CONFIG, **change)
    assert all(part in str(error.value) for part in parts)


def test_dropout_keys_differ_by_step_and_seed():
    def noise_loss(params, batch, key):
        return jnp.sum(params["w"] * 0.0) + jax.random.uniform(key), {}

    config = training.Config(steps=3, warmup_steps=0, seeds=2, log_every=1)
    optimizer = training.optimizer(config)
    state = training.init(lambda key: {"w": jnp.zeros(2)}, optimizer, config)
    step = training.make_step(noise_loss, optimizer, config)
    lines = []
    training.fit(state, step, lambda seen: iter(partial(int, 0), 1), config, record=lines.extend)
    values = [value for line in lines for value in line["loss"]]
    assert len(set(values)) == 6
