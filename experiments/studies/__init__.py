"""Studies: questions about heads, each answered from a config with numbers, intervals, baselines and a verdict."""

from types import ModuleType

from experiments.studies import lm_heads, syntax, word_sense
from experiments.studies.study import Answer, Verdict, run

STUDIES: dict[str, ModuleType] = {"lm_heads": lm_heads, "syntax": syntax, "word_sense": word_sense}

__all__ = ["STUDIES", "Answer", "Verdict", "run"]
