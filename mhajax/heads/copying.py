"""Whether a head that looks at a token raises that token's logit: a role that is seen in the weights, not in a pattern.

What attending to token u adds to the logit of token v is entry [u, v] of

    embedding w_v w_o unembedding        [V, V]

without the normalisations between them; scale embedding and unembedding by theirs if you like. Baseline of both
measures are random w_v and w_o between the same embeddings. For an untrained model, call them with its parameters.

In NumPy (accelerators have no eigenvalues of such matrices), so not under jit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike

from mhajax.statistics import Tally


def by_eigenvalues(
    w_v: ArrayLike, w_o: ArrayLike, embedding: ArrayLike, unembedding: ArrayLike, *, draws: int = 32, seed: int = 0
) -> Tally:
    """Σ Re λ / Σ |λ| of the eigenvalues of that matrix, from -1 (lowers what it sees) to 1 (copies); 0 for a dead head.

    Only Hv of them are not 0: those of w_o unembedding embedding w_v, which is what is computed.

    Args:
      w_v: [..., N, D, Hv]; or K heads, each shared by N/K.
      w_o: [..., N, Hv, D].
      embedding: what tokens are when they are read, [V, D].
      unembedding: what makes logits of the residual stream, [D, V].
      draws: random heads for the baseline.
      seed: of these.

    Returns:
      Tally [..., N] of count 1; the baseline is the mean of the random heads, near 0.

    Raises:
      ValueError: if the shapes do not fit together.

    >>> eye = np.eye(5)
    >>> by_eigenvalues(eye[None], np.stack([eye]), eye, eye).total
    array([1.])

    References:
      Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", section on detecting copying behaviour.
    """
    w_v, w_o, embedding, unembedding = _checked("by_eigenvalues", w_v, w_o, embedding, unembedding)
    around = unembedding @ embedding  # [D, D]

    def score(w_v: np.ndarray, w_o: np.ndarray) -> np.ndarray:
        values = np.linalg.eigvals(w_o @ around @ w_v)
        sizes = np.abs(values).sum(-1)
        return np.where(sizes > 0, np.real(values).sum(-1) / np.where(sizes > 0, sizes, 1), 0.0)

    total = score(w_v, w_o)
    return Tally(total, np.ones_like(total), np.full_like(total, np.mean(score(*_random(w_v, w_o, draws, seed)))))


def by_logits(
    w_v: ArrayLike, w_o: ArrayLike, embedding: ArrayLike, unembedding: ArrayLike, *, draws: int = 32, seed: int = 0
) -> Tally:
    """How much of what attending to a token raises is that token's own logit, from 0 to 1.

    In each row of the matrix, what lies above the mean of the row is raised; the score of a token is its own share.

    Args:
      w_v, w_o, draws, seed: as in `by_eigenvalues`.
      embedding: of V tokens, all or some drawn at random, [V, D].
      unembedding: of the same tokens in the same order, [D, V].

    Returns:
      Tally [..., N]: the sum over the V tokens; a dead head has 0. The baseline is the mean of the random heads, about
      1/V.

    Raises:
      ValueError: if the shapes do not fit together.

    References:
      After Olsson et al. 2022, "In-context Learning and Induction Heads", appendix, the copying score: the raise of the
      token attended to over all that is raised. Theirs is for the tokens of a random sequence, and rescaled.
    """
    w_v, w_o, embedding, unembedding = _checked("by_logits", w_v, w_o, embedding, unembedding)

    def score(w_v: np.ndarray, w_o: np.ndarray) -> np.ndarray:
        added = embedding @ w_v @ w_o @ unembedding  # [V, V]
        raised = np.maximum(added - added.mean(-1, keepdims=True), 0)
        whole = raised.sum(-1)
        return np.sum(np.where(whole > 0, np.diagonal(raised) / np.where(whole > 0, whole, 1), 0))

    total = _one_by_one(score, w_v, w_o)
    baseline = np.full_like(total, np.mean(_one_by_one(score, *_random(w_v, w_o, draws, seed))))
    return Tally(total, np.full_like(total, len(embedding)), baseline)


def _checked(name: str, *arrays: ArrayLike) -> tuple[np.ndarray, ...]:
    """In float64, with a w_v for every head."""
    w_v, w_o, embedding, unembedding = (np.asarray(array, np.float64) for array in arrays)
    fits = (
        min(w_v.ndim, w_o.ndim) >= 3
        and w_v.shape[-1] == w_o.shape[-2]
        and w_v.shape[-2] == w_o.shape[-1] == embedding.shape[-1] == unembedding.shape[0]
        and embedding.shape == unembedding.T.shape
        and w_o.shape[-3] % w_v.shape[-3] == 0
    )
    if not fits:
        raise ValueError(
            f"copying.{name}: shapes must be w_v [..., N, D, Hv], w_o [..., N, Hv, D], embedding [V, D] and "
            f"unembedding [D, V], got {w_v.shape}, {w_o.shape}, {embedding.shape} and {unembedding.shape}; "
            "transpose the table of a model whose logits come from it."
        )
    return np.repeat(w_v, w_o.shape[-3] // w_v.shape[-3], axis=-3), w_o, embedding, unembedding


def _random(w_v: np.ndarray, w_o: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """So many heads of the same shapes; scale does not matter to either measure."""
    random = np.random.default_rng(seed)
    return random.normal(size=(draws, *w_v.shape[-2:])), random.normal(size=(draws, *w_o.shape[-2:]))


def _one_by_one(score: Callable, w_v: np.ndarray, w_o: np.ndarray) -> np.ndarray:
    """The score of every head, which never holds [V, V] for more than one."""
    flat = (array.reshape(-1, *array.shape[-2:]) for array in (w_v, w_o))
    return np.array([score(*head) for head in zip(*flat, strict=True)]).reshape(w_o.shape[:-2])
