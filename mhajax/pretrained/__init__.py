"""Models of others, opened without their libraries: from files to arrays.

    source = pretrained.open_files("SmolLM2-135M-Instruct.Q4_1.gguf")
    source.config["num_attention_heads"]                              # 9
    source.read("model.layers.0.self_attn.q_proj.weight")             # [N·H, D]
    source.tokenizer().encode("The capital of France").ids

A map of the folder:

    source              what a family of models sees of a file: config, names, shapes, one tensor at a time, tokenizer;
                        `take` and `check`, which refuse what is missing, misshapen or left over
    safetensors_files   a folder with config.json, tokenizer.json and model.safetensors, or shards; and writing one
    gguf                a file of llama.cpp, with its quantised weights and the tokenizer inside

Tensors come one at a time, so that a file is never in memory beside the model. Nothing is unpickled. A damaged file is
an `UnreadableFile`, which names file and tensor.
"""

from pathlib import Path

from mhajax.pretrained.gguf import MAGIC, Gguf, open_gguf
from mhajax.pretrained.safetensors_files import CONFIG, SafetensorsFiles, open_safetensors, write_safetensors
from mhajax.pretrained.source import Arrays, Source, UnreadableFile, check, check_all_read, take

__all__ = [
    "Arrays",
    "Gguf",
    "SafetensorsFiles",
    "Source",
    "UnreadableFile",
    "check",
    "check_all_read",
    "open_files",
    "open_gguf",
    "open_safetensors",
    "take",
    "write_safetensors",
]


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
