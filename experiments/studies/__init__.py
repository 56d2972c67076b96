"""Studies: questions about heads, each answered from a config with numbers, intervals, baselines and a verdict."""

from types import ModuleType

from experiments.studies import syntax
from experiments.studies.study import Answer, Verdict, run

STUDIES: dict[str, ModuleType] = {"syntax": syntax}

__all__ = ["STUDIES", "Answer", "Verdict", "run"]
