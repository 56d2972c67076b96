"""A quick look at any config: whether it runs from end to end, in about half a minute. Its numbers mean nothing.

`python -m experiments CONFIG --quick` makes everything small that costs time: the first sentences of the data, a model
of one narrow layer, a few batches in one shape; figures are not drawn and heads not measured. The config says so
(`quick = true`), and with it the folder of the run (`quick-…`) and its result, so that none takes it for a real one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from experiments import tables
from experiments.data import corpora

PAIRS, HELD_OUT = 400, 20  # sentence pairs to train on, and of every other part
CHARACTERS = 20_000  # of a text; a tenth of it to validate on
STEPS, HEADS, LONGEST = 20, 2, 64
C = TypeVar("C")


def shared(config: tables.Training) -> dict[str, Any]:
    """The tables that every training has, small: what `dataclasses.replace` takes."""
    train = config.training
    training = dataclasses.replace(
        train, steps=min(train.steps, STEPS), warmup_steps=min(train.warmup_steps, STEPS // 4, train.steps - 1),
        seeds=1, accumulate=1, evaluate_every=STEPS, checkpoint_every=STEPS, log_every=min(train.log_every, 5),
    )  # fmt: skip
    heads = dataclasses.replace(config.heads, report=False)
    return {"training": training, "heads": heads, "vocabulary": least(config.vocabulary, size=600)}


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


def least(config: C, **limits: int) -> C:
    """The config with numbers that are at most these."""
    smaller = {name: min(getattr(config, name), limit) for name, limit in limits.items()}
    return dataclasses.replace(config, **smaller)  # pyright: ignore[reportArgumentType, reportCallIssue]


def narrow(model: C, **layers: int) -> C:
    """A model of few layers and 32 channels; a feature of the model stays what it is, and its heads if they fit."""
    width = 16 * HEADS
    heads = model.num_heads if width % (2 * model.num_heads) == 0 else HEADS  # pyright: ignore[reportAttributeAccessIssue]
    changes = {"num_heads": heads, "num_kv_heads": None, "d_model": width, "head_dim": None, "d_ff": 64, **layers}
    fields = {field.name for field in dataclasses.fields(model)}  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(model, **{name: value for name, value in changes.items() if name in fields})  # pyright: ignore


def fewer_generated(data: Any) -> Any:
    """The config of data, with fewer sentences where they are generated."""
    if not isinstance(data, corpora.Grammar):
        return data
    return least(data, train=PAIRS, validation=HELD_OUT, test=HELD_OUT, generalisation=HELD_OUT)
