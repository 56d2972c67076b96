"""The arms of a study of a generated task: what they are, and all seeds of one trained as one compiled program."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import work
from experiments.errors import ConfigError
from experiments.studies.generated import model
from experiments.studies.generated.task import Case, Task

THREADS = 4
WARMUP = 0.05  # of the steps
CLIP = 1.0  # global norm of the gradients


@dataclass(frozen=True)
class Arm:
    """A table [[arms]]: a model of attention alone.

    Attributes:
      name: for a reader.
      width: D, channels of a token.
      num_heads: N, heads of every layer.
      head_dim: H, width of a head; left out: D/N.
      layers: how many there are.
      variant: of the attention: "softmax", "gated", "sinks" or "sigmoid".
      hide_first: whether the first token is no key for any query.
      untrained: whether w_q and w_k stay as they were drawn; what they are given, w_in, is trained all the same.
      control: it is trained and drawn, and has no say in the verdict unless the task says so.
    """

    name: str
    width: int
    num_heads: int = 1
    head_dim: int | None = None
    layers: int = 1
    variant: str = "softmax"
    hide_first: bool = False
    untrained: bool = False
    control: bool = False

    def __post_init__(self):
        if self.variant not in model.VARIANTS:
            known = ", ".join(model.VARIANTS)
            raise ValueError(f"arm {self.name!r}: variant must be one of {known}, got {self.variant!r}.")
        for name in ("width", "num_heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"arm {self.name!r}: {name} must be at least 1, got {getattr(self, name)}.")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"arm {self.name!r}: head_dim must be at least 1, got {self.head_dim}.")
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"arm {self.name!r}: width must be a multiple of num_heads={self.num_heads}, got "
                             f"{self.width}; or give head_dim.")  # fmt: skip

    def model(self, task: Task, case: Case) -> model.Config:
        """Its shape for the features and outputs of a case."""
        return model.Config(
            features=case.features, outputs=case.outputs, width=self.width, num_heads=self.num_heads,
            head_dim=self.head_dim, layers=self.layers, variant=self.variant, residual=task.residual,
            reads=task.reads, hide_first=self.hide_first, untrained=self.untrained,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training:
    """The table [training].

    Attributes:
      steps: updates of Adam, of every arm alike; the rate rises over the first 5 %, then falls to 0 as a cosine.
      rates: learning rates, of which every arm takes for every case the best; of equally good ones the first.
      tuning_seeds: seeds by which the best is chosen; they are others than those reported.
      seed: of the first model; the batches depend on it too, and are the same for all models.
    """

    steps: int = 1000
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    tuning_seeds: int = 2
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.tuning_seeds < 1:
            raise ValueError(f"steps and tuning_seeds must be at least 1, got {self.steps} and {self.tuning_seeds}.")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates must be one or more above 0, got {list(self.rates)}.")


class Found(NamedTuple):
    """What an arm reached.

    Attributes:
      arm: its table.
      values: case → measure → number of each seed.
      rates: case → the learning rate.
      tried: case → rate → mean of what rates are chosen by over the tuning seeds; None where one diverged.
      parameters: how many it has, in the first case.
      seconds: of training and measuring, compilation included.
    """

    arm: Arm
    values: dict[str, dict[str, np.ndarray]]
    rates: dict[str, float]
    tried: dict[str, dict[float, float | None]]
    parameters: int
    seconds: float


Program = Callable[[Any, Array, Array], dict[str, Array]]


def train(
    task: Task, arms: Sequence[Arm], training: Training, seeds: int, options: Mapping[str, Any] | None = None
) -> list[Found]:
    """Every arm on every case: the best rate by seeds of its own, then the seeds that are reported.

    Arms are trained side by side in threads: models as small as these leave most processors idle.

    Args:
      task: what is asked.
      arms: the models.
      training: how each is trained.
      seeds: how many of each are reported.
      options: for the compiler.

    Returns:
      What each arm reached, in their order.

    Raises:
      ConfigError: an arm diverges with every rate, or a seed of it with the best of them.
    """
    shapes = {arm.model(task, case) for arm in arms for case in task.cases}
    programs = {shape: make_program(task, shape, training, options) for shape in shapes}
    with work.piece("arms", len(arms), "arms") as piece, ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS)) as pool:
        waiting = [pool.submit(_trained, task, arm, programs, training, seeds) for arm in arms]
        for done in as_completed(waiting):
            if done.exception() is not None:
                pool.shutdown(cancel_futures=True)
                break
            piece.advance()
    return [one.result() for one in waiting if not one.cancelled()]


def _trained(task: Task, arm: Arm, programs: Mapping[model.Config, Program], training: Training, seeds: int) -> Found:
    """An arm on every case."""
    began = time.perf_counter()
    values, rates, tried = {}, {}, {}
    for case in task.cases:
        program = programs[arm.model(task, case)]
        tried[case.name] = _tuned(task, program, case, training, seeds)
        rates[case.name] = _best(arm, case, task, tried[case.name], training)
        numbers = training.seed + np.arange(seeds)
        values[case.name] = _run(program, case, numbers, np.full(seeds, rates[case.name]))
        _all_finite(arm, case, task, values[case.name], rates[case.name])
    return Found(arm, values, rates, tried, _parameters(arm.model(task, task.cases[0])), time.perf_counter() - began)


def make_program(
    task: Task, shape: model.Config, training: Training, options: Mapping[str, Any] | None = None
) -> Program:
    """The function (data of a case, PRNG keys [M], rates [M]) → {measure: [M]} that trains M models and measures them.

    One program for all of them: a scan over the steps, of a step that is vmapped over the models; all see the same
    batches.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam(b2=0.98))
    height = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(int(WARMUP * training.steps), 1), training.steps + 1)

    def loss(params: model.Params, batch: Any) -> Array:
        return task.loss(model.apply(params, batch.features, shape), batch)

    def update(params: model.Params, state: Any, rate: Array, batch: Any) -> tuple[model.Params, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
        return jax.tree.map(lambda one, change: one - rate * change, params, updates), state

    def measure(params: model.Params, batch: Any) -> dict[str, Array]:
        outputs = model.apply(params, batch.features, shape)
        return task.measure(outputs, model.first_weights(params, batch.features, shape), batch)

    @partial(jax.jit, compiler_options=dict(options or {}))
    def run(data: Any, keys: Array, rates: Array) -> dict[str, Array]:
        stream = jax.random.key(training.seed)
        held_out = task.sample(data, jax.random.fold_in(stream, training.steps), task.test)
        size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(held_out.features), axis=-1)))
        params = jax.vmap(lambda key: model.init_params(key, shape, size))(keys)

        def step(carry: Any, number: Array) -> tuple[Any, None]:
            batch = task.sample(data, jax.random.fold_in(stream, number), task.batch)
            params, state = carry
            return jax.vmap(update, in_axes=(0, 0, 0, None))(params, state, rates * height(number + 1), batch), None

        carry, _ = jax.lax.scan(step, (params, jax.vmap(optimizer.init)(params)), jnp.arange(training.steps))
        return jax.lax.map(lambda one: measure(one, held_out), carry[0])

    return run


def _run(program: Program, case: Case, seeds: np.ndarray, rates: np.ndarray) -> dict[str, np.ndarray]:
    """What models of these seeds and rates reach."""
    keys = jax.vmap(jax.random.key)(seeds)
    return {name: np.asarray(one) for name, one in program(case.data, keys, jnp.asarray(rates, jnp.float32)).items()}


def _tuned(task: Task, program: Program, case: Case, training: Training, seeds: int) -> dict[float, float | None]:
    """Rate → mean of what rates are chosen by, over the seeds that come after those that are reported."""
    if len(training.rates) == 1:
        return {}
    count = training.tuning_seeds
    numbers = training.seed + seeds + np.tile(np.arange(count), len(training.rates))  # the same for every rate
    reached = _run(program, case, numbers, np.repeat(training.rates, count))[task.chosen_by]
    means = reached.reshape(len(training.rates), count).mean(axis=1)
    return {
        rate: float(mean) if math.isfinite(mean) else None for rate, mean in zip(training.rates, means, strict=True)
    }


def _best(arm: Arm, case: Case, task: Task, tried: dict[float, float | None], training: Training) -> float:
    if not tried:
        return training.rates[0]
    finite = {rate: value for rate, value in tried.items() if value is not None}
    if not finite:
        raise ConfigError(f"arm {arm.name!r}, {case.name}: training must stay finite with one of the rates, got none "
                          f"of {', '.join(f'{rate:g}' for rate in tried)}; give lower ones.")  # fmt: skip
    return min(finite, key=lambda rate: finite[rate] * (1 if task.better == "lower" else -1))


def _all_finite(arm: Arm, case: Case, task: Task, values: dict[str, np.ndarray], rate: float) -> None:
    bad = np.flatnonzero(~np.isfinite(values[task.chosen_by]))
    if bad.size:
        raise ConfigError(f"arm {arm.name!r}, {case.name}: {task.chosen_by} must be finite for every seed, got "
                          f"{values[task.chosen_by][bad[0]]} for seed {bad[0]} with the rate {rate:g}; give lower "
                          "training.rates.")  # fmt: skip


def _parameters(shape: model.Config) -> int:
    return model.count(jax.eval_shape(lambda: model.init_params(jax.random.key(0), shape)))
