"""Models of others, opened without their libraries, as models of ours: every tool for heads works on them.

    params, config, tokenizer, model, _ = pretrained.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    tokens = jnp.asarray([tokenizer.encode("The capital of France is").ids])
    logits, seen = model.apply_captured(params, tokens, config)      # seen.attention["weights"]: [L, 1, N, T, S]

Read are safetensors (a folder with config.json, as Hugging Face has it) and GGUF files. Families: BERT, RoBERTa,
DistilBERT and ALBERT as `mhajax.encoder`; GPT-2, GPT-NeoX and Pythia, Llama, Mistral, Qwen2 and SmolLM as
`mhajax.language_model`. What a config.json asks and is not done here is refused, with key and value.

A map of the folder:

    models              from files to our parameters, leaf by leaf, and back
    families            one file for each: what its config says, and where its tensors stand in our parameters
    source              what a family sees of a file: config, names, shapes, one tensor at a time, tokenizer; `take` and
                        `check`, which refuse what is missing, misshapen or left over
    safetensors_files   a folder with config.json, tokenizer.json and model.safetensors, or shards; and writing one
    gguf                a file of llama.cpp, with its quantised weights and the tokenizer inside

Tensors come one at a time, so that a file is never in memory beside the model. Nothing is unpickled. A damaged file is
an `UnreadableFile`, which names file and tensor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from mhajax.pretrained.gguf import MAGIC, Gguf, open_gguf
from mhajax.pretrained.models import Pretrained, from_source, sizes, to_tensors
from mhajax.pretrained.safetensors_files import CONFIG, SafetensorsFiles, open_safetensors, write_safetensors
from mhajax.pretrained.source import Arrays, Source, UnreadableFile, check, check_all_read, take

__all__ = [
    "Arrays",
    "Gguf",
    "Pretrained",
    "SafetensorsFiles",
    "Source",
    "UnreadableFile",
    "check",
    "check_all_read",
    "from_arrays",
    "load",
    "open_files",
    "open_gguf",
    "open_safetensors",
    "save",
    "take",
    "write_safetensors",
]


def load(path: Path | str, *, dtype: DTypeLike = jnp.float32, length: int | None = None) -> Pretrained:
    """A model on disk as parameters and config of ours.

    Args:
      path: as in `open_files`.
      dtype: of the parameters; files that are quantised or narrower are widened to it.
      length: tokens of the longest text that the model shall be used with, for rotary positions that are scaled by it
        ("dynamic", "longrope"). None: those that it was trained with.

    Returns:
      Parameters, config, tokenizer (None if the files have none), the module of ours that computes it, and the source.

    Raises:
      FileNotFoundError, UnreadableFile: as `open_files`; and for a kind of model, or a key of its config, that is not
        done here, and for tensors that are missing, of another shape or left over. Nothing is half loaded.
    """
    return from_source(open_files(path), dtype=dtype, length=length)


def from_arrays(
    arrays: Mapping[str, Any], config: dict[str, Any], *, dtype: DTypeLike = jnp.float32, length: int | None = None
) -> Pretrained:
    """The same from arrays that are in memory, such as a state_dict of `transformers` as NumPy arrays.

    Args:
      arrays: by the names that they have there.
      config: what would stand in its config.json.
      dtype, length: as in `load`.

    Raises:
      UnreadableFile: as `load`.
    """
    return from_source(Arrays(arrays, config), dtype=dtype, length=length)


def save(folder: Path | str, params: Any, config: Any, like: Pretrained) -> Path:
    """A model of ours as a folder that `transformers` loads, and `load`: safetensors, config.json, tokenizer.json.

    Trained further or with heads removed by `heads.surgery`: config.json has the numbers of heads that there are, and
    `head_dim` where it no longer follows from them (which `transformers` reads for Llama and its relatives only).

    Args:
      folder: made where it is not there.
      params, config: as they are now.
      like: what they were loaded from, whose names and lay-out the files get.

    Returns:
      The folder.

    Raises:
      ValueError: if the files of this kind of model have no place for a parameter; else as `write_safetensors`.
    """
    described = sizes(config, like.source)
    return write_safetensors(folder, to_tensors(params, config, like.source), described, like.tokenizer)


def open_files(path: Path | str) -> Source:
    """A model on disk, whatever its container.

    Args:
      path: a GGUF file, or a folder that holds one; a folder with config.json and model.safetensors or its index; one
        safetensors file beside its config.json.

    Returns:
      Its config, and its tensors one at a time; see `Source`.

    Raises:
      FileNotFoundError: nothing is there, or a part of it is missing.
      UnreadableFile: the files are damaged, or of a format or kind that is not read here.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if (path / CONFIG).exists() or not found:
            return open_safetensors(path)
        if len(found) > 1:
            raise UnreadableFile(
                f"{path}: must hold one GGUF file, got {len(found)}: {', '.join(file.name for file in found[:5])}; "
                "name the file."
            )
        return open_gguf(found[0])
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix == ".gguf" or _begins(path) == MAGIC:
        return open_gguf(path)
    raise UnreadableFile(
        f"{path}: must be a folder, a .safetensors file or a .gguf file; others (pickles of torch among them) are not "
        "read here. Save it with `model.save_pretrained(FOLDER)` of transformers."
    )


def _begins(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror or error}).") from None
