"""Which parameters weight decay pulls to zero: by what a leaf is, since an axis of layers hides it from its shape."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

_LAST = frozenset("b bias biases scale shift offset gain gamma beta sink sinks lambda lambdas slope slopes".split())
_FIRST = frozenset("b bias lambda".split())
_NORM = re.compile(r".*norm(_?\d+)?|ln(_\w+|\d+)?")
_BOX = ("value", "raw_value")  # where Flax keeps an array that has metadata


def decayed(params: Any) -> Any:
    """Whether a leaf is decayed: matrices and tables of embeddings are, everything learned per channel or head is not.

    A leaf is named by the last name on its path: a field of a NamedTuple, a key of a dict, an attribute; indices do not
    count, and "/" and "." in a key separate names. It is *not* decayed if

    - the last word of its name (words are joined by "_") is b, bias, scale, shift, offset, gain, gamma, beta, sink,
      lambda or slope, or a plural of these, or its first word is b, bias or lambda: `b_q`, `q_scale`, `lambda_q1`;
    - it belongs to a normalisation: the name before its own ends in "norm" (a number may follow), or is ln, ln1, ln_f;
    - it has fewer than two axes, whatever its name.

    Every other leaf is. The shape cannot tell a vector under another name from a matrix once layers are stacked: hand
    `optimizer(config, decayed=…)` a function of your own then.

    Args:
      params: a pytree of arrays.

    Returns:
      The same pytree of booleans, as Optax's `mask` takes it.

    >>> decayed({"layers": {"norm": {"scale": jnp.ones((2, 3))}, "kernel": jnp.ones((2, 3, 3))}})
    {'layers': {'kernel': True, 'norm': {'scale': False}}}

    References:
      Biases and normalisations spared, embeddings decayed: Devlin et al. 2019, "BERT" (`exclude_from_weight_decay` in
      the authors' code), and Karpathy's nanoGPT (`configure_optimizers`). The table here also gives the logits, as in
      both.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.ndim(leaf) > 1 and _is_matrix(_names(path)), params)


def _names(path: tuple) -> list[str]:
    """The names on the way to a leaf, in lower case."""
    keys = [getattr(entry, "name", getattr(entry, "key", None)) for entry in path]
    names = [name for key in keys if isinstance(key, str | tuple) for name in _parts(key)]
    return names[:-1] if len(names) > 1 and names[-1] in _BOX else names


def _parts(key: str | tuple) -> list[str]:
    whole = key if isinstance(key, str) else "/".join(map(str, key))
    return [name for name in re.split(r"[./]", whole.lower()) if name and not name.isdigit()]


def _is_matrix(names: list[str]) -> bool:
    if not names:
        return True
    words = names[-1].split("_")
    spared = words[-1] in _LAST or words[0] in _FIRST or re.fullmatch(r"lambda\w*", words[0]) is not None
    return not spared and not (len(names) > 1 and _NORM.fullmatch(names[-2]))
