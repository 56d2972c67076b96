"""Train a language model and judge it: validation loss, and a sample of what it writes.

The model is the Flax module `mhajax.linen.LanguageModel`; it is trained by `mhajax.training`, which does not know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import host, quick, work
from experiments.config import LanguageModelling, Sampling
from experiments.data import batches, corpora, vocabulary
from experiments.data.vocabulary import Vocabulary
from experiments.errors import ConfigError
from experiments.folder import VOCABULARY
from experiments.heads import of_text
from experiments.task import Task, seeds_of
from experiments.translation import mean_and_spread
from mhajax import cache, decoding, language_model, linen, losses


def prepare(config: LanguageModelling, folder: Path) -> Task:
    """Read the text, make the vocabulary (or take the run's own), and put the experiment together."""
    corpus = corpora.text(config.data)
    if config.quick:
        corpus = quick.little_text(corpus)
    words = _vocabulary(config, corpus, folder)
    if words.encode(config.sampling.prompt) == []:
        raise ConfigError(f"sampling.prompt {config.sampling.prompt!r} has no token in this vocabulary; give another.")
    model = build_model(config, words)
    _check_room(model.config, config.sampling)
    train, validation = (np.asarray(words.encode(part), np.int32) for part in (corpus.train, corpus.validation))
    stream = batches.TextBatches(
        train, batch_size=config.batches.size, length=config.batches.length, seed=config.training.seed
    )
    validation_loss = _validation_loss(config, model, validation)

    def evaluate(params: Any) -> dict[str, list[float]]:
        measured = [validation_loss(one) for one in seeds_of(params)]
        return {"validation_loss": measured, "score": [-loss for loss in measured]}

    def report(params: Any, folder: Path, console: Console) -> dict[str, Any]:
        measured = mean_and_spread({"validation_loss": evaluate(params)["validation_loss"]})
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(measured["validation_loss"]))  # infinite where math.exp raises
        spread = f" ± {measured['validation_loss_sd']:.4f}" if "validation_loss_sd" in measured else ""
        console.print(
            f"validation loss [bold]{measured['validation_loss']:.4f}{spread}[/bold] nats per {words.unit} "
            f"(perplexity {perplexity:.3f}) on {len(validation) - 1:,} held-out {words.unit}s\n",
            highlight=False,
        )
        text = write_sample(model, words, seeds_of(params)[0], config.sampling, config.training.seed)
        (folder / "sample.txt").write_text(text, encoding="utf-8")
        console.print(text, markup=False, highlight=False, style="dim")
        console.print()
        return {**measured, "sample": text}

    return Task(
        init_params=initialiser(model),
        loss=partial(_loss, model, config.training.label_smoothing),
        batches=lambda seen: stream.iterate(stream.position(seen)),
        tokens=lambda batch: batch.shape[0] * (batch.shape[1] - 1),
        evaluate=evaluate,
        examine=partial(of_text.of_language_model, config, corpus, words),
        functional=partial(linen.functional, model),
        report=report,
        epoch=None,
        hashes=corpus.hashes,
        unit=words.unit,
        notes=(
            f"{len(train):,} {words.unit}s to train on, {len(validation):,} to validate on, {words.size:,} entries in "
            f"the vocabulary; {config.batches.size * config.batches.length:,} tokens a batch",
        ),
        examples=stream.examples,
    )


def build_model(config: LanguageModelling, words: Vocabulary) -> linen.LanguageModel:
    """The Flax module, with the vocabulary's size filled in."""
    return linen.LanguageModel(replace(config.model, vocab_size=words.size))


def initialiser(model: linen.LanguageModel) -> Callable[[jax.Array], Any]:
    """A function PRNG key → parameters of the module."""
    return lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def write_sample(model: linen.LanguageModel, words: Vocabulary, params: Any, sampling: Sampling, seed: int) -> str:
    """The prompt and what the model goes on to write, token by token on its cache."""
    prompt = jnp.asarray([words.encode(sampling.prompt)], jnp.int32)
    config = model.config
    _check_room(config, sampling)
    choose: decoding.Choose = decoding.greedy
    if sampling.temperature > 0:
        choose = decoding.sampler(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)

    @jax.jit
    def write(params: Any) -> jax.Array:
        params = language_model.unstack(linen.functional(model, params))
        state = language_model.init_cache((1,), prompt.shape[1] + sampling.tokens, config)
        if prompt.shape[1] > 1:
            _, state = language_model.extend(params, prompt[:, :-1], state, config)

        def step(tokens, state):
            logits, state = language_model.extend(params, tokens[:, None], state, config)
            # Padding and the other tokens that no text contains are never written.
            return logits[:, 0].at[:, : len(vocabulary.SPECIAL_TOKENS)].set(-jnp.inf), state

        key = jax.random.key(seed)
        return decoding.generate(step, state, prompt[:, -1], choose, key, length=sampling.tokens)

    with work.piece("writing", sampling.tokens, f"{words.unit}s"):
        return sampling.prompt + words.decode(np.asarray(write(params))[0])


def _check_room(config: language_model.Config, sampling: Sampling) -> None:
    layer = jax.eval_shape(lambda: cache.init((1,), sampling.tokens, config))
    host.check_room("[sampling] keys and values of all tokens", layer, config.num_layers, "sampling.tokens")


def _vocabulary(config: LanguageModelling, corpus: corpora.TextCorpus, folder: Path) -> Vocabulary:
    """The run's own vocabulary; made from the training text the first time."""
    return vocabulary.load_or_train(folder / VOCABULARY, [corpus.train], config.vocabulary)


def _table(params: Any) -> jax.Array:
    """What features are compared with for the logits, as `language_model.Params.table`."""
    return params.get("output", params["embedding"]["tokens"])


def _loss(model: linen.LanguageModel, label_smoothing: float, params, tokens, key):
    features: Any = model.apply(
        {"params": params}, tokens[:, :-1], deterministic=False, rngs={"dropout": key}, method="features"
    )
    sums = losses.linear_cross_entropy(
        features, _table(params), tokens[:, 1:], label_smoothing=label_smoothing, chunk=1024
    )
    return sums.loss / sums.weight, {"accuracy": sums.correct / sums.weight, "weight": sums.weight}


def _validation_loss(config: LanguageModelling, model: linen.LanguageModel, tokens: np.ndarray):
    """A function params → mean cross-entropy of every token of the held-out text but its first."""

    @jax.jit
    def sums(params, batch):
        features: Any = model.apply({"params": params}, batch.tokens[:, :-1], method="features")
        real = jnp.arange(features.shape[1]) < batch.lengths[:, None]
        return losses.linear_cross_entropy(features, _table(params), batch.tokens[:, 1:], real, chunk=1024)

    def mean(params: Any) -> float:
        size, length = config.batches.size, config.batches.length
        parts, count = [], -(-(len(tokens) - 1) // (size * length))
        windows = batches.windows(tokens, batch_size=size, length=length)
        for batch in work.each(windows, "validation loss", count, "batches"):
            parts.append(jax.device_get(sums(params, batch)))
        return sum(float(part.cross_entropy) for part in parts) / sum(float(part.weight) for part in parts)

    return mean
