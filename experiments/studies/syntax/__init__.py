"""Does a head follow word order, or the relation between subject and verb?

A head answers for every word: the word that gets most of its attention. That answer is compared with gold dependency
trees, once as the word that this one depends on ("to the head"), once as a word that depends on this one ("to the
dependent"); and with the words at fixed distances.

The rules, stated before anything was run, for each model and language:

"a head follows the relation between subject and verb" (nsubj, in either direction). In both directions the head is
chosen on one half of the sentences and reported on the other, both ways round, and so are the best fixed offset and
the best of as many heads with random weights. Both differences have an interval of 97.5 %, as there are two directions.
    supported     in one direction both intervals are above 0
    refuted       in each direction an interval is below 0
    not resolved  else

"a head follows word order": of all heads and offsets but 0, the one whose words most often look that far away (Voita:
at least 90 %), chosen on one half and reported on the other.
    supported     the whole interval of 95 % is at 90 % or above, and that of the difference to heads with random
                  weights, chosen in the same way, above 0
    refuted       the whole interval is below 90 %, or that of the difference below 0
    not resolved  else

References:
  Clark et al. 2019, "What Does BERT Look At?", section 4.2. Voita et al. 2019, "Analyzing Multi-Head Self-Attention",
  sections 5.1 and 5.2.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Literal

from experiments import work
from experiments.data import dependencies, files
from experiments.data.dependencies import Language, Treebanks
from experiments.errors import DataError
from experiments.studies import models
from experiments.studies.study import Answer, Study, Train
from experiments.studies.syntax import counts, findings, report, words
from experiments.studies.syntax.report import Examined
from mhajax import language_model
from mhajax.pretrained import Pretrained

LANGUAGES: dict[Language, str] = {"en": "English", "de": "German"}
QUICK = 24  # sentences, of two models of random weights


@dataclass(frozen=True)
class Arm:
    """A table [[arms]]: a model that reads a language.

    Attributes:
      model: "minilm", "smollm2", or a file or folder that `mhajax.pretrained.load` opens.
      language: of the sentences.
      sentences: how many, from the beginning; there are 1,000.
      draws: how often its weights are shuffled, for heads that know nothing.
      start: a token to be put before the sentence, where a model of running text rests its attention; left out: what
        the tokenizer puts around it by itself.
    """

    model: str = "minilm"
    language: Language = "en"
    sentences: int = 1000
    draws: int = 5
    start: str | None = None

    def __post_init__(self):
        for name, least in (("sentences", 8), ("draws", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "syntax"`: ask the heads of pretrained models for gold dependency relations.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: few sentences, and everything says so. Left out: all of them.
      data: the sentences and their trees.
      arms: which models, in which languages.
      instances: relations with fewer arcs in the sentences of an arm are not asked for.
      offsets: the fixed offsets reach so many words to either side.
      seed: of the shuffled weights.
    """

    kind: Literal["syntax"] = "syntax"
    quick: bool | None = None
    data: Treebanks = Treebanks()
    arms: tuple[Arm, ...] = (Arm(),)
    instances: int = 100
    offsets: int = 8
    seed: int = 0

    def __post_init__(self):
        if not self.arms:
            raise ValueError("arms must have one table or more, got none; write [[arms]].")
        if len({(arm.model, arm.language) for arm in self.arms}) < len(self.arms):
            raise ValueError("arms must differ in model or language.")
        for name in ("instances", "offsets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def shrink(config: Config) -> Config:
    """The first arm alone, on few sentences."""
    arm = dataclasses.replace(config.arms[0], sentences=min(config.arms[0].sentences, QUICK), draws=2)
    return dataclasses.replace(config, arms=(arm,), instances=min(config.instances, 20))


def hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the treebanks and of the weights.

    Raises:
      DataError: one is not there.
    """
    languages: list[Language] = list({arm.language: None for arm in config.arms})
    paths = [dependencies.path(config.data, language) for language in languages]
    weights = {name: models.digest(name) for name in dict.fromkeys(arm.model for arm in config.arms)}
    return {path.name: files.sha256(path) for path in paths} | weights


def answer(config: Config, train: Train | None = None) -> Answer:
    """Ask every head of every arm.

    Raises:
      DataError: a treebank or a model cannot be read.
    """
    opened = {name: models.load(name) for name in dict.fromkeys(arm.model for arm in config.arms)}
    return report.make(config, [examine(config, arm, opened[arm.model]) for arm in config.arms])


def examine(config: Config, arm: Arm, opened: Pretrained) -> Examined:
    """Ask every head of one arm."""
    began = time.perf_counter()
    sentences = dependencies.read(dependencies.path(config.data, arm.language))[: arm.sentences]
    if opened.tokenizer is None:
        raise DataError(f"{arm.model}: there is no tokenizer in its files, so that nothing can be read.")
    texts = words.pieces(sentences, opened.tokenizer, arm.start)
    causal = opened.model is language_model
    wanted, offsets = counts.questions(sentences, config.instances), counts.distances(config.offsets, causal)
    if not wanted:
        raise DataError(f"No relation has {config.instances} arcs in {len(sentences)} sentences; lower instances.")
    every = [counts.asked(*pair, wanted, causal) for pair in zip(sentences, texts, strict=True)]
    where = report.name(arm.model, LANGUAGES[arm.language])
    run = words.answers(opened, texts, where)
    trained = counts.count(run(opened.params), every, offsets)
    random = [
        counts.count(run(models.shuffled(opened.params, config.seed + draw)), every, offsets)
        for draw in range(arm.draws)
    ]
    with work.piece(f"{where}: intervals", 1, "step", note=""):
        base = counts.baseline(every, offsets)
        found = findings.relations(wanted, base, offsets, trained, random)
        ordered = findings.order(base, offsets, trained, random)
    arcs = {name: sum(arc.relation == name for s in sentences for arc in s.arcs) for name, _ in wanted}
    return Examined(
        arm.model, LANGUAGES[arm.language], len(sentences), sum(len(s.spans) for s in sentences), arm.draws, causal,
        arcs, found, ordered, findings.verdicts(where, found, ordered), time.perf_counter() - began,
    )  # fmt: skip
