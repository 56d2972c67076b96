"""The numbers by which "auto" decides on a CPU: built in, or measured on a machine and read from a file.

`python -m experiments bench tune` measures them and writes the file. It is read where `use` is given its path, or the
environment variable MHAJAX_RULES has it. What is traced afterwards is decided by it; what jit compiled before stays.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from mhajax import arguments

VARIABLE = "MHAJAX_RULES"
_FUSES = jax.__version_info__ >= (0, 10)  # XLA takes both products and the softmax of whole rows as one loop


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is quick on a machine. Every path gives the same numbers; these say only which is taken, in what tiles.

    Attributes:
      few_logits: of all heads, B·N·T·S: up to so many, the dense path is taken (on every platform).
      keys_at_once: up to so many keys, whole rows of all heads are one tile where no gradient is taken; 0 is never.
      tile_tokens: the longest side of a tile, where nothing is masked.
      masked_tile_tokens: the same under a mask, of which smaller tiles leave out more.
      tile_logits: of all heads that are worked on together; they should stay in the cache.
    """

    few_logits: int = 2**14
    keys_at_once: int = 512 if _FUSES else 0
    tile_tokens: int = 512
    masked_tile_tokens: int = 256
    tile_logits: int = 2**19

    def __post_init__(self):
        arguments.integers(self, "few_logits", "keys_at_once", least=0)
        arguments.integers(self, "tile_tokens", "masked_tile_tokens", "tile_logits")


BUILT_IN = Rules()
_used: Rules | None = None


def current() -> Rules:
    """What "auto" decides by now.

    Raises:
      ValueError: if the file that MHAJAX_RULES names cannot be read, or says something that is no rule.
    """
    global _used
    if _used is None:
        path = os.environ.get(VARIABLE)
        _used = read(path) if path else BUILT_IN
    return _used


def use(rules: Rules | str | os.PathLike) -> Rules:
    """Let "auto" decide by these from now on: the path of a file of `bench tune`, or Rules. Returns those before."""
    global _used
    before = current()
    _used = rules if isinstance(rules, Rules) else read(rules)
    return before


@contextmanager
def using(rules: Rules | str | os.PathLike) -> Iterator[None]:
    """`use`, while this is open."""
    before = use(rules)
    try:
        yield
    finally:
        use(before)


def read(path: str | os.PathLike) -> Rules:
    """The rules in a file. A warning says if they were measured with another jax.

    Raises:
      ValueError: if it cannot be read, or says something that is no rule; it names the file.
    """
    advice = "`python -m experiments bench tune` writes one"
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"kernels.rules: {path} cannot be read: {error}; {advice}.") from None
    names = [field.name for field in dataclasses.fields(Rules)]
    unknown = sorted(set(table) - {*names, "jax", "cpu"})
    if unknown:
        raise ValueError(
            f"kernels.rules: {path} may have {', '.join(names)}, jax and cpu, got {unknown[0]!r}; {advice}."
        )
    measured = table.get("jax")
    if measured != jax.__version__:
        warnings.warn(
            f"kernels.rules: {path} was measured with jax {measured}, this is jax {jax.__version__}: measure again.",
            stacklevel=2,
        )
    try:
        return Rules(**{name: table[name] for name in names if name in table})
    except (TypeError, ValueError) as error:
        raise ValueError(f"kernels.rules: {path}: {error}") from None


def write(path: str | os.PathLike, rules: Rules, cpu: str) -> None:
    """Write a file that `read` reads; `cpu` says of which machine it is."""
    lines = ["# What is quick on this machine, measured by `python -m experiments bench tune`."]
    lines += [f"# Used by: export {VARIABLE}={Path(path).absolute()}"]
    lines += [f'jax = "{jax.__version__}"', f"cpu = {json.dumps(cpu)}"]
    lines += [f"{name} = {value}" for name, value in dataclasses.asdict(rules).items()]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
