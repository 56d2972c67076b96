"""A finished run in Python: its best parameters, its model, its vocabulary; the data are not read again.

import experiments

params, config, vocabulary, apply = experiments.load("runs/shakespeare-1a2b3c4d")
tokens = jnp.asarray([vocabulary.encode("To be")])
logits = apply(params, tokens, config)  # [1, T, V]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.data import vocabulary
from experiments.data.vocabulary import Vocabulary
from experiments.errors import ConfigError, DataError, UserError
from experiments.folder import CHECKPOINTS, VOCABULARY
from experiments.tables import Training
from experiments.task import build_model, initialiser, seeds_of
from mhajax import linen, training
from mhajax.checkpoints import Checkpoints, Damaged


class Run(NamedTuple):
    """What a run has learnt.

    Attributes:
      params: of one seed, such as `translator.Params`.
      config: of the model, such as `translator.Config`, its vocabulary's size filled in; static under jit.
      vocabulary: text to ids and back: `encode`, `decode`, `pieces`.
      apply: the model's function, such as `translator.apply(params, source, target, config)` or
        `language_model.apply(params, tokens, config)`.
    """

    params: Any
    config: Any
    vocabulary: Vocabulary
    apply: Callable[..., jax.Array]


def load(config: Training, folder: Path, seed: int = 0) -> Run:
    """The best parameters of one seed of a run, and what they need.

    Args:
      config: of the run.
      folder: of the run.
      seed: which of its seeds, counted from 0.

    Raises:
      UserError: nothing is trained in this folder yet, or there is no such seed.
    """
    if not 0 <= seed < config.training.seeds:
        raise UserError(f"{folder}: seed must be below training.seeds={config.training.seeds}, got {seed}.")
    model, words, params = parameters(config, folder)
    return Run(linen.functional(model, seeds_of(params)[seed]), model.config, words, model.functions.apply)


def parameters(config: Training, folder: Path) -> tuple[Any, Vocabulary, Any]:
    """The Flax module, the vocabulary and the best parameters [seeds, …] of a run.

    Raises:
      UserError: nothing is trained in this folder yet.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    if asked(checkpoints.latest_step) is None or not (folder / VOCABULARY).is_file():
        raise UserError(f"{folder}: nothing is trained here yet; python -m experiments {folder} trains it.")
    words = vocabulary.load(folder / VOCABULARY)
    model = build_model(config, words)
    like = jax.eval_shape(
        lambda: training.init(initialiser(model), training.optimizer(config.training), config.training)
    )
    return model, words, chosen(checkpoints, asked(checkpoints.restore, like))[0]


def chosen(checkpoints: Checkpoints, state: training.State) -> tuple[Any, int]:
    """The best parameters, or the last where no evaluation found any, and their step."""
    best = asked(checkpoints.best_score)
    if best is None:
        return state.evaluated, int(state.step)
    return asked(checkpoints.best, state.evaluated), int(best["step"])


def asked(question: Callable[..., Any], *arguments: Any) -> Any:
    """What checkpoints answer; their refusals as mistakes told without a traceback."""
    try:
        return question(*arguments)
    except Damaged as error:
        raise DataError(str(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
