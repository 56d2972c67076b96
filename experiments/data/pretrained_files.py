"""Pretrained models by name: what `mhajax.pretrained.open_files` opens for `minilm`, or for a path.

python -m experiments fetch minilm smollm2
"""

import os
from pathlib import Path

from experiments import toml
from experiments.data import fetch
from experiments.errors import DataError

# What of a model's folder is opened.
MODELS = {"minilm": ".", "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def locate(name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Path:
    """Where the files of a model are.

    Args:
        name: A file or folder that is there, or one of `MODELS`. A path wins: ./minilm is the folder of that name.
        root: The folder in which models were fetched; None: $MHAJAX_DATA, or else the cache folder.

    Returns:
        A folder with config.json and weights, or a file.

    Raises:
        DataError: The path is not there, or the model was not fetched.
    """
    path, name = Path(name).expanduser(), str(name)
    if path.exists() and (root is None or name not in MODELS):
        return path
    if name not in MODELS:
        near = toml.nearest(name, MODELS)
        hint = f"Did you mean {near}? " if near else ""
        raise DataError(
            f"{name}: there is no such file or folder, and no such model. {hint}Give a folder with config.json and "
            f"model.safetensors, a .gguf file, or one of {', '.join(MODELS)}."
        )
    roots = dict.fromkeys([fetch.default_root(), fetch.cache_root()] if root is None else [Path(root).expanduser()])
    for candidate in roots:
        try:
            return fetch.locate(name, candidate) / MODELS[name]
        except DataError:  # not all of it is there
            continue
    where = "" if root is None else f" --root {root}"
    raise DataError(
        f"{name}: expected in {' or '.join(str(folder / name) for folder in roots)}, and it is not there or not whole. "
        f"Download it with `python -m experiments fetch {name}{where}`, or give the folder or file itself."
    )
