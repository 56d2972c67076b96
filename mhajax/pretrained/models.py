"""From a model on disk to our parameters, leaf by leaf, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mhajax import tree
from mhajax.pretrained.families import FAMILIES
from mhajax.pretrained.families.leaves import Leaf
from mhajax.pretrained.source import Arrays, Source, UnreadableFile, check

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_FEW_LAYERS = 1000  # a layer that is shared is there once, however many there are


class Pretrained(NamedTuple):
    """A model that was opened.

    Attributes:
      params, config: of one of our models.
      tokenizer: that belongs to it; None if there is none in its files.
      model: the module that computes it, `mhajax.language_model` or `mhajax.encoder`.
      source: what it was read from.
    """

    params: Any
    config: Any
    tokenizer: Tokenizer | None
    model: ModuleType
    source: Source


def from_source(source: Source, *, dtype: DTypeLike = jnp.float32, length: int | None = None) -> Pretrained:
    """As `pretrained.load`, from files that are open."""
    family = _family(source)
    config = _config(family, source, length)
    leaves = family.leaves(source, config)
    shapes = {name: leaf.shape for leaf in leaves for name in leaf.names}
    check(source, shapes, family.IGNORED)
    template = jax.eval_shape(lambda: family.MODEL.init_params(jax.random.key(0), config))
    wanted = _flat(template)
    found = {}
    for leaf in leaves:
        found[leaf.path] = _read(source, leaf, wanted[leaf.path].shape, dtype)
    for path, value in family.CONSTANTS.items():
        if path in wanted and path not in found:
            found[path] = jnp.full(wanted[path].shape, value, dtype)
    missing = sorted(set(wanted) - set(found))
    assert not missing, f"{family.__name__} says nothing about {missing}"
    params = tree.from_dict(_nested(found), template)
    return Pretrained(params, config, _tokenizer(source), family.MODEL, source)


def to_tensors(params: Any, config: Any, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model with the names and the lay-out of the file that it came from, one at a time.

    Args:
      params, config: as they are now; heads may have been removed.
      source: what they came from; only its config and its names count.

    Raises:
      ValueError: if something has become of the model that its files have no place for.
    """
    family = _family(source)
    leaves = family.leaves(source, config)
    flat = _flat(params)
    for path in set(flat) - {leaf.path for leaf in leaves}:
        value = family.CONSTANTS.get(path)
        if value is None or np.any(np.asarray(flat[path]) != value):
            raise ValueError(
                f"pretrained.save: params.{path} must be {'absent' if value is None else value}: the files of a "
                f"{source.config['model_type']} have no place for it."
            )
    made: dict[str, np.ndarray] = {}
    parts: dict[str, int] = {}
    for leaf in leaves:
        for name in leaf.names:
            parts[name] = parts.get(name, 0) + 1
    for leaf in leaves:
        for index, name in enumerate(leaf.names):
            array = np.asarray(flat[leaf.path][index] if leaf.stacked else flat[leaf.path])
            turned = leaf.theirs(array)
            if leaf.part is None:
                if name not in made:  # a layer that is shared is written once
                    made[name] = np.empty(0)
                    yield name, np.ascontiguousarray(turned)
                continue
            if name not in made:  # what no leaf has is as it was, such as positions of padding
                there = source.shape(name) == leaf.shape
                made[name] = source.read(name).astype(array.dtype) if there else np.zeros(leaf.shape, array.dtype)
            whole = made[name]
            whole[leaf.part] = turned
            parts[name] -= 1
            if not parts[name]:
                yield name, made.pop(name)


def sizes(config: Any, source: Source) -> dict[str, Any]:
    """The config.json of the model as it is now: that of the file, with the numbers of heads that there are.

    Raises:
      ValueError: if this kind of model cannot have what the config says.
    """
    changed = dict(source.config)
    for name in ("num_attention_heads", "n_heads", "n_head"):
        if name in changed:
            changed[name] = config.num_heads
    if "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = config.kv_heads
    if config.width * config.num_heads != config.d_model or "head_dim" in changed:
        changed["head_dim"] = config.width
    again = _family(source).read_config(replace(Arrays(dict.fromkeys(source.names, np.empty(0))), config=changed))
    for name in ("d_model", "num_heads", "kv_heads", "width", "value_width", "num_layers", "vocab_size", "hidden"):
        if getattr(again, name) != getattr(config, name):
            raise ValueError(
                f"pretrained.save: config must have {name}={getattr(again, name)} for the files of a "
                f"{source.config['model_type']}, got {getattr(config, name)}."
            )
    return changed


def _family(source: Source) -> Any:
    kind = source.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnreadableFile(
            f"{source.path}: config.json asks for model_type={kind!r}; what is read here is "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[kind]


def _config(family: Any, source: Source, length: int | None) -> Any:
    """Our config; whatever is wrong with the file's is said as such."""
    try:
        config = family.read_config(source, length)
    except UnreadableFile:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        kind, said = source.config["model_type"], str(error) or type(error).__name__
        raise UnreadableFile(f"{source.path}: config.json is not that of a {kind}: {said}") from None
    if config.num_layers > max(len(source.names), _FEW_LAYERS):
        raise UnreadableFile(
            f"{source.path}: config.json asks for {config.num_layers} layers, of a file with {len(source.names)} "
            "tensors; it is another model's."
        )
    return config


def _read(source: Source, leaf: Leaf, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """One leaf; its tensors are read one after the other into their places."""
    kind = np.dtype(dtype)
    if not leaf.stacked:
        return jnp.asarray(_part(source, leaf, leaf.names[0], shape, kind))
    whole = np.empty(shape, kind)
    for index, name in enumerate(leaf.names):
        whole[index] = _part(source, leaf, name, shape[1:], kind)
    return jnp.asarray(whole)


def _part(source: Source, leaf: Leaf, name: str, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    array = source.read(name)
    array = leaf.ours(array if leaf.part is None else array[leaf.part])
    if array.shape != shape:
        raise UnreadableFile(f"{source.path}: {name} must fill {leaf.path} {shape}, got {array.shape}.")
    return array.astype(kind)


def _tokenizer(source: Source) -> Tokenizer | None:
    try:
        return source.tokenizer()
    except FileNotFoundError:
        return None


def _flat(params: Any, path: str = "") -> dict[str, Any]:
    """Leaves by their place, "stack.layers.attention.w_q"."""
    if not hasattr(params, "_asdict"):
        return {path: params}
    found = {}
    for name, value in params._asdict().items():
        if value is not None:
            found |= _flat(value, f"{path}.{name}" if path else name)
    return found


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        inside = nested
        for name in parents:
            inside = inside.setdefault(name, {})
        inside[last] = value
    return nested
