"""How wide must a head be to attend as it likes? `kind = "expressiveness"`.

A head of width H over n tokens has logits q kᵀ / √H of rank H at most, and a softmax forgets what is added to a row. So
a positive matrix P of attention, whose rows sum to 1, can be had exactly if and only if

    rank(log P · J) ≤ H,    J = 1 - 1 1ᵀ / n,

for log P + c 1ᵀ is a matrix of logits for every c, its part log P · J is the same for all of them, and c = minus the
mean of each row reaches that rank. Bhojanapalli et al. 2020, theorem 1: H ≥ n is enough for every P, and below it some
P cannot be had, of tokens with H channels. With tokens of n channels and more, as here, H = n - 1 is enough.

For every width the nearest logits of that rank (the truncated singular value decomposition of log P · J, then gradient
descent on the divergence of the weights) are put into w_q and w_k and our attention computes the weights.

The rules, stated before anything is run; the error is the largest difference between a weight and what it should be.
    width n              supported if it is at most the tolerance for every draw, else refuted
    narrower by one      supported (n - 1 is not enough) if it is above the tolerance for every draw, refuted if it is
                         at most the tolerance for every draw, else not resolved
    half as wide         supported (n / 2 is not enough) in the same way
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.studies.study import Answer, Study, Train, Verdict, Word
from mhajax import attention, figures
from mhajax.report.page import Column, Page


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "expressiveness"`: which attention matrices a head of a width can have.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: short sequences and few draws.
      length: n, tokens.
      draws: how many matrices are drawn; each row is uniform among the distributions (Dirichlet of 1).
      steps: of gradient descent, where a head is too narrow.
      tolerance: the largest error of a weight that counts as none.
    """

    kind: Literal["expressiveness"] = "expressiveness"
    quick: bool | None = None
    length: int = 16
    draws: int = 10
    steps: int = 500
    tolerance: float = 1e-6

    def __post_init__(self):
        for name, least in (("length", 4), ("draws", 2), ("steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be above 0 and below 1, got {self.tolerance}.")


def shrink(config: Config) -> Config:
    """The same of little."""
    return dataclasses.replace(config, length=min(config.length, 6), draws=2, steps=min(config.steps, 20))


def hashes(config: Config) -> dict[str, str]:
    """Nothing is read."""
    return {}


def answer(config: Config, train: Train | None = None) -> Answer:
    """Fit heads of every width, compare, and write the page."""
    n = config.length
    rows = np.random.default_rng(0).dirichlet(np.ones(n), size=(config.draws, n))  # [draws, n, n]
    wanted = np.maximum(rows, 1e-6) / np.maximum(rows, 1e-6).sum(-1, keepdims=True)
    errors = {}
    for width in widths(n):
        factors = _nearest(wanted, width, config.steps if width < n - 1 else 0)
        errors[width] = np.abs(attended(*factors) - wanted).max((-1, -2)).tolist()
    return _answer(config, errors)


def widths(n: int) -> list[int]:
    """Widths that are tried: 1, 2, 4, … and those about n."""
    powers = [2**power for power in range(n.bit_length()) if 2**power < n - 1]
    return sorted({*powers, n // 2, n - 2, n - 1, n})


def nearest_logits(wanted: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys [draws, n, H] whose products are the nearest matrix of rank H to log P · J, in least squares."""
    centred = np.log(wanted) - np.log(wanted).mean(-1, keepdims=True)
    left, values, right = np.linalg.svd(centred)
    half = np.sqrt(values[:, None, :width])
    return left[..., :width] * half, np.swapaxes(right, -1, -2)[..., :width] * half


def _nearest(wanted: np.ndarray, width: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, then gradient descent on the divergence of the weights from P."""
    start = tuple(jnp.asarray(part, jnp.float32) for part in nearest_logits(wanted, width))
    if not steps:
        return nearest_logits(wanted, width)
    rate = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def loss(factors):
        logits = jnp.einsum("rth,rsh->rts", *factors)
        return -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=(-1, -2)).sum()

    @jax.jit
    def fit(factors):
        def step(carry, _):
            factors, state = carry
            updates, state = rate.update(jax.grad(loss)(factors), state)
            return (optax.apply_updates(factors, updates), state), None

        return jax.lax.scan(step, (factors, rate.init(factors)), None, steps)[0][0]

    queries, keys = fit(start)
    return np.asarray(queries), np.asarray(keys)


def attended(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The weights [draws, n, n] of a head of our attention with these queries and keys: one-hot tokens, w_q and w_k."""
    n, width = queries.shape[1:]
    shape = attention.Config(d_model=n, num_heads=1, head_dim=width, value_dim=1)
    blank = attention.init_params(jax.random.key(0), shape)

    @partial(jax.jit, static_argnums=2)
    def weights(w_q: Array, w_k: Array, config: attention.Config) -> Array:
        params = blank._replace(w_q=w_q[None] * width**0.5, w_k=w_k[None])
        return attention.apply_captured(params, jnp.eye(n), config, capture=("weights",))[1]["weights"][0]

    pairs = zip(jnp.asarray(queries, jnp.float32), jnp.asarray(keys, jnp.float32), strict=True)
    return np.stack([np.asarray(weights(*pair, shape), np.float64) for pair in pairs])


ENOUGH = "A head as wide as the sequence is long can have any positive attention."
ONE_LESS = "A head that is narrower by one cannot."
HALF = "A head that is half as wide cannot."


def verdicts(errors: Mapping[int, list[float]], tolerance: float) -> tuple[Verdict, ...]:
    """What the rules say of the largest error of each draw, by width."""
    n = max(errors)
    return (
        Verdict(ENOUGH, "supported" if max(errors[n]) <= tolerance else "refuted", _because(n, errors[n], tolerance)),
        Verdict(ONE_LESS, _not_enough(errors[n - 1], tolerance), _because(n - 1, errors[n - 1], tolerance)),
        Verdict(HALF, _not_enough(errors[n // 2], tolerance), _because(n // 2, errors[n // 2], tolerance)),
    )


def judge(config: Config, result: dict[str, Any]) -> tuple[Verdict, ...]:
    """The verdicts that follow from the numbers in a result, by the rules."""
    return verdicts({int(width): errors for width, errors in result["errors"].items()}, config.tolerance)


def _not_enough(errors: list[float], tolerance: float) -> Word:
    if min(errors) > tolerance:
        return "supported"
    return "refuted" if max(errors) <= tolerance else "not resolved"


def _because(width: int, errors: list[float], tolerance: float) -> str:
    return (
        f"with a width of {width} the largest error of a weight is {min(errors):.1e} to {max(errors):.1e} in "
        f"{len(errors)} draws; {tolerance:g} counts as none"
    )


def _answer(config: Config, errors: dict[int, list[float]]) -> Answer:
    said = verdicts(errors, config.tolerance)
    page = Page("What attention can a head have?", *(f"{v.claim} {v.word.capitalize()}: {v.because}." for v in said))
    section = page.section("Width and rank")
    section.text(
        "Logits of a head of width H have rank H at most, and the softmax forgets what is added to a row. So a matrix "
        "of weights P > 0 can be had exactly if and only if the rank of log P · (1 - 1 1ᵀ / n) is at most H. "
        "Bhojanapalli et al. 2020 (theorem 1) prove that H = n is enough, and that with tokens of fewer channels it is "
        "not always; where tokens have n channels, n - 1 is enough, for the centred matrix has no more.",
        f"{config.draws} random matrices of {config.length} tokens. For each width the nearest logits of that rank, "
        f"then {config.steps} steps of gradient descent where it is too narrow; the weights are those of our attention "
        "in float32. The fit bounds what a narrow head can do from one side only; that it cannot be exact follows from "
        "the rank.",
    )
    found = sorted(errors)
    logs = np.log10(np.maximum([errors[width] for width in found], 1e-9))  # [widths, draws]
    drawing = figures.curve(
        {"median": (found, np.median(logs, -1))}, title="One head can attend as it likes from a width of n - 1 on",
        xlabel=f"width of the head, for n = {config.length} tokens", ylabel="log10 of the largest error of a weight",
        spread={"median": (logs.min(-1), logs.max(-1))},
    )  # fmt: skip
    section.figure(drawing, "Median of the draws, and from the least to the most.", name="width")
    section.table(
        ["width", Column("least error", ".1e"), Column("median", ".1e"), Column("most", ".1e")],
        [[str(width), min(errors[width]), float(np.median(errors[width])), max(errors[width])] for width in found],
        caption="The largest error of a weight, over the draws.",
    )
    page.section("What would change this").text(
        "That a head can have a matrix says nothing of whether training finds it, nor of one that must serve many "
        "sentences at once."
    )
    numbers = {"errors": {str(width): errors[width] for width in found}, "tolerance": config.tolerance}
    return Answer(said, numbers, page, {"width": drawing})
