"""The generated tasks, a module each: TASKS.

A task is a module with `Config`, a frozen dataclass whose `kind` is its name in this table, `check(config, arms)`,
which raises a ValueError if its rule cannot be applied to the arms, and `make(config)`, which makes a `task.Task`.
Its docstring says how samples are made, what the best reachable is and why, and the rule of the verdicts, stated before
anything is run: the page of the study quotes it. `[task]` with `kind = "…"` in a config chooses it.
"""

from types import ModuleType
from typing import Union

from experiments.studies.generated.tasks import endpoint_selection, relations, trigger

TASKS: dict[str, ModuleType] = {
    "endpoint_selection": endpoint_selection, "relations": relations, "trigger": trigger,
}  # fmt: skip

Tasks = Union[tuple(module.Config for module in TASKS.values())]  # noqa: UP007 - what `schema` reads [task] as

__all__ = ["TASKS", "Tasks"]
