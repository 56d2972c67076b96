"""Tables of a config that several kinds of trainings share, and what every training's config has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from experiments.data import vocabulary
    from mhajax import training


class Training:
    """The config of a kind that trains a model; its own dataclass says in which order these stand in a file.

    Attributes:
      kind: by which a file names it.
      quick: set by --quick.
      data: what it learns from.
      vocabulary: how text becomes numbers.
      batches: how much is taken at a time.
      model: the Config of the model, whose `vocab_size` is filled in.
      training: how it is trained.
      heads: the report about its heads.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]
        kind: str
        quick: bool | None
        data: Any
        vocabulary: vocabulary.Config
        batches: Any
        model: Any
        training: training.Config
        heads: Heads


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The table [heads]: the report about the heads, report.html in the run's folder.

    Attributes:
      report: make it at the end of the run; `python -m experiments heads RUN` makes it at any time.
      sentences: how many held-out sentences (or windows of a text) are measured.
      shown: how many of them can be looked at, with every head.
    """

    report: bool = False
    sentences: int = 200
    shown: int = 8

    def __post_init__(self):
        for name, least in (("sentences", 4), ("shown", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The table [batches] of running text.

    Attributes:
      size: windows per batch.
      length: tokens per window.
    """

    size: int = 16
    length: int = 128

    def __post_init__(self):
        for name in ("size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
