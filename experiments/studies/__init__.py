"""Studies: questions about heads, each answered from a config with numbers, intervals, baselines and a verdict."""

from types import ModuleType

from experiments.studies import (
    expressiveness,
    generated,
    lm_heads,
    process,
    redundancy,
    sweep,
    syntax,
    trained_heads,
    word_sense,
)
from experiments.studies.study import Answer, Models, Study, Train, Verdict, run

_MODULES = (expressiveness, generated, lm_heads, process, redundancy, sweep, syntax, trained_heads, word_sense)
STUDIES: dict[str, ModuleType] = {module.Config.kind: module for module in _MODULES}

__all__ = ["STUDIES", "Answer", "Models", "Study", "Train", "Verdict", "run"]
