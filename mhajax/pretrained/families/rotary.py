"""What a config.json says about rotary positions, as the frequencies and the magnitude of our configs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax import Array

from mhajax import positions
from mhajax.pretrained.families.keys import Keys

_WIDEST = 1 << 20  # channels of a head, before a frequency is made for each pair
_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def read(keys: Keys, head_dim: int, longest: int, length: int | None, fraction: float = 1.0) -> dict[str, Any]:
    """Options of `embedding.Config` for rotary positions.

    Args:
      keys: of the config; "rope_theta", "rope_scaling" and "rope_parameters" are taken.
      head_dim: H.
      longest: its max_position_embeddings.
      length: tokens of the texts that the model shall be used with, for scalings that go by it. None: no more than it
        was trained with.
      fraction: of the channels that are rotated.

    Raises:
      UnreadableFile: for a scaling that is not known.
    """
    if not 0 < head_dim <= _WIDEST or not 0 < fraction <= 1:
        raise keys.refused("head_dim, and what of it is rotated,", (head_dim, fraction), [f"up to {_WIDEST}", "0 to 1"])
    base = keys.take("rope_theta", None, "rotary_emb_base")
    given = keys.take("rope_parameters", None) or keys.take("rope_scaling", None) or {}
    keys.left.pop("rope_scaling", None)
    if not isinstance(given, dict):
        raise keys.refused("rope_scaling", given, ["a table"])
    scaling = {name: value for name, value in given.items() if value is not None}
    base = float(scaling.pop("rope_theta", base or 10_000.0))
    fraction = float(scaling.pop("partial_rotary_factor", fraction))
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind not in _TYPES:
        raise keys.refused("rope_scaling.rope_type", kind, _TYPES)
    width = int(head_dim * fraction)
    if kind == "default":
        if scaling:
            raise keys.refused("rope_scaling", scaling, ["nothing besides the type"])
        options: dict[str, Any] = {"rotary_base": base}
        if width != head_dim:
            options["rotary_frequencies"] = _numbers(positions.frequencies(width, base))
            options["rotary_base"] = 10_000.0
        return options
    plain = positions.frequencies(width, base)
    original = int(scaling.pop("original_max_position_embeddings", longest))
    factor = float(scaling.pop("factor", longest / original))
    magnitude = scaling.pop("attention_factor", None)
    texts = original if length is None else length
    if kind == "linear":
        scaled, own = positions.linear(plain, factor), 1.0
    elif kind == "dynamic":
        scaled, own = positions.dynamic_ntk(plain, factor, length=texts, original_length=original), 1.0
    elif kind == "llama3":
        low, high = float(scaling.pop("low_freq_factor", 1.0)), float(scaling.pop("high_freq_factor", 4.0))
        scaled, own = positions.llama3(plain, factor, original_length=original, low=low, high=high), 1.0
    elif kind == "yarn":
        slow, fast = float(scaling.pop("beta_slow", 1.0)), float(scaling.pop("beta_fast", 32.0))
        whole, scales = (
            bool(scaling.pop("truncate", True)),
            [scaling.pop(name, None) for name in ("mscale", "mscale_all_dim")],
        )
        scaled = positions.yarn(plain, factor, original_length=original, slow=slow, fast=fast, whole=whole)
        both = {"mscale": scales[0], "mscale_all_dim": scales[1]} if all(scales) else {}
        own = positions.yarn_magnitude(factor, **both)
    else:
        short, long = scaling.pop("short_factor"), scaling.pop("long_factor")
        scaled = positions.longrope(plain, short, long, length=texts, original_length=original)
        own = positions.longrope_magnitude(factor, original)
    if scaling:
        raise keys.refused("rope_scaling", scaling, ["what belongs to its type"])
    value = own if magnitude is None else float(magnitude)
    if not math.isfinite(value) or value <= 0:
        raise keys.refused("rope_scaling.attention_factor", value, ["a number above 0"])
    return {"rotary_frequencies": _numbers(scaled), "rotary_magnitude": value}


def _numbers(frequencies: Array) -> tuple[float, ...]:
    return tuple(float(one) for one in np.asarray(frequencies))
