"""Train a language model and judge it: validation loss, and a sample of what it writes.

The model is the Flax module `mhajax.linen.Model` of a `language_model.Config`; it is trained by
`mhajax.training`, which does not know it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import host, quick, tables, work
from experiments.data import batches, corpora, vocabulary
from experiments.data.vocabulary import Vocabulary
from experiments.errors import ConfigError
from experiments.folder import VOCABULARY
from experiments.heads import held_out
from experiments.task import Task, build_model, initialiser, mean_and_spread, seeds_of, show_sample
from mhajax import cache, decoding, language_model, linen, losses, training
from mhajax.report import text as texts
from mhajax.report.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The table [sampling] of a language model: the text that is printed at the end.

    Attributes:
      prompt: what it goes on from.
      tokens: how much of it.
      temperature: below 1 safer, above 1 wilder; 0 is greedy: always the likeliest token.
      top_k: only so many of the likeliest tokens may come; left out: all.
      top_p: only the likeliest tokens that together have this probability may come; 1: all.
    """

    prompt: str = "\n"
    tokens: int = 300
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not self.prompt:
            raise ValueError('prompt must not be empty; a line break is written "\\n".')
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}.")
        if self.tokens > 1_000_000:
            raise ValueError(f"tokens must be at most 1,000,000, got {self.tokens:,}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0 (0 is greedy), got {self.temperature}.")
        if self.temperature and not decoding.COLDEST <= self.temperature <= decoding.HOTTEST:
            raise ValueError(
                f"temperature must be 0 (greedy) or in [{decoding.COLDEST}, {decoding.HOTTEST}], "
                f"got {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")


@dataclass(frozen=True, kw_only=True)
class Config(tables.Training):
    """`kind = "language_model"`: train a language model, report its validation loss, print a sample.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: of the text only the beginning is used, and everything says so. Left out: all of it.
      data: the text; a table of one of these kinds.
      vocabulary: how text becomes numbers.
      batches: how much text is taken at a time.
      model: the shape of the language model.
      training: how it is trained.
      sampling: the text that it writes at the end.
      heads: the report about its heads.
    """

    kind: Literal["language_model"] = "language_model"
    quick: bool | None = None
    data: corpora.Shakespeare | corpora.TextFile | corpora.Grammar
    vocabulary: vocabulary.Config = field(default_factory=lambda: vocabulary.Config(kind="characters"))
    batches: tables.Windows = tables.Windows()
    model: language_model.Config
    training: training.Config = training.Config()
    sampling: Sampling = Sampling()
    heads: tables.Heads = tables.Heads(sentences=32)


def shrink(config: Config) -> Config:
    """The same language model, small, for --quick."""
    return replace(
        config, **quick.shared(config), model=quick.narrow(config.model, num_layers=1, unroll=1),
        data=quick.fewer_generated(config.data), batches=quick.least(config.batches, size=4, length=quick.LONGEST),
        sampling=quick.least(config.sampling, tokens=80),
    )  # fmt: skip


def prepare(config: Config, folder: Path) -> Task:
    """Read the text, make the vocabulary (or take the run's own), and put the experiment together."""
    corpus = corpora.text(config.data)
    if config.quick:
        corpus = quick.little_text(corpus)
    words = vocabulary.load_or_train(folder / VOCABULARY, [corpus.train], config.vocabulary)
    if words.encode(config.sampling.prompt) == []:
        raise ConfigError(f"sampling.prompt {config.sampling.prompt!r} has no token in this vocabulary; give another.")
    model = build_model(config, words)
    _check_room(model.config, config.sampling)
    train, validation = (np.asarray(words.encode(part), np.int32) for part in (corpus.train, corpus.validation))
    if config.heads.report:
        held_out.check_room(len(validation), config.batches.length)
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
        show_sample(text, folder, console)
        return {**measured, "sample": text}

    return Task(
        init_params=initialiser(model),
        loss=partial(_loss, model, config.training.label_smoothing),
        batches=lambda seen: stream.iterate(stream.position(seen)),
        tokens=lambda batch: batch.shape[0] * (batch.shape[1] - 1),
        evaluate=evaluate,
        examine=partial(_subject, config, corpus, words),
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


def write_sample(model: linen.Model, words: Vocabulary, params: Any, sampling: Sampling, seed: int) -> str:
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


def _subject(config: Config, corpus: corpora.TextCorpus, words: Vocabulary, windows: int) -> Subject:
    """The model and the first windows of its validation text, for the report about its heads."""
    text = held_out.windows(corpus.validation, words, config.batches, windows)
    return texts.make_subject(language_model, replace(config.model, vocab_size=words.size), text)


def _table(params: Any) -> jax.Array:
    """What features are compared with for the logits, as `language_model.Params.table`."""
    return params.get("output", params["embedding"]["tokens"])


def _loss(model: linen.Model, label_smoothing: float, params, tokens, key):
    features: Any = model.apply(
        {"params": params}, tokens[:, :-1], deterministic=False, rngs={"dropout": key}, method="features"
    )
    sums = losses.linear_cross_entropy(
        features, _table(params), tokens[:, 1:], label_smoothing=label_smoothing, chunk=1024
    )
    return sums.loss / sums.weight, {"accuracy": sums.correct / sums.weight, "weight": sums.weight}


def _validation_loss(config: Config, model: linen.Model, tokens: np.ndarray):
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
