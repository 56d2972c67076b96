"""What heads do: look at the token before, at the same word, at what followed it, at the first token, at rare words.

A role is a set of keys that each query ought to look at, and one of two ways to ask for it:

    mass        the share of a query's attention that these keys get
    strongest   whether the key that gets most is one of them

so that every role below takes `measure=mass` or `measure=strongest`, and a role of your own is a boolean array handed
to either. Queries that can see none of the keys are not counted. The baseline of both is a head that looks at all keys
that the query may see alike: the share of them that are wanted.

`visible` is bool, broadcasts to weights [..., T, S], and is True where the query is a real token and may attend to the
key; what depends on a sentence has its axes: with weights [L, B, N, T, S], tokens are handed in as [B, 1, T] and
visible as [B, 1, T, S].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax.statistics import Tally

Ask = Callable[[ArrayLike, ArrayLike, ArrayLike], Tally]


def mass(weights: ArrayLike, wanted: ArrayLike, visible: ArrayLike) -> Tally:
    """The share of attention on wanted keys: Σ_s weight · wanted, summed over the queries that can see one.

    Args:
      weights: attention after the softmax, [..., T, S].
      wanted: bool, broadcasts to [..., T, S].
      visible: bool, broadcasts to [..., T, S].

    Returns:
      Tally with the axes of weights before T; the baseline is uniform attention on the visible keys.

    >>> weights = jnp.array([[1.0, 0.0], [0.75, 0.25]])
    >>> tally = mass(weights, jnp.array([[False, False], [True, False]]), jnp.ones((2, 2), bool))
    >>> float(tally.total), int(tally.count), float(tally.baseline)
    (0.75, 1, 0.5)
    """
    weights = _weights("roles.mass", weights)
    wanted, asked, chance = _wanted(wanted, visible, weights.shape)
    total = jnp.sum(jnp.where(wanted, weights, 0), axis=(-2, -1))
    return Tally(total, asked, chance)


def strongest(weights: ArrayLike, wanted: ArrayLike, visible: ArrayLike) -> Tally:
    """How many queries look most at a wanted key, of those that can see one. Keys that tie for most share the answer.

    Args:
      weights, wanted, visible: as in `mass`.

    Returns:
      Tally with the axes of weights before T; the baseline is chance, a visible key drawn at random.
    """
    weights = _weights("roles.strongest", weights)
    wanted, asked, chance = _wanted(wanted, visible, weights.shape)
    seen = jnp.where(jnp.asarray(visible), weights, -1)
    most = seen == jnp.max(seen, axis=-1, keepdims=True)
    total = jnp.sum(jnp.sum(most & wanted, axis=-1) / jnp.sum(most, axis=-1), axis=-1)
    return Tally(total, asked, chance)


def offset(weights: ArrayLike, visible: ArrayLike, places: int, *, measure: Ask = mass) -> Tally:
    """Attention to the key `places` away: -1 is the token before, 1 the one after, 0 itself (or the diagonal).

    Args:
      weights, visible: as in `mass`; T and S may differ.
      places: index of the key minus index of the query.
      measure: `mass` or `strongest`.

    References:
      Clark et al. 2019, "What Does BERT Look At?", section 3.1; Voita et al. 2019, "Analyzing Multi-Head
      Self-Attention", section 5.1, whose positional heads are those with `strongest` of at least 0.9.
    """
    return measure(weights, _apart(jnp.shape(weights)) == places, visible)


def previous_token(weights: ArrayLike, visible: ArrayLike, *, measure: Ask = mass) -> Tally:
    """Attention to the token before: `offset` of -1."""
    return offset(weights, visible, -1, measure=measure)


def duplicate_token(weights: ArrayLike, visible: ArrayLike, tokens: ArrayLike, *, measure: Ask = mass) -> Tally:
    """Attention to earlier occurrences of the query's own token.

    Args:
      weights, visible: as in `mass`, of a text to itself.
      tokens: integers, broadcast to [..., T].
      measure: `mass` or `strongest`.

    References:
      Wang et al. 2023, "Interpretability in the Wild", section 3.1.
    """
    return measure(weights, _same(tokens, jnp.shape(weights)) & (_apart(jnp.shape(weights)) < 0), visible)


def induction(weights: ArrayLike, visible: ArrayLike, tokens: ArrayLike, *, measure: Ask = mass) -> Tally:
    """Prefix matching: attention to the token after an earlier occurrence of the query's own token.

    With `mass` on the sequences of `repeated_tokens` it is the score of Olsson et al., the sum over earlier repeats.

    Args:
      weights, visible: as in `mass`, of a text to itself.
      tokens: integers, broadcast to [..., T].
      measure: `mass` or `strongest`.

    References:
      Olsson et al. 2022, "In-context Learning and Induction Heads", appendix on head activation evaluators.
    """
    shape = jnp.shape(weights)
    after = jnp.roll(_same(tokens, shape), 1, axis=-1)  # key s follows key s - 1; what comes round is excluded below
    apart = _apart(shape)
    return measure(weights, after & (apart <= 0) & (jnp.arange(shape[-1]) > 0), visible)


def repeated_tokens(
    key: Array,
    vocabulary: int | ArrayLike,
    *,
    sequences: int = 1,
    length: int = 25,
    repeats: int = 4,
    start: int | None = None,
) -> Array:
    """Random tokens repeated, on which no head can know what follows but from what followed before.

    Args:
      key: PRNG key.
      vocabulary: V, for tokens 0 … V - 1, or the tokens to draw from, [V] (without padding and other special ones).
      sequences: how many.
      length: tokens before they repeat. They differ from each other, so that only repeats match.
      repeats: how often they stand there.
      start: a token to stand before them.

    Returns:
      Integers [sequences, length · repeats], one more with `start`.

    Raises:
      ValueError: if there are fewer tokens than `length`.

    >>> repeated_tokens(jax.random.key(0), 31, sequences=3).shape
    (3, 100)

    References:
      Olsson et al. 2022, as in `induction`: 25 tokens 4 times, after a token that starts the sequence.
    """
    words = jnp.arange(vocabulary) if isinstance(vocabulary, int) else jnp.asarray(vocabulary)
    if words.size < length:
        raise ValueError(
            f"roles.repeated_tokens: vocabulary must have at least length={length} tokens, got {words.size}; "
            "take fewer tokens before they repeat."
        )
    draw = lambda key: jax.random.permutation(key, words)[:length]  # noqa: E731
    repeated = jnp.tile(jax.vmap(draw)(jax.random.split(key, sequences)), (1, repeats))
    return repeated if start is None else jnp.pad(repeated, ((0, 0), (1, 0)), constant_values=start)


def sink(weights: ArrayLike, visible: ArrayLike, keys: ArrayLike | None = None, *, measure: Ask = mass) -> Tally:
    """Attention that rests on the first token, or on given ones such as full stops and separators.

    Queries that can see nothing else are counted, in the baseline too.

    Args:
      weights, visible: as in `mass`.
      keys: which tokens, bool, broadcasts to [..., S]. None: the first that any query of the sentence can see.
      measure: `mass` or `strongest`.

    References:
      Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.1; Clark et al. 2019,
      section 3.2.
    """
    if keys is None:
        seen = jnp.any(jnp.asarray(visible), axis=-2)
        keys = jnp.arange(seen.shape[-1]) == jnp.argmax(seen, axis=-1, keepdims=True)
    return measure(weights, jnp.asarray(keys)[..., None, :], visible)


def rare_words(
    weights: ArrayLike, visible: ArrayLike, frequencies: ArrayLike, *, least: int = 1, measure: Ask = strongest
) -> Tally:
    """Attention to the least frequent token that a query can see: in an encoder, of the sentence.

    Args:
      weights, visible: as in `mass`.
      frequencies: of the keys' tokens in the training text, as counts or ranks, broadcast to [..., S].
      least: 2 for one of the two least frequent tokens, and so on. Tokens of the same frequency count all.
      measure: `mass` or `strongest`.

    References:
      Voita et al. 2019, section 5.3.
    """
    frequencies, visible = jnp.asarray(frequencies, jnp.float32)[..., None, :], jnp.asarray(visible)
    seen = jnp.where(visible, frequencies, jnp.inf)
    return measure(weights, frequencies <= jnp.sort(seen, axis=-1)[..., least - 1, None], visible)


class Relation(NamedTuple):
    """Whether a head follows a relation, and what fixed offsets reach.

    Attributes:
      tally: hits of the head; its baseline is the offset that is best on the sentences of this call.
      by_offset: hits of every offset, [..., O], with the axes of gold before T.
    """

    tally: Tally
    by_offset: Array


def relation(
    weights: ArrayLike, gold: ArrayLike, visible: ArrayLike, *, offsets: Sequence[int] = range(-8, 9)
) -> Relation:
    """How many queries look most at a right key, such as a verb at its subject, of those that can see one.

    The baseline looks always the same number of tokens away. It was chosen on the sentences it is reported on, which
    flatters it; to choose on some and report on others, or over several batches:

        found = relation(…)                        # of every batch, concatenated over sentences
        best = best_offset(found.by_offset[half])
        tally = against_offset(found, best)

    Args:
      weights, visible: as in `mass`.
      gold: bool, broadcasts to [..., T, S]: the keys that would be right; none for queries without the relation.
      offsets: index of the key minus index of the query, those to choose from.

    References:
      Clark et al. 2019, section 4.2; Voita et al. 2019, section 5.2.
    """
    tally = strongest(weights, gold, visible)
    right = jnp.asarray(gold) & jnp.asarray(visible)
    apart = _apart(jnp.shape(weights))
    by_offset = jnp.stack([jnp.sum(right & (apart == places), axis=(-2, -1)) for places in offsets], axis=-1)
    found = Relation(tally, by_offset)
    return found._replace(tally=against_offset(found, best_offset(by_offset)))


def best_offset(by_offset: ArrayLike) -> Array:
    """Index of the offset with most hits over all axes but the last of [..., O]."""
    by_offset = jnp.asarray(by_offset)
    return jnp.argmax(jnp.sum(by_offset.reshape(-1, by_offset.shape[-1]), axis=0))


def against_offset(found: Relation, index: ArrayLike) -> Tally:
    """The tally of a relation with the hits of one offset, given by its index, for baseline."""
    return found.tally._replace(baseline=jnp.take(jnp.asarray(found.by_offset), index, axis=-1))


def _weights(name: str, weights: ArrayLike) -> Array:
    weights = jnp.asarray(weights)
    if weights.ndim < 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"{name}: weights must be attention after the softmax, floating point [..., T, S], "
            f"got {weights.dtype} {weights.shape}."
        )
    return weights


def _wanted(wanted: ArrayLike, visible: ArrayLike, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Wanted keys that can be seen [..., T, S]; how many queries see one, and what uniform attention gives, [...]."""
    wanted, visible = jnp.asarray(wanted), jnp.asarray(visible)
    for name, array in (("visible", visible), ("wanted keys", wanted)):
        if array.dtype != bool or not _fits(array.shape, shape):
            raise ValueError(
                f"roles: {name} must be bool and broadcast to weights [..., T, S] = {shape}, "
                f"got {array.dtype} {array.shape}; put axes of 1 where they are shared, as in visible[:, None]."
            )
    wanted, visible = (jnp.broadcast_to(a, (*a.shape[:-2], *shape[-2:])) for a in (wanted, visible))
    wanted = wanted & visible
    share = jnp.sum(wanted, axis=-1) / jnp.maximum(jnp.sum(visible, axis=-1), 1)
    return wanted, jnp.sum(jnp.any(wanted, axis=-1), axis=-1), jnp.sum(share, axis=-1)


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the whole."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(have in (1, want) for have, want in pairs)


def _apart(shape: tuple[int, ...]) -> Array:
    """Index of the key minus index of the query, [T, S]."""
    return jnp.arange(shape[-1]) - jnp.arange(shape[-2])[:, None]


def _same(tokens: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Which key has the token of which query, [..., T, T]."""
    tokens = jnp.asarray(tokens)
    if tokens.shape[-1:] != shape[-1:] or shape[-1] != shape[-2]:
        raise ValueError(
            f"roles: tokens must be [..., T] of weights [..., T, T] of a text to itself, got tokens {tokens.shape} "
            f"and weights {shape}."
        )
    return tokens[..., :, None] == tokens[..., None, :]
