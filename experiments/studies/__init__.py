"""Studies: questions about heads, each answered from a config with numbers, intervals, baselines and a verdict."""

from types import ModuleType

from experiments.studies import generated, lm_heads, sweep, syntax, trained_heads, word_sense
from experiments.studies.study import Answer, Models, Train, Verdict, run

STUDIES: dict[str, ModuleType] = {
    "generated_task": generated, "lm_heads": lm_heads, "sweep": sweep, "syntax": syntax,
    "trained_heads": trained_heads, "word_sense": word_sense
}  # fmt: skip

__all__ = ["STUDIES", "Answer", "Models", "Train", "Verdict", "run"]
