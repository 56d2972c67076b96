"""Are heads redundant, and does a table of single effects show it: `kind = "redundancy"`.

A pretrained model that predicts tokens, on windows of a text. On the first windows heads are ranked ("chosen"), on the
windows after them the rankings are judged. A head is removed by a gate of 0; losses are nats per token; intervals are
of 95 %, over windows. Four claims, each with a rule that was written down before the measurement; numbers in quotes are
of the config.

removable   A part "share" of the heads can be removed for less than "bound" nats per token.
            Measured: heads go in the order of their single effects, loss(without h) - loss, on the chosen windows; the
            loss is that of the judged windows. Supported if the interval of the rise is below the bound, refuted if
            above, else not resolved.
ranking     Removing those costs less than removing as many random heads of the same layers.
            Measured: "draws" orders that take, at every step, a random head of the layer that the ranking takes one of.
            Supported if the interval of (rise of the ranking - mean rise of the draws) is below 0 and no more than one
            draw in twenty is as good: (1 + draws that are) / (1 + draws) ≤ 0.05. Refuted if that interval is above 0,
            else not resolved.
understated Single effects understate what heads do: to remove a layer's heads costs more than the sum of what each
            costs alone.
            Measured on the chosen windows: mean over layers of joint effect - sum of single effects; and the same
            without the layer where both differ most, so that no single layer decides. Supported if both intervals are
            above 0, refuted if both are below 0, else not resolved.
takeover    When the head with the largest single effect is gone, another one takes over.
            Measured on the chosen windows: by how much the effect of each other head rises when that head is gone. The
            head with the largest rise is chosen on one half of the windows and reported on the other. Supported if the
            interval of its rise is above "takeover" times what the gone head costs alone, refuted if below, else not
            resolved.

Beside them, without a verdict: Shapley shares of all heads, Michel's importance, curves of all three rankings, how
stable the ranking is over bootstrap resamples of the windows, and the same model with the numbers of every array in
another order: where heads do nothing, all of them can be removed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.data import fetch, files
from experiments.studies import models
from experiments.studies.study import Answer, Study, Train, Verdict


@dataclass(frozen=True)
class Text:
    """Tiny Shakespeare.

    Attributes:
      root: folder of the data; None: $MHAJAX_DATA, else the folder that `fetch` writes to.
    """

    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "redundancy"`: how many heads of a pretrained model can go, and what single effects do not show.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: very little of everything.
      data: the text.
      model: "smollm2", or a folder or file of a language model or of an encoder that predicts tokens.
      layers: of the model, from the first, for a quick look; left out: all.
      length: tokens of a window.
      chosen: windows on which heads are ranked.
      judged: windows after them, on which rankings are judged.
      control: of the chosen windows, those for the model whose numbers are in another order.
      pairs: of orders of all heads for Shapley shares, a pair for one chosen window each.
      draws: random orders of the same layers.
      share: of the heads, for the verdicts.
      curve: shares of the heads that are removed in the figure; `share` is one of them.
      bound: nats per token.
      takeover: part of the effect of the best head.
    """

    kind: Literal["redundancy"] = "redundancy"
    quick: bool | None = None
    data: Text = Text()
    model: str = "smollm2"
    layers: int | None = None
    length: int = 32
    chosen: int = 8
    judged: int = 24
    control: int = 4
    pairs: int = 3
    draws: int = 20
    share: float = 0.25
    curve: tuple[float, ...] = (0.125, 0.25, 0.5)
    bound: float = 0.1
    takeover: float = 0.1

    def __post_init__(self):
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}.")
        least = {"length": 4, "chosen": 4, "judged": 4, "control": 4, "pairs": 2, "draws": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least {limit}, got {getattr(self, name)}.")
        for name in ("control", "pairs"):
            if getattr(self, name) > self.chosen:
                raise ValueError(f"{name} must be at most chosen={self.chosen}, got {getattr(self, name)}.")
        if self.share not in self.curve or list(self.curve) != sorted(set(self.curve)):
            raise ValueError(f"curve must increase and have share={self.share:g} in it, got {self.curve}.")
        if not 0 < self.curve[0] <= self.curve[-1] < 1:
            raise ValueError(f"curve must be of shares above 0 and below 1, got {self.curve}.")


def shrink(config: Config) -> Config:
    """The same questions of a few short windows and the first layers."""
    return replace(config, layers=2, length=4, chosen=4, judged=4, control=4, pairs=2, draws=1, curve=(config.share,))


def hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the model and of the text."""
    text = fetch.locate("tinyshakespeare", config.data.root) / "input.txt"
    return {config.model: models.digest(config.model), text.name: files.sha256(text)}


def answer(config: Config, train: Train | None = None) -> Answer:
    """Measure, decide, and write the page.

    Raises:
      DataError: the model or the text is missing, or too short.
      UserError: the model predicts no tokens.
    """
    from experiments.studies.redundancy import measures, report

    return report.make(config, measures.measure(config))


def judge(config: Config, result: dict[str, Any]) -> tuple[Verdict, ...]:
    """The verdicts that follow from the numbers in a result, by the rules."""
    from experiments.studies.redundancy import rules

    return rules.verdicts(config, rules.from_result(result))
