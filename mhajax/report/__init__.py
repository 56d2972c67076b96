"""What the heads of a model do, as one page and as numbers: of any model here, of your own, and of plain arrays.

    found = report.heads(mhajax.language_model, params, config, tokens, length=64)
    found.page.save("report.html")                # one file that asks the network for nothing
    found.numbers["heads"]                        # every head: measures with interval and baseline

heads        the heads of a model on a text: where they look, and what the loss is without them
weights      where heads look, from attention weights of any library's model
examine      the heads of any subject, which says what the measures need of a model

subject      what the measures need of a model, and of its sentences
text         that of any model that predicts the tokens of a text; arrays of plain weights
patterns     where every head looks: MEASURES and MEASURES_OF_TEXT, to which a row adds a measure
importance   the loss without each head, and without more and more of them
results      values with intervals and baselines, over sentences and seeds
roles        one word for each head
numbers      the results for JSON; render, sections and page the same for a reader
progress     how a caller is told how far it is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import Drawing
from mhajax.report import arrays, numbers, patterns, render, results, roles, sections, text
from mhajax.report.page import Page
from mhajax.report.progress import Piece, Progress, silent
from mhajax.report.subject import Subject

__all__ = ["Piece", "Progress", "Report", "Subject", "examine", "heads", "weights"]

_ROWS = 2**22  # attention weights of a window batch, [L, B, N, T, T], that are in memory at once
_MOST_ROWS = 16


class Report(NamedTuple):
    """The answers about heads, as a page, as pictures and as numbers.

    Attributes:
      page: `page.save("report.html")` writes it; `page.html()` is its text.
      drawings: name → figure with its numbers; `figures.save` writes them.
      numbers: plain objects for JSON; a measure is {"value", "low", "high", "baseline"}.
    """

    page: Page
    drawings: dict[str, Drawing]
    numbers: dict[str, Any]


def examine(
    subject: Subject,
    trained: Sequence[Any],
    untrained: Sequence[Any],
    *,
    name: str = "model",
    shown: int = 4,
    progress: Progress | None = None,
) -> Report:
    """The heads of any model, of which `subject` says how to run it, and what is known of its sentences.

    Args:
      subject: functions of the parameters, and the sentences.
      trained: the parameters of each model (seed).
      untrained: as many parameters of the same shape, for the baseline.
      name: of the model, for the page.
      shown: how many sentences the view of every head shows.
      progress: told how far it is: (what, total, unit) → a context manager of something with `advance(count)`.

    Raises:
      ValueError: there is nothing to show, not one untrained model for each trained one, or a relation of attentions
        that the model does not have.
    """
    _check_shown("report.examine", shown)
    _check_relations(subject)
    if not trained or len(trained) != len(untrained):
        raise ValueError(
            "report.examine: untrained must be as many models as trained, at least one, got "
            f"{len(untrained)} and {len(trained)}."
        )
    found = results.examine(subject, trained, untrained, progress or silent)
    page, drawings = render.render(subject, found, trained, name, shown)
    return Report(page, drawings, numbers.as_json(subject, found, len(trained)))


def heads(
    model: ModuleType,
    params: Any,
    config: Any,
    tokens: ArrayLike,
    *,
    length: int,
    pieces: Callable[[Sequence[int]], list[str]] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    hidden: int | None = None,
    untrained: Any = None,
    name: str = "model",
    shown: int = 4,
    progress: Progress | None = None,
) -> Report:
    """What every head of a model does on a text: where it looks, what it is for, what the loss is without it.

    The text is cut into windows of `length` tokens; intervals are over the windows (and models). Compiling takes most
    of the time of a small model, and the ablations of L × N heads of a large one.

    Args:
      model: `mhajax.language_model`, `mhajax.encoder`, or a module of your own with their functions `features`,
        `logits`, `apply_captured` and `stages`.
      params: of one model; or a list of several of the same shape, such as trainings with other seeds.
      config: of the model, with its `num_layers` and `num_heads`.
      tokens: integers, [n]: running text that the model was not trained on, at least four windows of it.
      length: T, tokens of a window; at least 2.
      pieces: a list of tokens → their letters, one text each. None: their numbers.
      decode: a list of tokens → the text they are. None: their letters with spaces between.
      hidden: of an encoder, the token that stands for a hidden one: 15 % of the tokens are hidden, and the loss is
        that of predicting these. None: of a model whose heads look back, and which predicts the next token.
      untrained: parameters of the same shape for the baseline (as many as params, in a list if those are). None:
        `model.init_params(jax.random.key(i), config)` for the i-th of them.
      name: of the model, for the page.
      shown: how many windows the view of every head shows, if there is room for their weights.
      progress: told how far it is: (what, total, unit) → a context manager of something with `advance(count)`.

    Returns:
      A Report.

    Raises:
      ValueError: the module lacks a function, the text is too short for four windows, tokens are not integers of the
        vocabulary, or there is not one untrained model for each of params.

    Example:
      >>> from mhajax import language_model
      >>> config = language_model.Config(vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=8)
      >>> params = language_model.init_params(jax.random.key(3), config)
      >>> tokens = np.random.default_rng(0).integers(0, 11, 60)
      >>> found = heads(language_model, params, config, tokens, length=8)
      >>> len(found.numbers["heads"]), found.numbers["heads"][1]["head"]
      (2, 1)
      >>> sorted(found.numbers["heads"][0]["measures"]["previous token"])
      ['baseline', 'high', 'low', 'value']
    """
    who = "report.heads"
    _check_shown(who, shown)
    missing = [function for function in text.FUNCTIONS if not callable(getattr(model, function, None))]
    if missing:
        raise ValueError(
            f"{who}: model must be a module with the functions {', '.join(text.FUNCTIONS)}, such as "
            f"mhajax.language_model, got {getattr(model, '__name__', model)!r} without {', '.join(missing)}."
        )
    ids = _ids(who, tokens, length, getattr(config, "vocab_size", None), hidden)
    arrays.check_pieces(who, pieces)
    trained = list(params) if type(params) is list else [params]
    early = _untrained(who, model, config, untrained, len(trained))
    spell = pieces or (lambda some: [str(one) for one in some])
    room = _ROWS // (config.num_layers * config.num_heads * length**2)
    read = text.Text(
        ids, length, max(1, min(_MOST_ROWS, room, -(-(len(ids) - 1) // length))), "token", spell,
        decode or (lambda some: " ".join(spell(some))), "windows of the text that was handed in",
    )  # fmt: skip
    subject = text.make_subject(model, config, read, hidden)
    return examine(subject, trained, early, name=name, shown=shown, progress=progress)


def weights(
    weights: ArrayLike,
    *,
    tokens: ArrayLike | None = None,
    visible: ArrayLike | None = None,
    pieces: Callable[[Sequence[int]], list[str]] | None = None,
    name: str = "model",
    shown: int = 4,
    progress: Progress | None = None,
) -> Report:
    """Where heads look, from attention weights alone: of a model of any library.

    How far and how widely each head looks, which places it looks at and what role that gives it, how the heads of a
    layer differ, each with an interval over the examples and a baseline, uniform attention to the same keys; and a view
    of every head. No loss is asked, so nothing is said of what a head is worth.

    Args:
      weights: [L, B, N, T, S], attention after the softmax (before dropout), of NumPy, JAX, torch, …: every row sums to
        1 over the visible keys, or to 0 where a query is fully masked.
      tokens: integers, [B, T], of a text that attends to itself (T = S): then heads are asked for the previous token,
        the same token before and so on too. None: nothing is asked that needs them.
      visible: bool, [B, T, S]: the query is a token (not padding) and may attend to the key; what stands in rows
        without a visible key is not looked at. None: wherever any head has a weight above 0.
      pieces: a list of tokens → their letters, one text each. None: their numbers.
      name: of the model, for the page.
      shown: how many examples the view shows, if there is room for their weights.
      progress: as in `heads`.

    Returns:
      A Report.

    Raises:
      ValueError: shapes that do not fit together, fewer than two examples, weights that are no attention after the
        softmax.

    Example:
      >>> previous = np.eye(5, k=-1) + np.eye(5)[0] * np.eye(5)[:, :1]  # the first token looks at itself
      >>> uniform = np.tri(5) / np.arange(1, 6)[:, None]
      >>> tokens = np.broadcast_to(np.arange(5), (20, 5))
      >>> found = weights(np.broadcast_to(np.stack([previous, uniform]), (1, 20, 2, 5, 5)), tokens=tokens)
      >>> [head["role"] for head in found.numbers["heads"]]
      ['previous', None]
      >>> found.numbers["heads"][0]["measures"]["distance"]["value"]
      0.8
    """
    who = "report.weights"
    _check_shown(who, shown)
    arrays.check_pieces(who, pieces)
    subject = arrays.make_subject(weights, tokens, visible, pieces)
    looks = results.where_heads_look([patterns.make_measure(subject, progress or silent)(None)])
    page, drawings = _page_of_weights(subject, looks, name, shown)
    return Report(page, drawings, numbers.patterns_as_json(subject, looks))


def _page_of_weights(
    subject: Subject, looks: results.WhereHeadsLook, name: str, shown: int
) -> tuple[Page, dict[str, Drawing]]:
    of_heads = roles.roles_of_patterns(subject, looks)
    count = sum(bool(role.word) for role in of_heads.values())
    size = f"One model, {subject.num_heads} heads, measured on {subject.size} examples."
    lead = f"{size} {count} of the heads have a role."
    page, drawings = Page(f"Where the heads of {name} look", lead), {}
    sections.near_and_far(page, subject, looks.heads, looks.layers, drawings, seeds=1)
    sections.where(page, subject, looks.best)
    sections.different(page, subject, looks.differences, drawings)
    sections.every_head(page, subject, None, of_heads, shown, which="")
    items = [sections.intervals(subject, "over examples of one model"), *([sections.ROLES] if count else [])]
    page.section("How this was measured").items([*items, f"{subject.size} {subject.origin}."])
    return page, drawings


def _check_shown(who: str, shown: int) -> None:
    if isinstance(shown, bool) or not isinstance(shown, int | np.integer) or shown < 1:
        raise ValueError(f"{who}: shown must be a whole number of at least 1, got {shown!r}.")


def _check_relations(subject: Subject) -> None:
    kinds, keys = [kind.name for kind in subject.kinds], [relation.key for relation in subject.relations]
    for relation in subject.relations:
        if relation.kind not in kinds:
            raise ValueError(
                f"report.examine: the relation {relation.name!r} must be of one of the subject's kinds of attention, "
                f"{', '.join(kinds)}, got {relation.kind!r}."
            )
    if subject.aligned is not None and subject.aligned not in keys:
        raise ValueError(
            f"report.examine: subject.aligned must be the key of one of its relations, {', '.join(keys) or 'none'}, "
            f"got {subject.aligned!r}."
        )


def _untrained(who: str, model: ModuleType, config: Any, untrained: Any, count: int) -> list[Any]:
    """As many untrained models as trained ones."""
    if untrained is None:
        if not callable(getattr(model, "init_params", None)):
            raise ValueError(
                f"{who}: untrained must be given, parameters for the baseline, because {model.__name__} has no "
                "init_params, got None."
            )
        return [model.init_params(jax.random.key(number), config) for number in range(count)]
    found = list(untrained) if type(untrained) is list else [untrained]
    if len(found) != count:
        raise ValueError(f"{who}: untrained must be as many models as params, {count}, got {len(found)}.")
    return found


def _ids(who: str, tokens: ArrayLike, length: int, vocabulary: int | None, hidden: int | None) -> np.ndarray:
    """The tokens, after looking at them."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{who}: tokens must be integers [n], one running text, got {ids.dtype} {ids.shape}; np.concatenate puts "
            "several texts behind each other."
        )
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 2:
        raise ValueError(f"{who}: length must be a whole number of at least 2 tokens, got {length!r}.")
    text.check_room(len(ids), int(length))
    outside = [] if vocabulary is None else ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise ValueError(
            f"{who}: tokens must be at least 0 and below vocab_size={vocabulary}, got {int(outside[0])}; is this the "
            "tokenizer of this model?"
        )
    if hidden is not None and vocabulary is not None and not 0 <= hidden < vocabulary:
        raise ValueError(f"{who}: hidden must be a token, at least 0 and below vocab_size={vocabulary}, got {hidden}.")
    return ids.astype(np.int32)
