"""The packages that only some commands need, asked for before anything is made or read."""

from __future__ import annotations

import importlib.util

from experiments.errors import UserError

# extra of pyproject.toml → what is imported: what is installed
_EXTRAS = {
    "experiments": {
        "matplotlib": "matplotlib",
        "orbax.checkpoint": "orbax-checkpoint",
        "rich": "rich",
        "sacrebleu": "sacrebleu",
        "tokenizers": "tokenizers",
    },
    "pretrained": {"safetensors": "safetensors", "tokenizers": "tokenizers"},
    "tensorboard": {"tensorboardX": "tensorboardX"},
}


def need(extra: str) -> None:
    """Refuse to go on without the packages of an extra.

    Args:
      extra: of pyproject.toml: "experiments", "pretrained" or "tensorboard".

    Raises:
      UserError: packages are not installed; it names them and the command that installs them.
    """
    missing = [package for module, package in _EXTRAS[extra].items() if not _installed(module)]
    if missing:
        are = "package is" if len(missing) == 1 else "packages are"
        raise UserError(f'{len(missing)} {are} not installed: {", ".join(missing)}; pip install -e ".[{extra}]"')


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it lies in
        return False
