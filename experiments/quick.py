"""A quick look at any config: whether it runs from end to end, in about half a minute. Its numbers mean nothing.

`python -m experiments CONFIG --quick` makes everything small that costs time: the first sentences of the data, a model
of one narrow layer, a few batches in one shape; figures are not drawn and heads not measured. The config says so
(`quick = true`), and with it the folder of the run (`quick-…`) and its result, so that none takes it for a real one.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from experiments.config import Experiment, Training, Translation
from experiments.data import corpora
from experiments.studies import STUDIES

PAIRS, HELD_OUT = 400, 20  # sentence pairs to train on, and of every other part
CHARACTERS = 20_000  # of a text; a tenth of it to validate on
STEPS, HEADS, LONGEST = 20, 2, 64
C = TypeVar("C")


def shrink(config: Experiment) -> Experiment:
    """The same experiment, small; values that are smaller already stay."""
    if not isinstance(config, Training):
        return dataclasses.replace(STUDIES[config.kind].shrink(config), quick=True)
    train = config.training
    training = dataclasses.replace(
        train, steps=min(train.steps, STEPS), warmup_steps=min(train.warmup_steps, STEPS // 4, train.steps - 1),
        seeds=1, accumulate=1, evaluate_every=STEPS, checkpoint_every=STEPS, log_every=min(train.log_every, 5),
    )  # fmt: skip
    heads = dataclasses.replace(config.heads, report=False)
    words = dataclasses.replace(config.vocabulary, size=min(config.vocabulary.size, 600))
    shared = {"quick": True, "training": training, "heads": heads, "vocabulary": words}
    if isinstance(config, Translation):
        return dataclasses.replace(
            config, **shared, model=_narrow(config.model, encoder_layers=1, decoder_layers=1, unroll=1),
            data=_fewer_generated(config.data),
            batches=dataclasses.replace(config.batches, boundaries=(LONGEST,), tokens=8 * LONGEST),
            decoding=_least(config.decoding, beams=1, batch=HELD_OUT, validation_sentences=HELD_OUT),
        )  # fmt: skip
    return dataclasses.replace(
        config, **shared, model=_narrow(config.model, num_layers=1, unroll=1),
        batches=_least(config.batches, size=4, length=LONGEST), sampling=_least(config.sampling, tokens=80),
    )  # fmt: skip


def few_pairs(corpus: corpora.ParallelCorpus) -> corpora.ParallelCorpus:
    """The first sentences of every part."""
    return corpus._replace(
        train=corpus.train[:PAIRS],
        validation=corpus.validation[:HELD_OUT],
        tests={name: pairs[:HELD_OUT] for name, pairs in corpus.tests.items()},
        gold={name: pairs[:HELD_OUT] for name, pairs in corpus.gold.items()},
    )


def little_text(corpus: corpora.TextCorpus) -> corpora.TextCorpus:
    """The first characters of both parts."""
    return corpus._replace(train=corpus.train[:CHARACTERS], validation=corpus.validation[: CHARACTERS // 10])


def _least(config: C, **limits: int) -> C:
    """The config with numbers that are at most these."""
    smaller = {name: min(getattr(config, name), limit) for name, limit in limits.items()}
    return dataclasses.replace(config, **smaller)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _narrow(model: C, **layers: int) -> C:
    """A model with few layers and two heads of 16; a feature of the model stays what it is."""
    changes = {"num_heads": HEADS, "num_kv_heads": None, "d_model": 16 * HEADS, "head_dim": None, "d_ff": 64, **layers}
    fields = {field.name for field in dataclasses.fields(model)}  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(model, **{name: value for name, value in changes.items() if name in fields})  # pyright: ignore


def _fewer_generated(data):
    if not isinstance(data, corpora.Grammar):
        return data
    return _least(data, train=PAIRS, validation=HELD_OUT, test=HELD_OUT, generalisation=HELD_OUT)
