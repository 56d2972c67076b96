"""Train an encoder to tell hidden tokens from what is around them, and judge it: loss and accuracy on held-out text.

The model is the Flax module `mhajax.linen.Model` of an `encoder.Config`; it is trained by `mhajax.training`, which does
not know it.

References:
  Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", section 3.1:
  of the tokens that are to be told, 80 % are hidden, 10 % are another token, 10 % stay. Liu et al. 2019, "RoBERTa",
  section 4: other ones every time, and windows that go on over the ends of sentences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

from experiments import quick, tables, work
from experiments.data import batches, corpora, vocabulary
from experiments.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from experiments.errors import ConfigError, DataError
from experiments.folder import VOCABULARY
from experiments.heads import held_out
from experiments.task import Task, build_model, initialiser, mean_and_spread, seeds_of, show_sample
from mhajax import encoder, linen, losses, training
from mhajax.report import text as texts
from mhajax.report.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The table [masking] of an encoder.

    Attributes:
      rate: share of the tokens that are to be told.
      hidden: share of those that the model sees as the token "<mask>".
      replaced: share of those that it sees as some other token; the rest it sees as they are.
    """

    rate: float = 0.15
    hidden: float = 0.8
    replaced: float = 0.1

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be between 0 and 1, got {self.rate}.")
        if not (0 <= self.hidden and 0 <= self.replaced and self.hidden + self.replaced <= 1):
            raise ValueError(
                f"hidden and replaced must be shares of a whole, got hidden={self.hidden} and replaced={self.replaced}."
            )


@dataclass(frozen=True, kw_only=True)
class Config(tables.Training):
    """`kind = "masked_language_model"`: train an encoder on hidden tokens, report how well it tells them.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: of the text only the beginning is used, and everything says so. Left out: all of it.
      data: the text; a table of one of these kinds. Of the grammar, the sentences that a translator would read.
      vocabulary: how text becomes numbers; the token that hides others comes on top of its size.
      batches: how much text is taken at a time.
      masking: which tokens are to be told.
      model: the shape of the encoder, with a head.
      training: how it is trained.
      heads: the report about its heads.
    """

    kind: Literal["masked_language_model"] = "masked_language_model"
    quick: bool | None = None
    data: corpora.Grammar | corpora.Shakespeare | corpora.TextFile = corpora.Grammar()
    vocabulary: vocabulary.Config = vocabulary.Config()
    batches: tables.Windows = tables.Windows()
    masking: Masking = Masking()
    model: encoder.Config
    training: training.Config = training.Config()
    heads: tables.Heads = tables.Heads(sentences=32)

    def __post_init__(self):
        if not self.model.head:
            raise ValueError("model.head must be true to tell hidden tokens, got false.")
        if self.model.pooled:
            raise ValueError("model.pooled must be false: nothing here trains the vector of a whole text, got true.")


def shrink(config: Config) -> Config:
    """The same encoder, small, for --quick."""
    return replace(
        config, **quick.shared(config), model=quick.narrow(config.model, num_layers=1, unroll=1),
        data=quick.fewer_generated(config.data), batches=quick.least(config.batches, size=4, length=quick.LONGEST),
    )  # fmt: skip


def prepare(config: Config, folder: Path) -> Task:
    """Read the text, make the vocabulary (or take the run's own), and put the experiment together."""
    corpus = corpora.text(config.data)
    if config.quick:
        corpus = quick.little_text(corpus)
    words = vocabulary.load_or_train(folder / VOCABULARY, [corpus.train], config.vocabulary, mask=True)
    if words.mask is None:
        raise DataError(f"{folder / VOCABULARY}: this vocabulary has no token that hides others; start a new run.")
    longest = config.model.max_positions
    if longest is not None and config.batches.length > longest:
        raise ConfigError(f"batches.length must be at most model.max_positions={longest}, got {config.batches.length}.")
    model = build_model(config, words)
    train, validation = (np.asarray(words.encode(part), np.int32) for part in (corpus.train, corpus.validation))
    if config.heads.report:
        held_out.check_room(len(validation), config.batches.length)
    stream = batches.TextBatches(
        train, batch_size=config.batches.size, length=config.batches.length, seed=config.training.seed
    )
    if not _hidden_in(len(validation), config.batches.length):
        raise DataError(f"the {len(validation):,} held-out {words.unit}s are too few: none of them is hidden, so "
                        "nothing says how well hidden ones are told; give more text.")  # fmt: skip
    judge = _judge(config, model, words.mask, validation)

    def evaluate(params: Any) -> dict[str, list[float]]:
        sums = [judge(one) for one in seeds_of(params)]
        measured = [float(one.cross_entropy / one.weight) for one in sums]
        right = [float(one.correct / one.weight) for one in sums]
        return {"validation_loss": measured, "validation_accuracy": right, "score": [-loss for loss in measured]}

    def report(params: Any, folder: Path, console: Console) -> dict[str, Any]:
        by_seed = evaluate(params)
        measured = mean_and_spread({name: by_seed[name] for name in ("validation_loss", "validation_accuracy")})
        spread = f" ± {measured['validation_loss_sd']:.4f}" if "validation_loss_sd" in measured else ""
        console.print(
            f"validation loss [bold]{measured['validation_loss']:.4f}{spread}[/bold] nats per hidden {words.unit}, "
            f"[bold]{measured['validation_accuracy']:.1%}[/bold] of them told, in {len(validation):,} held-out "
            f"{words.unit}s\n",
            highlight=False,
        )
        text = guesses(model, words, seeds_of(params)[0], validation[: 4 * config.batches.length])
        show_sample(text, folder, console)
        return {**measured, "sample": text}

    return Task(
        init_params=initialiser(model),
        loss=partial(_loss, config, model, words.mask),
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
            f"the vocabulary; {config.batches.size * config.batches.length:,} tokens a batch, "
            f"{config.masking.rate:.0%} of them to be told",
        ),
        examples=stream.examples,
    )


def disguise(key: Array, tokens: Array, masking: Masking, mask: int) -> tuple[Array, Array]:
    """What the model reads of a text, and which of its tokens it is to tell.

    Args:
      key: PRNG key.
      tokens: integers [..., T].
      masking: how many.
      mask: the token that hides others, which is the last of the vocabulary.

    Returns:
      Integers [..., T], and bool [..., T].
    """
    key_draw, key_other = jax.random.split(key)
    draw = jax.random.uniform(key_draw, tokens.shape) / masking.rate  # below 1: to be told
    other = jax.random.randint(key_other, tokens.shape, len(SPECIAL_TOKENS), mask, tokens.dtype)
    read = jnp.where(draw < masking.hidden, mask, jnp.where(draw < masking.hidden + masking.replaced, other, tokens))
    told = draw < 1
    return jnp.where(told, read, tokens), told


def guesses(model: linen.Model, words: Vocabulary, params: Any, tokens: np.ndarray) -> str:
    """A text in which hidden tokens are told: [guess] where it is right, [guess ≠ token] where it is not.

    Args:
      model: the encoder.
      words: its vocabulary.
      params: of one seed.
      tokens: of the text, [T].
    """
    assert words.mask is not None
    tokens = tokens[: model.config.max_positions]
    hidden = texts.hidden_positions(0, len(tokens))
    logits = model.apply({"params": params}, jnp.where(hidden, words.mask, tokens)[None])
    guess = np.asarray(jnp.argmax(logits, -1))[0]  # pyright: ignore[reportArgumentType, reportCallIssue]
    pieces, others = words.pieces(tokens), words.pieces(guess)
    shown = [
        piece if not gone else f"[{piece}]" if piece == other else f"[{other} ≠ {piece}]"
        for piece, other, gone in zip(pieces, others, hidden, strict=True)
    ]
    return (" " if words.kind == "words" else "").join(shown).replace(vocabulary.WORD_START, " ").replace("\\n", "\n")


def _subject(config: Config, corpus: corpora.TextCorpus, words: Vocabulary, windows: int) -> Subject:
    """The model and the first windows of its validation text, for the report about its heads."""
    text = held_out.windows(corpus.validation, words, config.batches, windows)
    return texts.make_subject(encoder, replace(config.model, vocab_size=words.size), text, hidden=words.mask)


def _token_sums(
    config: Config, model: linen.Model, params: Any, features: Array, tokens: Array, told: Array
) -> losses.Sums:
    """Loss of the tokens that are to be told. The bias of the logits is one more channel, of features that are 1."""
    functional = linen.functional(model, params)
    x = encoder.head_features(functional, features, model.config)
    x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    table = jnp.concatenate([functional.embedding.tokens, functional.head.output_bias[:, None]], -1)
    return losses.linear_cross_entropy(
        x, table, tokens, told.astype(jnp.float32), label_smoothing=config.training.label_smoothing, chunk=1024
    )


def _loss(config: Config, model: linen.Model, mask: int, params: Any, batch: Array, key: Array):
    key_mask, key_dropout = jax.random.split(key)
    tokens = batch[:, :-1]
    read, told = disguise(key_mask, tokens, config.masking, mask)
    features: Any = model.apply(
        {"params": params}, read, deterministic=False, rngs={"dropout": key_dropout}, method="features"
    )
    sums = _token_sums(config, model, params, features, tokens, told)
    weight = jnp.maximum(sums.weight, 1)  # a small batch may have none to be told
    return sums.loss / weight, {"accuracy": sums.correct / weight, "weight": sums.weight}


def _hidden_in(tokens: int, length: int) -> int:
    """How many tokens of a held-out text are hidden, in windows."""
    starts = range(0, max(tokens - 1, 0), length)
    return sum(
        int(texts.hidden_positions(number, length)[: tokens - 1 - start].sum()) for number, start in enumerate(starts)
    )


def _judge(config: Config, model: linen.Model, mask: int, text: np.ndarray):
    """A function params → sums over the tokens of the held-out text that are always hidden."""

    @jax.jit
    def sums(params, tokens, lengths, told):
        there = jnp.arange(tokens.shape[1]) < lengths[:, None]
        features: Any = model.apply(
            {"params": params}, jnp.where(told, mask, tokens), mask=there[:, None, None, :], method="features"
        )
        return _token_sums(config, model, params, features, tokens, told & there)

    def judge(params: Any) -> losses.Sums:
        size, length = config.batches.size, config.batches.length
        parts, count = [], -(-(len(text) - 1) // (size * length))
        windows = batches.windows(text, batch_size=size, length=length)
        for number, batch in enumerate(work.each(windows, "validation loss", count, "batches")):
            told = np.stack([texts.hidden_positions(number * size + row, length) for row in range(size)])
            parts.append(jax.device_get(sums(params, batch.tokens[:, :-1], batch.lengths, told)))
        return jax.tree.map(lambda *some: np.sum(some, dtype=np.float64), *parts)

    return judge
