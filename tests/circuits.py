"""Heads whose weights are set by hand, as parameters of this library's attention and language model.

A token is the sum of a code for the word and, with "sinusoidal" positions, a sinusoid over all channels. The channels
are three blocks, one after the other: `WORD` has a channel for every word, `BEFORE` a copy of that which holds the
previous word, and the rest is left to the positions. The code of a word is so much longer than the sinusoid that RMS
normalisation leaves it the same for all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhajax import attention, block, embedding, language_model, mlp, norm, transformer

VOCABULARY = 31
PLACES = 22  # pairs of channels, read for positions; the sinusoid of the highest frequency is among them
WIDTH = 2 * (VOCABULARY + PLACES)  # D; sines are its first half, cosines its second
HEAD = VOCABULARY + 2 * PLACES  # H: room for a word and a place
CODE = 60.0  # length of a word's code beside a sinusoid of length √(D/2) = 7.3

# Pairs of channels (a sine and its cosine) 0 … PLACES - 1 are free of words: the highest frequencies.
WORD = PLACES + np.arange(VOCABULARY)
BEFORE = WIDTH // 2 + PLACES + np.arange(VOCABULARY)
SINES = np.arange(PLACES)
COSINES = WIDTH // 2 + np.arange(PLACES)
ANGLES = 10_000.0 ** (-np.arange(PLACES) * 2 / WIDTH)  # between one position and the next


class Head(NamedTuple):
    """What one head contributes to the parameters of an attention."""

    w_q: np.ndarray  # [D, H]
    w_k: np.ndarray  # [D, H]
    w_v: np.ndarray  # [D, H]
    w_o: np.ndarray  # [H, D]


def _zeros() -> tuple[np.ndarray, ...]:
    return np.zeros((WIDTH, HEAD)), np.zeros((WIDTH, HEAD)), np.zeros((WIDTH, HEAD)), np.zeros((HEAD, WIDTH))


def _reads_places(w_q: np.ndarray, w_k: np.ndarray, offset: int, strength: float) -> None:
    """The logit is strength · Σ cos(angle · (key - query - offset)): largest at that offset."""
    first, second = VOCABULARY + SINES, VOCABULARY + PLACES + SINES
    w_k[SINES, first] = w_k[COSINES, second] = 1
    cos, sin = strength * np.cos(ANGLES * offset), strength * np.sin(ANGLES * offset)
    w_q[SINES, first], w_q[COSINES, first] = cos, sin  # sin(a + b) = sin a cos b + cos a sin b
    w_q[COSINES, second], w_q[SINES, second] = cos, -sin


def dead() -> Head:
    """Attends to everything alike, and writes nothing."""
    return Head(*_zeros())


def offset(places: int) -> Head:
    """Attends to the key `places` away (back: negative) and writes its word to `BEFORE`."""
    w_q, w_k, w_v, w_o = _zeros()
    _reads_places(w_q, w_k, places, 3e4)
    w_v[WORD, np.arange(VOCABULARY)] = 1
    w_o[np.arange(VOCABULARY), BEFORE] = CODE / WIDTH**0.5  # as long as the word's own code
    return Head(w_q, w_k, w_v, w_o)


def previous_token() -> Head:
    """Attends to the token before, and writes its word to `BEFORE`."""
    return offset(-1)


def duplicate_token() -> Head:
    """Attends to earlier tokens of the same word, not to itself where there are others; writes nothing."""
    w_q, w_k, w_v, w_o = _zeros()
    _reads_places(w_q, w_k, 0, -3e4)  # away from itself
    w_q[WORD, np.arange(VOCABULARY)] = 3e4
    w_k[WORD, np.arange(VOCABULARY)] = 1
    return Head(w_q, w_k, w_v, w_o)


def induction(gain: float = 3.0) -> Head:
    """Attends to tokens whose previous word is the query's word, and raises the logit of the word attended to.

    The first token has none before it, and passes for one that follows itself: begin with a word that does not come
    again.
    """
    w_q, w_k, w_v, w_o = copying(gain)
    w_q[WORD, np.arange(VOCABULARY)] = 1.5e2
    w_k[BEFORE, np.arange(VOCABULARY)] = 1
    return Head(w_q, w_k, w_v, w_o)


def copying(gain: float = 3.0) -> Head:
    """Attends to everything alike, and raises the logit of every word attended to; lowers it with a gain below 0."""
    w_q, w_k, w_v, w_o = _zeros()
    w_v[WORD, np.arange(VOCABULARY)] = 1
    w_o[np.arange(VOCABULARY), WORD] = gain * CODE
    return Head(w_q, w_k, w_v, w_o)


def layer(*heads: Head) -> attention.Params:
    """The parameters of an attention that has these heads."""
    return attention.Params(*(jnp.asarray(np.stack(arrays), jnp.float32) for arrays in zip(*heads, strict=True)))


def attention_config(num_heads: int) -> attention.Config:
    """The shape of `layer` with so many heads."""
    return attention.Config(d_model=WIDTH, num_heads=num_heads, head_dim=HEAD)


def model(*layers: attention.Params) -> tuple[language_model.Config, language_model.Params]:
    """A language model of such attentions, with as many heads in all; its feed-forward networks do nothing."""
    num_heads = len(layers[0].w_q)
    config = language_model.Config(
        d_model=WIDTH, num_heads=num_heads, head_dim=HEAD, d_ff=1, num_layers=len(layers),
        vocab_size=VOCABULARY, positions="sinusoidal",
    )  # fmt: skip
    nothing = mlp.Params(jnp.zeros((WIDTH, 1)), jnp.zeros(1), jnp.zeros((1, WIDTH)), jnp.zeros(WIDTH))
    scale = norm.init_params(None, config)
    stack: Any = [block.Params(scale, attended, None, None, scale, nothing) for attended in layers]
    table = np.zeros((VOCABULARY, WIDTH), np.float32)
    table[np.arange(VOCABULARY), WORD] = CODE / WIDTH**0.5
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    return config, language_model.Params(embedding.Params(jnp.asarray(table)), transformer.Params(stacked, scale))


def induction_model() -> tuple[language_model.Config, language_model.Params]:
    """Two layers of three heads: previous token, duplicate token, dead; and above them dead, induction, induction."""
    below = layer(previous_token(), duplicate_token(), dead())
    return model(below, layer(dead(), induction(), induction()))
