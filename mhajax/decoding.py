"""Text out of a model that predicts the next token. It knows no model, only a step:

    step(tokens [B], cache) → (logits [B, V], cache)

All functions can be jitted; lengths are static, texts that end early are filled up with the token that ends them.

A cache that has no room left gives logits of NaN under jit, of which no token means anything: make it for as many
tokens as are seen and made, and ask `cache.overflowed` where that is not sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import arguments

Cache = Any
Step = Callable[[Array, Cache], tuple[Array, Cache]]
Choose = Callable[[Array, Array], Array]
COLDEST, HOTTEST = 1e-30, 1e30  # temperatures by which logits can be divided in float32
_LARGEST_LOG = 80.0  # e^80 and e^-80 are normal numbers of float32


def greedy(logits: Array, key: Array) -> Array:
    """The most likely token; [B, V] to [B]. The key is not used."""
    del key
    return jnp.argmax(logits, axis=-1)


def sampler(*, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Choose:
    """A function (logits [B, V], key) → tokens [B] that draws at random.

    Args:
      temperature: logits are divided by it; towards 0 it becomes greedy. 1e-30 to 1e30.
      top_k: only the k most likely tokens; None is all.
      top_p: only the most likely tokens that together have at least this probability (after the temperature).

    Raises:
      ValueError: if an argument is out of range.

    References:
      Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p); Fan et al. 2018 (top-k).
    """
    if not COLDEST <= temperature <= HOTTEST or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"decoding.sampler: temperature must be in [{COLDEST}, {HOTTEST}], top_p in (0, 1], top_k at least 1 or "
            f"None, got temperature={temperature}, top_p={top_p}, top_k={top_k}; for temperature 0 use decoding.greedy."
        )

    def choose(logits: Array, key: Array) -> Array:
        logits = logits / temperature
        if top_k is not None and top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if top_p < 1:
            falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
            probability = jax.nn.softmax(falling, axis=-1)
            needed = jnp.cumsum(probability, axis=-1) - probability < top_p  # the mass before it is not yet enough
            least = jnp.min(jnp.where(needed, falling, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1)

    return choose


def generate(
    step: Step, cache: Cache, first: Array, choose: Choose, key: Array, *, length: int, end: int | None = None
) -> Array:
    """Token after token.

    Args:
      step: the model.
      cache: what it has seen before `first`.
      first: the tokens to go on from, [B].
      choose: `greedy`, a `sampler(…)`, or any function (logits [B, V], key) → tokens [B].
      key: PRNG key.
      length: tokens to make.
      end: the token after which a text is over; None: never.

    Returns:
      Tokens [B, length]; after `end` only `end`. Stops early when all texts are over.

    Raises:
      TypeError, ValueError: for an argument of another kind, or out of range.
    """
    arguments.integer("decoding.generate", "length", length, least=0)
    arguments.key("decoding.generate", key)
    _check_first("generate", first)
    if choose is sampler:
        raise TypeError("decoding.generate: choose must be what sampler(…) returns, got the function itself; call it.")
    arguments.function("decoding.generate", "choose", choose, "(logits, key) → tokens", "decoding.greedy or sampler(…)")
    tokens = jnp.zeros((first.shape[0], length), first.dtype) if end is None else jnp.full(
        (first.shape[0], length), end, first.dtype
    )  # fmt: skip
    if length == 0:
        return tokens

    def unfinished(state: tuple) -> Array:
        t, _, _, over, _ = state
        return (t < length) & ~jnp.all(over)

    def one_more(state: tuple) -> tuple:
        t, last, cache, over, tokens = state
        logits, cache = step(last, cache)
        _check_end("generate", end, logits)
        token = choose(logits, jax.random.fold_in(key, t)).astype(first.dtype)
        if end is not None:
            token = jnp.where(over, end, token)
            over = over | (token == end)
        return t + 1, token, cache, over, tokens.at[:, t].set(token)

    start = (jnp.int32(0), first, cache, jnp.zeros(first.shape, bool), tokens)
    return jax.lax.while_loop(unfinished, one_more, start)[-1]


def _check_first(who: str, first: Array) -> None:
    """Raise unless the tokens to go on from are [B], at least one."""
    if not hasattr(first, "dtype") or not jnp.issubdtype(first.dtype, jnp.integer):
        raise TypeError(
            f"decoding.{who}: first must be integers [B], got {arguments.kind_of(first)}; write jnp.array([token])."
        )
    if first.ndim != 1 or not first.size:
        raise ValueError(f"decoding.{who}: first must be [B] with B at least 1, got {first.shape}.")


def _check_end(who: str, end: int | None, logits: Array) -> None:
    """Raise a ValueError for an end that no text can have."""
    if end is not None:
        arguments.below(f"decoding.{who}", "end", end, logits.shape[-1], "tokens in the vocabulary, V")


class Beam(NamedTuple):
    """The k best texts of every example, best first."""

    tokens: Array  # [B, k, length], after the end only the end
    scores: Array  # [B, k], log-probability / length penalty; -inf where fewer than k were found


def beam_search(
    step: Step,
    select: Callable[[Cache, Array], Cache],
    cache: Cache,
    first: Array,
    *,
    beams: int,
    length: int,
    end: int,
    length_penalty: float = 1.0,
) -> Beam:
    """The most likely texts, as far as k alternatives at a time can tell.

    Texts that are over are ranked by log-probability / ((5 + number of tokens) / 6)^length_penalty. An example stops
    when no text under way can still beat its k finished ones.

    One beam is not `greedy`: the likeliest token that does not end the text is followed even where the end is likelier,
    and the best of the texts that could have ended on the way wins. For greedy texts: `generate(…, greedy, …)`.

    Args:
      step: the model, for B·k rows: the k texts of an example are neighbours.
      select: (cache, rows [B·k]) → the cache of those rows; rows move only among the k of one example.
      cache: of B·k rows (every example repeated k times), what was seen before `first`.
      first: the tokens to go on from, [B].
      beams: k.
      length: longest text, the end included; what is not over by then counts as over.
      end: the token after which a text is over.
      length_penalty: 0 prefers short texts, 1 is about neutral; below 0 short texts are preferred even more.

    Raises:
      TypeError, ValueError: for an argument of another kind, or out of range.

    References:
      Wu et al. 2016, "Google's Neural Machine Translation System", section 7 (length normalisation).
    """
    arguments.integer("decoding.beam_search", "beams", beams)
    arguments.integer("decoding.beam_search", "length", length)
    _check_first("beam_search", first)
    if arguments.known(length_penalty):
        if not isinstance(length_penalty, int | float | np.number | Array) or jnp.ndim(length_penalty):
            raise TypeError(
                f"decoding.beam_search: length_penalty must be a number, got {arguments.kind_of(length_penalty)}."
            )
        if not math.isfinite(length_penalty):
            raise ValueError(f"decoding.beam_search: length_penalty must be finite, got {length_penalty}.")
        # The largest of all penalties and its inverse are divided by: in float32 both must be there.
        if abs(float(length_penalty)) * math.log((5 + length) / 6) > _LARGEST_LOG:
            raise ValueError(
                "decoding.beam_search: ((5 + length) / 6)^length_penalty must be a float32, got "
                f"length_penalty={length_penalty} and length={length}; give one nearer to 0."
            )
    batch = first.shape[0]
    penalty = lambda count: ((5.0 + count) / 6.0) ** length_penalty  # noqa: E731
    pick = partial(jnp.take_along_axis, axis=1)

    def unfinished(state: tuple) -> Array:
        t, _, _, alive_scores, _, done_scores, _ = state
        # Log-probabilities only fall, so the best that can still come is what there is by the largest penalty: that of
        # the longest text or, where penalties fall, of the next token.
        hope = alive_scores[:, 0] / jnp.maximum(penalty(length), penalty(t + 1.0))
        return (t < length) & jnp.any(hope > done_scores[:, -1])

    def one_more(state: tuple) -> tuple:
        t, last, alive, alive_scores, done, done_scores, cache = state
        logits, cache = step(last.reshape(-1), cache)
        vocabulary = logits.shape[-1]
        _check_end("beam_search", end, logits)
        if vocabulary < 2:
            raise ValueError(
                f"decoding.beam_search: the step must give logits [B·k, V] with V at least 2, got {logits.shape}."
            )
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, vocabulary)
        scores = (alive_scores[..., None] + log_p).reshape(batch, -1)
        # 2k candidates hold at least k that are not over, because each text has one continuation that ends it.
        scores, places = jax.lax.top_k(scores, 2 * beams)
        parents, tokens = places // vocabulary, (places % vocabulary).astype(first.dtype)
        texts = pick(alive, parents[..., None]).at[:, :, t].set(tokens)
        over = (tokens == end) | (t == length - 1)

        alive_scores, chosen = jax.lax.top_k(jnp.where(over, -jnp.inf, scores), beams)
        rows = jnp.arange(batch)[:, None] * beams + pick(parents, chosen)
        ended = jnp.where(over, scores / penalty(t + 1.0), -jnp.inf)
        done_scores, best = jax.lax.top_k(jnp.concatenate([done_scores, ended], axis=1), beams)
        done = pick(jnp.concatenate([done, texts], axis=1), best[..., None])
        return (
            t + 1, pick(tokens, chosen), pick(texts, chosen[..., None]), alive_scores,
            done, done_scores, select(cache, rows.reshape(-1)),
        )  # fmt: skip

    texts = jnp.full((batch, beams, length), end, first.dtype)
    alive_scores = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (batch, beams))
    start = (
        jnp.int32(0), jnp.broadcast_to(first[:, None], (batch, beams)), texts, alive_scores,
        texts, jnp.full((batch, beams), -jnp.inf), cache,
    )  # fmt: skip
    *_, done, done_scores, _ = jax.lax.while_loop(unfinished, one_more, start)
    return Beam(done, done_scores)
