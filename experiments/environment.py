"""With what a run was made: versions, machine, hashes of its data; and whether that is still so."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from experiments import folder as folders
from experiments.errors import DataError, UserError
from experiments.folder import ENVIRONMENT
from mhajax.kernels import rules

_PACKAGES = ("mhajax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "sacrebleu")


def describe(hashes: dict[str, str], folder: Path) -> dict[str, Any]:
    """What stands in environment.json.

    Args:
      hashes: of the data and models that were read, name → SHA-256.
      folder: of the run.

    Raises:
      UserError: if the file that MHAJAX_RULES names cannot be read.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    try:
        decided = rules.current()
    except ValueError as error:
        raise UserError(str(error)) from None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "kernel_rules": dataclasses.asdict(decided),  # other tiles round otherwise
        "devices": [device.device_kind for device in jax.devices()],
        "data_sha256": hashes,
        "files_sha256": folders.sums(folder),
    }


def same_data(folder: Path, hashes: dict[str, str]) -> None:
    """Refuse to go on with data other than those the run began with.

    Raises:
      DataError: they are others, or environment.json is damaged.
    """
    path = folder / ENVIRONMENT
    if path.is_file():
        before = folders.read_json(path, "data_sha256")["data_sha256"]
        if not isinstance(before, dict):
            raise DataError(f"{path}: data_sha256 must name the data and their SHA-256; the file is damaged.")
        changed = sorted(name for name in before | hashes if before.get(name) != hashes.get(name))
        if changed:
            raise DataError(
                f"{folder}: this run began with other data: {', '.join(changed)} changed since. Bring the old data "
                "back, or start a new run with --runs FOLDER."
            )
