"""Where a token stands: functions that are handed to attention or added to embeddings.

Rotary positions turn pairs of channels by angles; how fast each pair turns are its frequencies, an array that may be
made for longer texts than a model was trained on before it is handed over:

    slow = positions.llama3(positions.frequencies(128, 500_000.0), 8.0, original_length=8192)
    y = attention.apply(params, x, config, rotate=functools.partial(positions.rotary, frequencies=slow))

    rotary, rotary_interleaved     pairs are (i, i + H/2), or neighbours
    frequencies                    one for every pair; fewer than H/2 turn the first channels only (partial rotary)
    linear, ntk, dynamic_ntk, yarn, llama3, longrope   frequencies made slower
    yarn_magnitude, longrope_magnitude   the factor of queries and keys that goes with two of them
    sinusoids                      vectors to be added to embeddings

A model's `rope_scaling` (Hugging Face) says which: `rope_type` is the name ("dynamic" is `dynamic_ntk`), `factor` the
factor, `original_max_position_embeddings` the original_length; an `attention_factor` that is given is the magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments


def rotary(
    x: Array, positions: Array, *, base: float | None = None, frequencies: Array | None = None, magnitude: float = 1.0
) -> Array:
    """Turn queries or keys by an angle that grows with their position, so that logits depend on distance only.

    Channel pairs (i, i + H/2) are turned by `position · base^(-2i/H)`: the halves convention of Llama and GPT-NeoX.
    Give it to attention as it is, `rotate=positions.rotary`, or with another base or frequencies through
    `functools.partial`. With R frequencies the first 2R channels are turned, in pairs (i, i + R), and the others left.

    Args:
      x: [..., T, H].
      positions: [T] or [..., T], in tokens.
      base: the longest wavelength is 2π · base tokens; 10,000 if None.
      frequencies: [R], radians per token of each pair, R at most H/2, instead of the base. None: H/2 from the base.
      magnitude: factor of the turned channels, such as `yarn_magnitude`.

    Returns:
      [..., T, H] in the dtype of x; the angles are computed in float32.

    Raises:
      ValueError: if H is odd and no frequencies are given, there are more of them than pairs, or a base as well.

    References:
      Su et al. 2021, "RoFormer", section 3.2.2 (which pairs neighbouring channels instead of halves).
    """
    angles = _angles("rotary", x, positions, base, frequencies)
    turned, rest = _split(x, 2 * angles.shape[-1])
    first, second = jnp.split(turned, 2, axis=-1)
    return _joined(_turn(first, second, angles, magnitude), rest, x)


def rotary_interleaved(
    x: Array, positions: Array, *, base: float | None = None, frequencies: Array | None = None, magnitude: float = 1.0
) -> Array:
    """`rotary` of neighbouring channels, pairs (2i, 2i + 1): the convention of RoFormer and GPT-J.

    Args:
      x, positions, base, frequencies, magnitude: as in `rotary`.

    Returns:
      [..., T, H] in the dtype of x.

    Raises:
      ValueError: as `rotary`.

    References:
      Su et al. 2021, "RoFormer", section 3.2.2.
    """
    angles = _angles("rotary_interleaved", x, positions, base, frequencies)
    turned, rest = _split(x, 2 * angles.shape[-1])
    pairs = _turn(turned[..., ::2], turned[..., 1::2], angles, magnitude)
    return _joined((jnp.stack(pairs, axis=-1).reshape(turned.shape),), rest, x)


def frequencies(width: int, base: float = 10_000.0) -> Array:
    """How fast each pair of channels turns, base^(-2i/width), in radians per token.

    Args:
      width: channels that are turned, even: H, or fewer for a partial rotary.
      base: the slowest pair takes nearly 2π · base tokens for a turn.

    Returns:
      float32 [width/2], falling.

    Raises:
      ValueError: if the width is odd.

    >>> [round(float(one), 3) for one in frequencies(6, base=1000.0)]
    [1.0, 0.1, 0.01]
    """
    arguments.integer("positions.frequencies", "width", width)
    arguments.above_zero("positions.frequencies", "base", base)
    if width % 2:
        raise ValueError(f"positions.frequencies: width must be even to form pairs, got {width}.")
    return 1 / _wavelengths(width, base)


def linear(frequencies: Array, factor: ArrayLike) -> Array:
    """Position interpolation: all pairs turn `factor` times slower, as if the text were so much shorter.

    References:
      Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation", section 2.3.
    """
    arguments.above_zero("positions.linear", "factor", factor)
    return frequencies / factor


def ntk(frequencies: Array, factor: ArrayLike) -> Array:
    """The slowest pair turns `factor` times slower, the fastest as before, the others in between.

    Pair i of R by factor^(i/(R−1)): the same as the base times factor^(H/(H−2)).

    Raises:
      ValueError: for one frequency, which would be both.

    References:
      Peng et al. 2023, "YaRN", section 3.1, definition 1 ("NTK-aware"; their s is our factor).
    """
    pairs = frequencies.shape[-1]
    if pairs < 2:
        raise ValueError(f"positions.ntk: there must be at least 2 frequencies, got {pairs}.")
    arguments.above_zero("positions.ntk", "factor", factor)
    return frequencies / factor ** (jnp.arange(pairs) / (pairs - 1))


def dynamic_ntk(frequencies: Array, factor: ArrayLike, *, length: ArrayLike, original_length: int) -> Array:
    """`ntk` that grows with the text, by factor · length/original_length − (factor − 1); nothing up to that length.

    Keys in a cache were turned with the frequencies of their time: turn all again, or keep to one length.

    Args:
      frequencies: [R].
      factor: how steeply; 1 makes the text as long as the original.
      length: tokens of the text now; may be traced.
      original_length: tokens of the texts that the model was trained on.

    References:
      Peng et al. 2023, "YaRN", section 3.3 (factor 1); the factor is that of Hugging Face's "dynamic".
    """
    _check_scaling("dynamic_ntk", factor, original_length)
    longer = jnp.maximum(jnp.asarray(length) / original_length, 1)
    return ntk(frequencies, factor * longer - (factor - 1))


def yarn(
    frequencies: Array,
    factor: ArrayLike,
    *,
    original_length: int,
    slow: float = 1.0,
    fast: float = 32.0,
    whole: bool = True,
) -> Array:
    """YaRN's "NTK-by-parts": fast pairs as they are, slow ones `factor` times slower, between them by their index.

    A pair is fast if it makes at least `fast` turns in the original length, slow if at most `slow`. Its other half is
    the temperature: give `magnitude=yarn_magnitude(factor)` to `rotary`.

    The authors' code and the models trained with it let the index of the pair decide in between, as here. The paper's
    formula goes by the number of turns instead; that is `llama3(frequencies, factor, low=1, high=32, …)`.

    Args:
      frequencies: [R], falling by one ratio, as from `frequencies`.
      factor: length now / original length.
      original_length: tokens of the texts that the model was trained on.
      slow, fast: turns; the paper's α and β (`beta_slow`, `beta_fast`).
      whole: widen the range to whole indices, as the authors' code; gpt-oss does not (`truncate`).

    Raises:
      ValueError: for one frequency, from which no ratio can be had.

    References:
      Peng et al. 2023, "YaRN", sections 3.2 and 3.4.
    """
    pairs = frequencies.shape[-1]
    if pairs < 2:
        raise ValueError(f"positions.yarn: there must be at least 2 frequencies, got {pairs}.")
    _check_scaling("yarn", factor, original_length)
    if not 0 < slow < fast:
        raise ValueError(f"positions.yarn: slow must be above 0 and below fast, got slow={slow} and fast={fast}.")
    logs = jnp.log(frequencies)
    step = (logs[0] - logs[-1]) / (pairs - 1)
    index = lambda turns: (logs[0] - math.log(2 * math.pi * turns / original_length)) / step  # noqa: E731
    first, last = index(fast), index(slow)
    if whole:
        first, last = jnp.floor(first), jnp.ceil(last)
    first, last = jnp.maximum(first, 0), jnp.minimum(last, 2 * pairs - 1)
    share = jnp.clip((jnp.arange(pairs) - first) / jnp.maximum(last - first, 1e-3), 0, 1)
    return frequencies * (1 - share + share / factor)


def yarn_magnitude(factor: float, *, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """YaRN's temperature as `rotary` takes it: √(1/t) = 0.1 · ln(factor) + 1, a factor of queries and keys alike.

    Logits of turned channels grow by its square, 1/t. With all channels turned, the same as a `scale` of the products.
    DeepSeek's models turn few channels and divide: (0.1 · mscale · ln(factor) + 1) / (0.1 · mscale_all_dim · ln(factor)
    + 1), and multiply the scale of *all* products by the square of the divisor, `yarn_magnitude(factor,
    mscale=mscale_all_dim)`, themselves.

    Args:
      factor: length now / original length; 1 and less give 1.
      mscale, mscale_all_dim: of a DeepSeek model, both above 0. Where its config has none or one of the two, leave both
        out, as Hugging Face does.

    Raises:
      ValueError: if one of the two is negative.

    >>> round(yarn_magnitude(4.0), 4), round(yarn_magnitude(40.0, mscale=1.0, mscale_all_dim=0.8), 4)
    (1.1386, 1.057)

    References:
      Peng et al. 2023, "YaRN", section 3.4 (their s is our factor). DeepSeek-AI 2024, "DeepSeek-V2", section 3.1.4; the
      quotient is in the authors' code.
    """
    if min(mscale, mscale_all_dim) < 0:
        raise ValueError(
            f"positions.yarn_magnitude: mscale and mscale_all_dim must not be negative, got {mscale} and "
            f"{mscale_all_dim}."
        )
    grown = math.log(factor) if factor > 1 else 0.0
    return (0.1 * mscale * grown + 1) / (0.1 * mscale_all_dim * grown + 1)


def longrope(
    frequencies: Array,
    short_factor: ArrayLike | Sequence[float],
    long_factor: ArrayLike | Sequence[float],
    *,
    length: ArrayLike,
    original_length: int,
) -> Array:
    """LongRoPE: every pair turns slower by a factor of its own, found by search; one list for longer texts.

    Its other half is a magnitude: give `magnitude=longrope_magnitude(factor, original_length)` to `rotary`, for short
    texts too. Keys in a cache were turned with the frequencies of their time: turn all again, or keep to one list.

    Args:
      frequencies: [R].
      short_factor: [R], for texts up to the original length.
      long_factor: [R], for longer ones.
      length: tokens of the text now; may be traced.
      original_length: tokens of the texts that the model was trained on.

    Raises:
      ValueError: if a list has not one factor for every frequency.

    References:
      Ding et al. 2024, "LongRoPE", sections 3.1 and 3.3 (their λ̂ are our factors, their n̂ is 0; the second list
      recovers short texts). As in Phi-3: Abdin et al. 2024, "Phi-3 Technical Report", section 2.
    """
    short, long = (jnp.asarray(factors, jnp.float32) for factors in (short_factor, long_factor))
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if factors.shape != frequencies.shape:
            raise ValueError(
                f"positions.longrope: {name} must be [R] = {frequencies.shape}, one for every frequency, got "
                f"{factors.shape}."
            )
    for name, factors in (("short_factor", short), ("long_factor", long)):
        arguments.above_zero("positions.longrope", name, factors)
    arguments.above_zero("positions.longrope", "original_length", original_length)
    return frequencies / jnp.where(jnp.asarray(length) > original_length, long, short)


def longrope_magnitude(factor: float, original_length: int) -> float:
    """LongRoPE's factor of queries and keys for `rotary`: √(1 + ln(factor) / ln(original_length)).

    Args:
      factor: the longest text that the model is for / original length; 1 and less give 1.
      original_length: tokens of the texts that the model was trained on.

    >>> round(longrope_magnitude(32.0, 4096), 4)
    1.1902

    References:
      Ding et al. 2024, "LongRoPE", in the authors' code; as in Phi-3.
    """
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


def llama3(
    frequencies: Array, factor: ArrayLike, *, original_length: int, low: float = 1.0, high: float = 4.0
) -> Array:
    """Llama 3.1: fast pairs as they are, slow ones `factor` times slower, between them by their number of turns.

    Args:
      frequencies: [R].
      factor: 8 for Llama 3.1.
      original_length: tokens of the texts that the model was trained on.
      low: pairs with fewer turns in the original length are slow (its low_freq_factor).
      high: pairs with more turns are fast (its high_freq_factor); above low.

    Raises:
      ValueError: if high is not above low.

    References:
      Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.4.2; the formula is in the authors' code.
    """
    _check_scaling("llama3", factor, original_length)
    if high <= low:
        raise ValueError(f"positions.llama3: high must be above low, got low={low} and high={high}.")
    turns = frequencies * (original_length / (2 * math.pi))
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def _check_scaling(who: str, factor: ArrayLike, original_length: ArrayLike) -> None:
    arguments.above_zero(f"positions.{who}", "factor", factor)
    arguments.above_zero(f"positions.{who}", "original_length", original_length)


def _wavelengths(width: int, base: float) -> Array:
    """Tokens per radian of every pair."""
    return base ** (jnp.arange(width // 2, dtype=jnp.float32) * (2 / width))


def _angles(function: str, x: Array, positions: Array, base: float | None, frequencies: Array | None) -> Array:
    """Of every token and pair, float32 [..., T, R]."""
    width, places = x.shape[-1], positions[..., None].astype(jnp.float32)
    if frequencies is None:
        if width % 2:
            raise ValueError(f"positions.{function}: H must be even to form pairs, got H={width}; change head_dim.")
        if base is not None:
            arguments.above_zero(f"positions.{function}", "base", base)
        return places / _wavelengths(width, 10_000.0 if base is None else base)
    if base is not None:
        raise ValueError(
            f"positions.{function}: base={base} and frequencies exclude each other; give "
            f"frequencies=positions.frequencies({2 * frequencies.shape[-1]}, {base})."
        )
    if frequencies.ndim != 1 or 2 * frequencies.shape[0] > width:
        raise ValueError(
            f"positions.{function}: frequencies must be [R] with R at most H/2 = {width // 2}, one for every pair of "
            f"channels, got {frequencies.shape}; H={width} is head_dim."
        )
    return places * frequencies.astype(jnp.float32)


def _split(x: Array, turned: int) -> tuple[Array, Array | None]:
    """Channels that are turned, at least float32, and the others; None: there are none."""
    wide = x[..., :turned].astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide, x[..., turned:] if turned < x.shape[-1] else None


def _turn(first: Array, second: Array, angles: Array, magnitude: float) -> tuple[Array, Array]:
    cos, sin = jnp.cos(angles).astype(first.dtype), jnp.sin(angles).astype(first.dtype)
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    return first * cos - second * sin, second * cos + first * sin


def _joined(turned: tuple[Array, ...], rest: Array | None, x: Array) -> Array:
    parts = [part.astype(x.dtype) for part in turned]
    return jnp.concatenate(parts if rest is None else [*parts, rest], axis=-1)


def sinusoids(positions: Array, width: int, *, base: float = 10_000.0) -> Array:
    """A fixed vector for every position, to be added to embeddings.

    Args:
      positions: [...], in tokens.
      width: D, even; the first half are sines, the second cosines of the same angles.
      base: the longest wavelength is 2π · base tokens.

    Returns:
      float32 [..., D].

    Raises:
      ValueError: if the width is odd.

    References:
      Vaswani et al. 2017, section 3.5 (which interleaves sines and cosines; the order of channels is immaterial).
    """
    if width % 2:
        raise ValueError(f"positions.sinusoids: width must be even, got {width}; change d_model.")
    wavelengths = base ** (jnp.arange(width // 2, dtype=jnp.float32) * (2 / width))
    angles = positions[..., None].astype(jnp.float32) / wavelengths
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
