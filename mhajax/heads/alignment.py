"""From attention to links between words: what it adds up to over layers, how much it weighs, which words it aligns.

To align words with the cross attention of a translator, of which row t reads target word t - 1 (row 0 the beginning)
and writes target word t:

    rows = at_input(weights)                          # or at_output: the row that writes the word
    rows = to_words(rows, target_words, source_words, …)      # if words are split into several tokens
    tally = error_rate(links(rows, visible), sure, possible, visible=visible)
    statistics.estimate(tally, axis=…)                # the alignment error rate, with interval and baseline
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax.statistics import Tally


def rollout(weights: ArrayLike, *, residual: float = 0.5) -> Array:
    """How much of every input token is in every output of every layer, if attention were all: A_l A_{l-1} … A_1.

    A = (1 - residual) · (mean of the heads' weights) + residual · I. It is a pattern like the weights: roles, distance
    and the error rate can be measured on it.

    Args:
      weights: of layers over a text to itself, [L, ..., N, T, T].
      residual: share of what goes past the attention.

    Returns:
      [L, ..., T, T]; the last layer is the whole. Rows sum to 1; a token that attends to nothing stays itself.

    References:
      Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    weights = _weights("rollout", weights, 4)
    if weights.shape[-1] != weights.shape[-2]:
        raise ValueError(
            f"alignment.rollout: weights must be of a text to itself, [L, ..., T, T], got {weights.shape}."
        )
    eye = jnp.eye(weights.shape[-1], dtype=weights.dtype)
    mixed = (1 - residual) * jnp.mean(weights, axis=-3) + residual * eye
    whole = jnp.sum(mixed, axis=-1, keepdims=True)
    mixed = jnp.where(whole > 0, mixed / jnp.where(whole > 0, whole, 1), eye)

    def one_layer(below: Array, layer: Array) -> tuple[Array, Array]:
        above = jnp.matmul(layer, below, precision=jax.lax.Precision.HIGHEST)
        return above, above

    return jax.lax.scan(one_layer, jnp.broadcast_to(eye, mixed.shape[1:]), mixed)[1]


def norm_weighted(weights: ArrayLike, values: ArrayLike, w_o: ArrayLike) -> Array:
    """How much each key adds to the output of a head: ‖weight · value w_o‖ instead of the weight.

    Args:
      weights: [..., N, T, S].
      values: [..., N, S, Hv]; or K heads, each shared by N/K, as they are captured.
      w_o: [N, Hv, D], or with axes in front that broadcast: w_o[:, None] for weights [L, B, N, T, S].

    Returns:
      [..., N, T, S]; rows do not sum to 1.

    References:
      Kobayashi et al. 2020, "Attention is Not Only a Weight", section 3.2.
    """
    weights, written = _written("norm_weighted", weights, values, w_o)
    return weights * jnp.linalg.norm(written, axis=-1)[..., None, :]


def norm_weighted_sum(weights: ArrayLike, values: ArrayLike, w_o: ArrayLike) -> Array:
    """How much each key adds to the output of all heads together: ‖Σ_n weight_n · value_n w_o[n]‖.

    Args:
      weights, values, w_o: as in `norm_weighted`.

    Returns:
      [..., T, S].

    References:
      Kobayashi et al. 2020, section 3.2 and appendix A.
    """
    weights, written = _written("norm_weighted_sum", weights, values, w_o)

    def one_query(weights: Array) -> Array:
        """[..., N, S] to [..., S], so that [T, S, D] is never held."""
        added = jnp.einsum("...ns,...nsd->...sd", weights, written, precision=jax.lax.Precision.HIGHEST)
        return jnp.linalg.norm(added, axis=-1)

    return jnp.moveaxis(jax.lax.map(one_query, jnp.moveaxis(weights, -2, 0)), 0, -2)


def at_output(weights: ArrayLike) -> Array:
    """The rows that write target words 0, 1, … (AWO): [..., T, S] of a decoder to [..., T - 1, S] of words.

    References:
      Kobayashi et al. 2020, section 5; the "naive" reading of Chen et al. 2020, "Accurate Word Alignment Induction
      from Neural Machine Translation", section 3.
    """
    return _weights("at_output", weights, 2)[..., :-1, :]


def at_input(weights: ArrayLike) -> Array:
    """The rows that read target words 0, 1, … (AWI), one later: [..., T, S] of a decoder to [..., T - 1, S] of words.

    References:
      Chen et al. 2020, section 3 ("Shift-Att"); Kobayashi et al. 2020, section 5.
    """
    return _weights("at_input", weights, 2)[..., 1:, :]


def to_words(
    weights: ArrayLike, query_words: ArrayLike, key_words: ArrayLike, *, num_queries: int, num_keys: int
) -> Array:
    """Attention between tokens as attention between words: to a split word summed, from a split word averaged.

    Args:
      weights: [..., T, S].
      query_words: which word each query is a part of, integers, broadcast to [..., T]; -1 for none.
      key_words: likewise for keys, [..., S]; what goes to none is left out.
      num_queries: words that ask; a number, as it is a shape.
      num_keys: words that are asked.

    Returns:
      [..., num_queries, num_keys]; zeros for a word without tokens.

    References:
      Clark et al. 2019, "What Does BERT Look At?", section 4.1.
    """
    weights, query_words, key_words = _weights("to_words", weights, 2), jnp.asarray(query_words), jnp.asarray(key_words)
    for name, words, size in (("query_words", query_words, -2), ("key_words", key_words, -1)):
        if words.shape[-1:] != (weights.shape[size],):
            raise ValueError(
                f"alignment.to_words: {name} must have a number for each of {weights.shape[size]} tokens, "
                f"got {words.shape}."
            )
    parts = query_words[..., None, :] == jnp.arange(num_queries)[:, None]  # [..., words, T]
    mean = parts / jnp.maximum(jnp.sum(parts, axis=-1, keepdims=True), 1)
    into = key_words[..., :, None] == jnp.arange(num_keys)  # [..., S, words]
    precise = jax.lax.Precision.HIGHEST
    return jnp.matmul(jnp.matmul(mean, weights, precision=precise), into.astype(weights.dtype), precision=precise)


def links(weights: ArrayLike, visible: ArrayLike) -> Array:
    """One link for every target word: to the source word that it looks at most (the first, of several).

    For one link per source word swap the last two axes before and after; `&` and `|` of both are the usual ways to
    make them symmetric.

    Args:
      weights: or `norm_weighted`, [..., T, S].
      visible: bool, broadcasts to [..., T, S]: both are words of the sentence.

    Returns:
      bool [..., T, S]; none where nothing is visible.
    """
    weights, visible = _weights("links", weights, 2), jnp.asarray(visible)
    best = jnp.argmax(jnp.where(visible, weights, -jnp.inf), axis=-1, keepdims=True)
    return (jnp.arange(weights.shape[-1]) == best) & visible


def links_above(weights: ArrayLike, visible: ArrayLike, threshold: float) -> Array:
    """A link wherever the weight is above a threshold: none, one or many for a word.

    Args:
      weights, visible: as in `links`.
      threshold: between 0 and 1 for attention weights.

    Returns:
      bool [..., T, S].
    """
    return (_weights("links_above", weights, 2) > threshold) & jnp.asarray(visible)


def diagonal(visible: ArrayLike) -> Array:
    """One link for every target word: to the source word at the same part of the sentence. A baseline of `error_rate`.

    Args:
      visible: bool [..., T, S], real words × real words.

    Returns:
      bool [..., T, S]: of t targets and s sources, word i has word floor((i + 1/2) s / t).
    """
    visible = jnp.asarray(visible)
    targets, sources = jnp.any(visible, axis=-1), jnp.any(visible, axis=-2)
    counts = jnp.maximum(jnp.sum(targets, axis=-1, keepdims=True), 1), jnp.sum(sources, axis=-1, keepdims=True)
    place = jnp.cumsum(targets, axis=-1) - 1
    wanted = (2 * place + 1) * counts[1] // (2 * counts[0])  # [..., T]
    return (wanted[..., :, None] == (jnp.cumsum(sources, axis=-1) - 1)[..., None, :]) & visible


def shuffled(weights: ArrayLike, visible: ArrayLike, *, axis: int) -> Array:
    """One link for every target word, read from another sentence. A baseline of `error_rate`: no word is looked at.

    Sentence i has the weights of sentence i - 1, at keys that it has. (To run the model on another sentence's source
    and read the links from that is the other way; hand those weights to `links`.)

    Args:
      weights, visible: as in `links`.
      axis: of weights that is the sentences, such as -4 for [L, B, N, T, S].

    Returns:
      bool [..., T, S]. Where the other sentence is over, the first word is linked.
    """
    return links(jnp.roll(_weights("shuffled", weights, 3), 1, axis=axis), visible)


def error_rate(
    predicted: ArrayLike,
    sure: ArrayLike,
    possible: ArrayLike | None = None,
    *,
    visible: ArrayLike,
    baseline: ArrayLike | None = None,
) -> Tally:
    """Alignment error rate, 1 - (|A ∩ S| + |A ∩ P|) / (|A| + |S|): lower is better.

    A ratio of sums over a corpus, so that total / count is the rate itself.

    Args:
      predicted: the links A, bool [..., T, S].
      sure: links that a good alignment has, S, bool, broadcasts to [..., T, S].
      possible: links that do no harm, P; sure ones are possible. None: only these.
      visible: bool, broadcasts to [..., T, S]: both are words of the sentence. Links elsewhere are left out.
      baseline: other links for comparison, bool, broadcasts to [..., T, S]: `shuffled`, say. None: `diagonal`.

    Returns:
      Tally with the axes before T: total |A| + |S| - |A ∩ S| - |A ∩ P|, count |A| + |S|. The baseline's total is its
      error rate in the sentence times that count: exact over a corpus if it has as many links, as `diagonal` and
      `shuffled` have as many as `links`; else the mean of its rates, weighted by count.

    Raises:
      TypeError: if links are not boolean.

    References:
      Och & Ney 2003, "A Systematic Comparison of Various Statistical Alignment Models", section 4.2 (equation 32).
    """
    visible = jnp.asarray(visible)
    sure = _boolean("sure", sure) & visible
    possible = sure if possible is None else sure | (_boolean("possible", possible) & visible)

    def errors(found: Array) -> tuple[Array, Array]:
        size = lambda a: jnp.sum(jnp.broadcast_to(a, jnp.broadcast_shapes(a.shape, sure.shape)), axis=(-2, -1))  # noqa: E731
        count = size(found) + size(sure)
        return count - size(found & sure) - size(found & possible), count

    total, count = errors(_boolean("predicted", predicted) & visible)
    other = diagonal(visible) if baseline is None else _boolean("baseline", baseline) & visible
    other_total, other_count = errors(other)
    rate = other_total / jnp.maximum(other_count, 1)
    return Tally(total, count, jnp.broadcast_to(rate * count, total.shape))


def _boolean(name: str, links: ArrayLike) -> Array:
    links = jnp.asarray(links)
    if links.dtype != bool:
        raise TypeError(f"alignment.error_rate: {name} must be bool [..., T, S], got {links.dtype} {links.shape}.")
    return links


def _weights(name: str, weights: ArrayLike, axes: int) -> Array:
    weights = jnp.asarray(weights)
    if weights.ndim < axes or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"alignment.{name}: weights must be floating point with at least {axes} axes, the last two [T, S], "
            f"got {weights.dtype} {weights.shape}."
        )
    return weights


def _written(name: str, weights: ArrayLike, values: ArrayLike, w_o: ArrayLike) -> tuple[Array, Array]:
    """Weights [..., N, T, S], and what every key would write to the output, [..., N, S, D]."""
    weights, values, w_o = _weights(name, weights, 3), jnp.asarray(values), jnp.asarray(w_o)
    heads = weights.shape[-3]
    if (
        values.ndim < 3
        or values.shape[-2] != weights.shape[-1]
        or heads % values.shape[-3]
        or (w_o.shape[-3], w_o.shape[-2]) != (heads, values.shape[-1])
    ):
        raise ValueError(
            f"alignment.{name}: for weights [..., N, T, S] = {weights.shape} values must be [..., K, S, Hv] with N a "
            f"multiple of K, and w_o [N, Hv, D], got {values.shape} and {w_o.shape}."
        )
    values = jnp.repeat(values, heads // values.shape[-3], axis=-3)
    written = jnp.einsum("...nsh,...nhd->...nsd", values, w_o, precision=jax.lax.Precision.HIGHEST)
    return weights, written
