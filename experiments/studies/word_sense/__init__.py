"""Do heads bring the cue to an ambiguous word? In "I went to the bank", what decides between money and river?

A pretrained model reads sentences with an ambiguous word. A classifier (the nearest mean of a sense, trained on one
part of the sentences, tested on the other) tells the sense from the vector that the model has for that word. Then heads
are removed, attention is made uniform, and the word that counts most for the answer, the cue, is moved.

The layer is the first one whose macro-F1 on the training sentences, cross-validated, is within `tolerated` of the best
layer's, of the first `deepest` layers: a head is removed at the price of all layers after it. Test sentences decide
nothing but the verdicts. Intervals are of 95 %, from resampled test sentences; a number for a model is the mean over
its words.

The rules, stated before the study was run. For every model:

*Causal*: heads bring in the cue. Three conditions,

1. macro-F1 from the contextual vector is higher than from a bag of the words that the model sees, and than from the
   static vector, which is the same in every sentence: both paired intervals of the difference lie above 0. Fails if one
   of them lies below 0.
2. Uniform attention, with a classifier trained on such vectors, takes away at least half of the lead over the bag of
   words: the interval of (contextual - uniform) - (contextual - bag) / 2 lies above 0. Fails if it lies below 0.
3. The `top` heads whose removal costs most margin (score of the right sense minus the best other) in one half of the
   sentences, removed together, cost more margin in the other half than each of `draws` sets of as many random heads of
   the same layers. Fails if they cost no more than the median of these sets.

Supported if all three hold, refuted if one fails, else not resolved.

*Robust*: it still does where the cue is moved. The cue is the word whose leaving out lowers the margin of the answer
most. It is moved to the beginning or directly before the ambiguous word, and for a model that reads from both sides
also directly after it or to the end; the classifier is the one of unmoved sentences. Supported if in every place the
interval of the loss of macro-F1 ends at or below `tolerated`; refuted if in some place it begins above `tolerated`,
with intervals at 95 % for all places together (Bonferroni); else not resolved. Where no answer changes, resampling says
nothing, and the interval reaches to 3 / sentences (the rule of three).

References:
  Loureiro et al. 2021, "Analysis and Evaluation of Language Models for Word Sense Disambiguation" (data, and the
  nearest mean as a classifier). Rivière & Trott 2025, arXiv 2511.21974 (senses and heads; position of the cue).
  Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (heads removed one at a time).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from experiments.data import word_senses
from experiments.studies import models as pretrained
from experiments.studies.study import Answer, Study, Train
from experiments.studies.word_sense import findings, measure, report


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "word_sense"`: which heads of pretrained models bring the cue to an ambiguous word.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: few sentences, one word. Left out: all of them.
      data: the sentences.
      models: names as for `fetch`, or paths.
      reach: words on either side of the ambiguous one that are read.
      most: sentences of each part of a word; left out: all.
      deepest: layers that are tried, from the first.
      per_sense: test sentences of each sense for heads and cues, which take a run for every head and every word.
      top: heads that are removed together.
      draws: random sets of as many heads of the same layers.
      tolerated: macro-F1 that may be lost where the cue is moved, and by a lower layer.
      resamples: of the sentences, for intervals.
      seed: of resamples, draws and halves.
    """

    kind: Literal["word_sense"] = "word_sense"
    quick: bool | None = None
    data: word_senses.CoarseWSD = word_senses.CoarseWSD()
    models: tuple[str, ...] = ("minilm", "smollm2")
    reach: int = 24
    most: int | None = None
    deepest: int = 12
    per_sense: int = 24
    top: int = 5
    draws: int = 20
    tolerated: float = 0.02
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self):
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models must name one or more models, each once, got {list(self.models)}.")
        least = {"reach": 1, "deepest": 1, "per_sense": 2, "top": 1, "draws": 1, "resamples": 100, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.most is not None and self.most < 10:
            raise ValueError(f"most must be at least 10, or be left out, got {self.most}.")
        if not 0 < self.tolerated < 1:
            raise ValueError(f"tolerated must be between 0 and 1, got {self.tolerated}.")


def shrink(config: Config) -> Config:
    """A quick look: one word, few sentences."""
    return replace(
        config, data=replace(config.data, words=config.data.words[:1]), reach=min(config.reach, 6),
        most=min(config.most or 30, 30), deepest=min(config.deepest, 4), per_sense=min(config.per_sense, 4),
        top=min(config.top, 2), draws=min(config.draws, 3), resamples=min(config.resamples, 200),
    )  # fmt: skip


def hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the sentences and of the models' weights."""
    return word_senses.hashes(config.data) | {name: pretrained.digest(name) for name in config.models}


def answer(config: Config, train: Train | None = None) -> Answer:
    """Measure every model, and judge it by the rules above."""
    words = word_senses.read(config.data)
    found = {}
    for name in config.models:
        seen = measure.examine(pretrained.load(name), words, config)
        found[name] = findings.of_model(seen, config)
    return report.make(found, config)
