"""Training with Optax: a state, a step, a loop. It knows no model, only functions that make and judge parameters.

    optimizer = training.optimizer(config)
    state = training.init(init_params, optimizer, config)
    step = training.make_step(loss, optimizer, config)
    state = training.fit(state, step, batches, config, evaluate=…, checkpoints=…)

Everything has a leading axis of seeds: `seeds = n` trains n models in one program. A run is a function of its config
alone: the batches and the dropout of a step are computed from the seed and the step's number, so a run that was killed
and goes on from its checkpoint ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mhajax import arguments, weight_decay
from mhajax.accumulation import accumulate, accumulates, is_last
from mhajax.checkpoints import Checkpoints

Params = Any
Batch = Any
Metrics = dict[str, Any]
Loss = Callable[[Params, Batch, Array], tuple[Array, dict[str, Array]]]


_DECAYING = ("adamw", "lion")
_NUMBERS = ("learning_rate", "weight_decay", "beta1", "beta2", "clip_norm", "label_smoothing", "average_decay")
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train.

    Attributes:
      seed: of everything random: parameters, order of the data, dropout.
      seeds: number of models trained in one program, with seeds seed, seed + 1, …; all see the same batches.
      steps: batches to train on.
      accumulate: batches whose gradients are averaged, by their weights (see `make_step`), before the parameters
        change: one update. The last update has the batches that are left, be they fewer.
      optimizer: "adamw", "adam", "sgd" (momentum beta1) or "lion".
      learning_rate: at its highest.
      schedule: how the learning rate falls after the warm-up: "cosine" or "linear" to zero at the last update,
        "inverse_sqrt" (Vaswani 2017, section 5.3), or "constant".
      warmup_steps: batches over which the learning rate rises, from above zero to its highest with the last of them.
      weight_decay: decoupled, of what `weight_decay.decayed` says. None: 0.01 for "adamw" and "lion", which have it.
      beta1, beta2: decay of the first and second moment.
      clip_norm: gradients with a larger global norm are scaled down to it. 0: none.
      label_smoothing: probability mass given to all words, for losses that use it.
      average_decay: evaluation uses an exponential average of the parameters with this decay per update. 0: none.
      log_every: batches between two reports of progress.
      evaluate_every: batches between two evaluations.
      checkpoint_every: batches between two checkpoints.
    """

    seed: int = 0
    seeds: int = 1
    steps: int = 1000
    accumulate: int = 1
    optimizer: Literal["adamw", "adam", "sgd", "lion"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = 100
    weight_decay: float | None = None
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    average_decay: float = 0.0
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self):
        arguments.integers(self, "seeds", "steps", "accumulate", "log_every", "evaluate_every", "checkpoint_every")
        arguments.integers(self, "seed", "warmup_steps", least=0)
        for name in ("optimizer", "schedule"):
            _check_choice(name, getattr(self, name), get_args(get_type_hints(Config)[name]))
        for name in _NUMBERS:
            _check_number(name, getattr(self, name), optional=name == "weight_decay")
        for name in ("weight_decay", "clip_norm"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("beta1", "beta2", "label_smoothing", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
            if np.float32(getattr(self, name)) == 1:
                raise ValueError(f"{name} must be in [0, 1) as a float32, got {getattr(self, name)}, which is 1 in it.")
        for name in ("steps", "accumulate"):
            if getattr(self, name) >= 2**31:
                raise ValueError(
                    f"{name} must be below 2,147,483,648 (it is counted in int32), got {getattr(self, name)}."
                )
        if self.seed + self.seeds > 2**31:
            raise ValueError(
                f"seed + seeds - 1 must be at most 2,147,483,647 (a seed is an int32), got seed={self.seed} and "
                f"seeds={self.seeds}."
            )
        if self.weight_decay and self.optimizer not in _DECAYING:
            raise ValueError(
                f"weight_decay must be 0 with optimizer={self.optimizer!r}, which decays nothing, got "
                f"{self.weight_decay}; leave it out, or take one of {', '.join(map(repr, _DECAYING))}."
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if (getattr(self, name) or 0) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST:.2g} (a float32), got {getattr(self, name)}.")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps, got warmup_steps={self.warmup_steps} and steps={self.steps}; "
                "the learning rate would never reach its value."
            )

    @property
    def updates(self) -> int:
        """How often the parameters change."""
        return -(-self.steps // self.accumulate)


def _check_choice(name: str, given: Any, known: tuple[str, ...]) -> None:
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {arguments.kind_of(given)}{advice}")


def _check_number(name: str, given: Any, *, optional: bool) -> None:
    if optional and given is None:
        return
    if isinstance(given, bool | np.bool_) or not isinstance(given, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {arguments.kind_of(given)}.")
    if not np.isfinite(given):
        raise ValueError(f"{name} must be finite, got {given}.")


class State(NamedTuple):
    """All that changes in training; every leaf but `step` has a leading axis of seeds."""

    step: Array  # [], int32, batches seen
    params: Params
    optimizer: optax.OptState
    average: Params | None

    @property
    def evaluated(self) -> Params:
        """The parameters to evaluate: the average if there is one."""
        return self.params if self.average is None else self.average


class NonFinite(ArithmeticError):
    """A loss, a gradient or a parameter became NaN or infinite; `batch` is the number of its batch, from 1."""

    def __init__(self, message: str, batch: int):
        super().__init__(message)
        self.batch = batch


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM); the state is saved."""


def schedule(config: Config) -> optax.Schedule:
    """Learning rate of an update, which are counted from 0: a linear rise, then the fall that the config names.

    The first of W updates of warm-up has 1/W of the rate, the last all of it; without a warm-up the very first has all.
    "cosine" and "linear" fall from there to zero at the last update, if it is a later one.
    """
    peak = max(config.warmup_steps // config.accumulate, 1)
    rest = max(config.updates - peak, 1)
    fall = {
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, rest),
        "inverse_sqrt": lambda: lambda after: config.learning_rate * (peak / (jnp.maximum(after, 0) + peak)) ** 0.5,
        "constant": lambda: optax.constant_schedule(config.learning_rate),
    }[config.schedule]()
    numbered = optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, peak), fall], [peak])
    return lambda count: numbered(count + 1)


def optimizer(
    config: Config, *, decayed: Callable[[Params], Any] = weight_decay.decayed
) -> optax.GradientTransformation:
    """The Optax transformation that the config describes; `accumulation.accumulate` around it if it says so.

    Args:
      config: how to train.
      decayed: parameters → which of them weight decay is for, a pytree of booleans.
    """
    rate = schedule(config)
    decay = 0.01 if config.weight_decay is None else config.weight_decay
    update = {
        "adamw": lambda: optax.adamw(rate, config.beta1, config.beta2, eps=1e-9, weight_decay=decay, mask=decayed),
        "adam": lambda: optax.adam(rate, config.beta1, config.beta2, eps=1e-9),
        "sgd": lambda: optax.sgd(rate, momentum=config.beta1),
        "lion": lambda: optax.lion(rate, config.beta1, config.beta2, weight_decay=decay, mask=decayed),
    }[config.optimizer]()
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    chain = optax.chain(clip, update)
    return chain if config.accumulate == 1 else accumulate(chain, config.accumulate, steps=config.steps)


def init(init_params: Callable[[Array], Params], optimizer: optax.GradientTransformation, config: Config) -> State:
    """The state before the first batch: for each seed, `init_params(key)` and a fresh optimiser."""
    keys = jnp.stack([jax.random.key(config.seed + i) for i in range(config.seeds)])

    @jax.jit
    def build(keys: Array) -> State:
        params = _over_seeds(init_params, config)(keys)
        opt_state = _over_seeds(optimizer.init, config)(params)
        average = jax.tree.map(jnp.copy, params) if config.average_decay else None
        return State(jnp.int32(0), params, opt_state, average)

    return build(keys)


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
    """The compiled step: one batch, every seed.

    Args:
      loss: (params, batch, key) → (loss, {name: number}) for one seed; the key is for dropout. The number "weight", if
        there is one, is how many tokens the loss is a mean of: accumulated batches count by it. It is not recorded.
      optimizer: from `optimizer`, or any Optax transformation (with config.accumulate, in `accumulation.accumulate`).
      config: how to train.

    Returns:
      A jitted function (state, batch) → (state, metrics [seeds]), which consumes its state (its buffers are donated).
      It compiles once for each shape of batch.

    Raises:
      ValueError: when called, if config.accumulate is above 1 and the optimizer does not accumulate.
    """
    seeds = jnp.arange(config.seeds)
    update = optax.with_extra_args_support(optimizer).update

    def one_seed(params, opt_state, average, seed, step, batch):
        key = jax.random.fold_in(jax.random.key(config.seed + seed), step)
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        weight = {"weight": metrics["weight"]} if config.accumulate > 1 and "weight" in metrics else {}
        updates, opt_state = update(gradient, opt_state, params, **weight)
        params = optax.apply_updates(params, updates)
        if average is not None:
            count = -(-(step + 1) // config.accumulate)
            # Early on the average follows the parameters, so that it does not remember their random start.
            decay = jnp.minimum(config.average_decay, (1 + count) / (10 + count))
            moved = is_last(step + 1, config.accumulate, config.steps)
            average = optax.incremental_update(params, average, jnp.where(moved, 1 - decay, 0.0))
        recorded = {name: number for name, number in metrics.items() if name != "weight"}
        metrics = {"loss": value, **recorded, "gradient_norm": optax.tree.norm(gradient)}
        return params, opt_state, average, metrics

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        if config.accumulate > 1 and not accumulates(state.optimizer):
            raise ValueError(
                f"training.make_step: config.accumulate={config.accumulate}, but this optimizer does not accumulate; "
                f"make it accumulation.accumulate(optimizer, {config.accumulate}, steps={config.steps})."
            )
        run = _over_seeds(partial(one_seed, step=state.step, batch=batch), config)
        params, opt_state, average, metrics = run(state.params, state.optimizer, state.average, seeds)
        return State(state.step + 1, params, opt_state, average), metrics

    return step


def fit(
    state: State,
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]],
    batches: Callable[[int], Iterable[Batch]],
    config: Config,
    *,
    evaluate: Callable[[Params], Metrics] | None = None,
    checkpoints: Checkpoints | None = None,
    record: Callable[[list[Metrics]], None] = lambda lines: None,
) -> State:
    """Train until `config.steps`, from wherever the state is.

    Args:
      state: from `init`, or from a checkpoint.
      step: from `make_step`.
      batches: number of batches seen → the batches that follow.
      config: how to train.
      evaluate: evaluated parameters [seeds, ...] → numbers; "score" among them, higher is better, keeps the best. The
        parameters are gone with the next step: copy what is to stay.
      checkpoints: where to save; None saves nothing.
      record: called every `log_every` batches with a dict for each batch since, and after each evaluation with one.

    Returns:
      The last state.

    Raises:
      NonFinite: a loss, gradient or parameter is not finite; the checkpoint before it is whole.
      Interrupted: after SIGINT or SIGTERM, once the state is saved.
    """
    done = int(state.step)
    pending: list[tuple[int, dict[str, Array]]] = []

    def report() -> None:
        lines = [{"step": number, **_numbers(metrics)} for number, metrics in pending]
        pending.clear()
        for line in lines:
            if not all(np.all(np.isfinite(line[name])) for name in ("loss", "gradient_norm")):
                numbers = json.dumps({name: line[name] for name in ("loss", "gradient_norm")})
                raise NonFinite(_non_finite_message(line["step"], numbers, checkpoints), line["step"])
        if lines:
            record(lines)

    def check() -> None:
        """The last update too, which no loss has seen, before its parameters are judged or kept."""
        report()
        if not all(map(_all_finite, jax.tree.leaves((state.params, state.average)))):
            raise NonFinite(_non_finite_message(done, "a parameter after its update", checkpoints), done)

    with _stop_signals() as stop:
        stream: Iterator[Batch] = iter(batches(done))
        while done < config.steps:
            state, metrics = step(state, next(stream))
            done += 1
            pending.append((done, metrics))
            last = done == config.steps
            if last or stop or done % config.log_every == 0:
                report()
            best = False
            if evaluate is not None and (last or done % config.evaluate_every == 0):
                check()
                result = evaluate(state.evaluated)
                record([{"step": done, **result}])
                best = checkpoints is not None and checkpoints.offer(state, float(np.mean(result.get("score", 0.0))))
            if checkpoints is not None and (last or stop or best or done % config.checkpoint_every == 0):
                check()
                checkpoints.save(state)
            if stop and not last:
                raise Interrupted(f"stopped by {stop[0]} after batch {done} of {config.steps}; the state is saved.")
    return state


def _over_seeds(function: Callable, config: Config) -> Callable:
    """The function for every seed along axis 0: one after the other on a CPU, side by side elsewhere.

    On a CPU the batched products of several small models are slower than those of one, and take longer to compile.
    """
    if config.seeds > 1:
        if jax.default_backend() != "cpu":
            return jax.vmap(function)
        return lambda *arguments: jax.lax.map(lambda one: function(*one), arguments)

    def single(*arguments):
        out = function(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], out)

    return single


def _numbers(metrics: dict[str, Array]) -> dict[str, Any]:
    """Arrays [seeds] as lists of Python floats."""
    return {name: np.asarray(value).astype(float).tolist() for name, value in jax.device_get(metrics).items()}


def _all_finite(array: Array) -> bool:
    """On the host, where a checkpoint brings it anyway: no program is compiled for it."""
    return all(np.all(np.isfinite(np.asarray(shard.data))) for shard in array.addressable_shards)


def _non_finite_message(batch: int, what: str, checkpoints: Checkpoints | None) -> str:
    saved = None if checkpoints is None else checkpoints.latest_step()
    kept = "nothing was saved before" if saved is None else f"the last good state, after batch {saved}, is kept"
    return (
        f"training stopped at batch {batch}: {what} is not finite; {kept}. "
        "Try a lower training.learning_rate, a longer training.warmup_steps, or training.clip_norm = 1.0."
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that is empty until SIGINT or SIGTERM comes; a second signal acts as it would have without this."""
    received: list[str] = []
    before: dict[int, Any] = {}

    def on_signal(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere nothing is caught
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, on_signal)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
