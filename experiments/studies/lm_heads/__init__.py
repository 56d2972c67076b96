"""What the heads of a pretrained language model do, and how many of them it needs: `kind = "lm_heads"`.

Four claims, each with a rule that was written down before the measurement:

induction   Some heads attend to what came after the same token before (Olsson et al. 2022).
            Measured: attention mass on those keys, random tokens repeated. The best head is chosen on one half of the
            sequences and reported on the other; so is the best head of shuffled parameters. Supported if the interval
            of the difference is above 0, refuted if below, else not resolved. Previous-token and duplicate-token heads
            are measured in the same way and are in the table.
sink        More than half of the heads put more than half of their attention on the first token of a text.
            Supported if the share of heads whose interval is above ½ is more than half, refuted if that of heads whose
            interval is below ½ is, else not resolved.
agreement   One head carries more than a tenth of the agreement of subject and verb (BLiMP).
            Measured: logit of the right form minus that of the wrong one, and what of it is lost without each head; the
            head is chosen on one half and reported on the other. Supported if its interval is above a tenth of the
            difference with all heads, refuted if below, else not resolved.
redundancy  A quarter of the heads can be removed and perplexity rises by less than a tenth.
            Measured: loss on windows of a text, heads removed in the order of Michel's importance on other windows.
            Supported if the interval of the rise is below log 1.1, refuted if above, else not resolved. Random heads,
            as many of every layer, are drawn beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from experiments.data import fetch, files
from experiments.studies import models
from experiments.studies.study import Answer, Study, Train


@dataclass(frozen=True)
class Texts:
    """Tiny Shakespeare for the loss, three files of BLiMP for agreement.

    Attributes:
      root: folder of the data; None: $MHAJAX_DATA, else the folder that `fetch` writes to.
    """

    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "lm_heads"`: roles, agreement and redundancy of the heads of a pretrained language model.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: very little of everything.
      data: the texts.
      model: "smollm2", or a folder or file of a language model.
      sequences: of random tokens repeated, for roles.
      length: tokens of a sequence before they repeat; also half of that of a window of text.
      windows: of the text, for the sink and for pruning; half of them choose, half report.
      pairs: of each file of BLiMP.
      draws: of shuffled parameters, and of random orders of removal.
    """

    kind: Literal["lm_heads"] = "lm_heads"
    quick: bool | None = None
    data: Texts = Texts()
    model: str = "smollm2"
    sequences: int = 8
    length: int = 25
    windows: int = 16
    pairs: int = 24
    draws: int = 3

    def __post_init__(self):
        for name, least in (("sequences", 4), ("length", 4), ("windows", 4), ("pairs", 2), ("draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


BLIMP = (
    "regular_plural_subject_verb_agreement_1.jsonl",
    "distractor_agreement_relative_clause.jsonl",
    "anaphor_number_agreement.jsonl",
)


def shrink(config: Config) -> Config:
    """The same question of very little."""
    return replace(config, sequences=4, length=5, windows=4, pairs=2, draws=1)


def hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the model and of the texts."""
    text = fetch.locate("tinyshakespeare", config.data.root) / "input.txt"
    folder = fetch.locate("blimp", config.data.root)
    found = {config.model: models.digest(config.model), text.name: files.sha256(text)}
    return found | {name: files.sha256(folder / name) for name in BLIMP}


def answer(config: Config, train: Train | None = None) -> Answer:
    """Measure, decide, and write the page."""
    from experiments.studies.lm_heads import measures, report

    return report.make(config, measures.measure(config))
