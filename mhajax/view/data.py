"""What is shown: words, weights, gold links and notes; checked, and packed as JSON with weights of 8 bits."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mhajax.view.page import View


class Attention(NamedTuple):
    """One kind of attention in one sentence: who looks, who is looked at, and how much.

    Attributes:
      queries: T words.
      keys: S words.
      weights: [L, N, T, S], attention after the softmax, between 0 and 1.
      gold: (query, key) indices of links that are right; they get a frame.
    """

    queries: Sequence[str]
    keys: Sequence[str]
    weights: ArrayLike
    gold: Sequence[tuple[int, int]] = ()


class Sentence(NamedTuple):
    """One sentence, or pair of sentences.

    Attributes:
      title: what it is chosen by.
      attentions: name of a kind of attention ("encoder", "decoder", "cross") → Attention.
    """

    title: str
    attentions: Mapping[str, Attention]


def heads(
    sentences: Sequence[Sentence] | Sentence | Attention,
    *,
    notes: Mapping[tuple[str, int, int], str] | None = None,
    title: str = "Attention heads",
    unit: str = "word",
) -> View:
    """Makes an interactive view of every head on some sentences.

    Weights are kept in 8 bits: what is shown is within 1/510 of what was given.

    Args:
      sentences: Sentences that have the same kinds of attention, with the same L and N; or one; or one Attention alone.
      notes: (kind, layer, head) → what is known about that head, such as its role, the number measured for it, the
        interval and the baseline; shown when the head is chosen. For an Attention alone the kind is "attention".
      title: the name of the whole, for those who hear a page rather than see it.
      unit: what a query or a key is, for a reader: "word", "token", "character".

    Returns:
      A View: displays itself as the last expression of a notebook's cell; `View.html()` is its text for a page.

    Raises:
      ValueError: words, weights, gold links or notes do not fit together.

    >>> import numpy as np
    >>> words = ["the", "cat", "<eos>"]
    >>> causal = np.tri(3) / np.arange(1, 4)[:, None]
    >>> heads(Attention(words, words, np.broadcast_to(causal, (2, 4, 3, 3))))
    View('Attention heads', 1 sentence, attention 2 × 4)
    """
    if isinstance(sentences, Attention):
        sentences = Sentence("", {"attention": sentences})
    if isinstance(sentences, Sentence):
        sentences = [sentences]
    if not sentences:
        raise ValueError("view.heads: sentences must hold at least one Sentence, got none.")
    packed = [_sentence(number, sentence) for number, sentence in enumerate(sentences)]
    shapes = packed[0][1]
    for number, (_, other) in enumerate(packed):
        if other != shapes:
            raise ValueError(
                f"view.heads: sentences[{number}] must have the kinds and heads of the first, {_listed(shapes)}, "
                f"got {_listed(other)}; make a view of its own for another model."
            )
    kinds = {name: {"name": name, "layers": shape[0], "heads": shape[1], "notes": []} for name, shape in shapes.items()}
    for (kind, layer, head), text in sorted((notes or {}).items()):
        if kind not in shapes or not (0 <= layer < shapes[kind][0] and 0 <= head < shapes[kind][1]):
            raise ValueError(
                f"view.heads: notes must be about heads that are shown, {_listed(shapes)} (layers × heads, counted "
                f"from 0), got {(kind, layer, head)}."
            )
        kinds[kind]["notes"].append([int(layer), int(head), str(text)])
    data = {
        "title": str(title),
        "unit": str(unit),
        "kinds": [*kinds.values()],
        "sentences": [sentence for sentence, _ in packed],
    }
    return View(str(title), f"{_count(len(packed))}, {_listed(shapes)}", data)


def _sentence(number: int, sentence: Sentence) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The sentence as JSON has it, and [L, N] of each kind, in the order they were given in."""
    where = f"sentences[{number}]"
    if not isinstance(sentence, Sentence) or not sentence.attentions:
        raise ValueError(
            f"view.heads: {where} must be a Sentence with at least one Attention, got {type(sentence).__name__}."
        )
    shapes, attentions = {}, []
    for kind, attention in sentence.attentions.items():
        attentions.append(_attention(f"{where}.attentions[{kind!r}]", attention))
        shapes[str(kind)] = np.shape(attention.weights)[:2]
    return {"title": str(sentence.title) or f"sentence {number + 1}", "attentions": attentions}, shapes


def _attention(where: str, attention: Attention) -> dict[str, Any]:
    weights = np.asarray(attention.weights)
    if weights.ndim != 4 or weights.size == 0:
        raise ValueError(f"view.heads: {where}.weights must be [L, N, T, S] with no empty axis, got {weights.shape}.")
    for name, letter, size in (("queries", "T", weights.shape[2]), ("keys", "S", weights.shape[3])):
        words = getattr(attention, name)
        if isinstance(words, str) or len(words) != size:
            raise ValueError(
                f"view.heads: {where}.{name} must be {letter}={size} words, one for each of the weights' "
                f"{weights.shape}, got {'one text of ' if isinstance(words, str) else ''}{len(words)}; cut padding off."
            )
    weights = weights.astype(np.float32)
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() <= 1.01):  # bfloat16 rounds above 1
        raise ValueError(
            f"view.heads: {where}.weights must be between 0 and 1, got {weights.min():.4g} to {weights.max():.4g}; "
            "pass the attention after the softmax, not the logits."
        )
    gold = [(int(query), int(key)) for query, key in attention.gold]
    for query, key in gold:
        if not (0 <= query < weights.shape[2] and 0 <= key < weights.shape[3]):
            raise ValueError(
                f"view.heads: {where}.gold must be (query, key) with query < T={weights.shape[2]} and key < "
                f"S={weights.shape[3]}, got {(query, key)}."
            )
    bytes_ = np.rint(np.minimum(weights, 1) * 255).astype(np.uint8).tobytes()
    return {
        "queries": [str(word) for word in attention.queries],
        "keys": [str(word) for word in attention.keys],
        "weights": base64.b64encode(bytes_).decode("ascii"),
        "gold": gold,
    }


def _listed(shapes: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{kind} {layers} × {heads}" for kind, (layers, heads) in shapes.items())


def _count(sentences: int) -> str:
    return "1 sentence" if sentences == 1 else f"{sentences} sentences"
