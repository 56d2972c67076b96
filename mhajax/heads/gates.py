"""Gates that are learned: which heads a trained model needs, found by fitting a factor for every head.

Three ways, each a distribution or a function of one number per head, and what pulls it:

    hard concrete        a random gate that is often exactly 0 or 1; pays for every gate that may be open
    causal head gating   a plain gate in (0, 1), fitted twice, once pulled open and once pulled shut
    subset               exactly K heads, by a relaxed top K that sharpens as it is annealed

Gates are pytrees with leaves [L, N], such as a `PerAttention`. The model is not trained here. `fit` takes any
optimizer with `init(params)` and `update(gradients, state, params)`, such as Optax's. All functions are pure: `jax.jit`
and, over seeds, `jax.vmap` go around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

TEMPERATURE = 0.33  # β
STRETCH = (-0.1, 1.1)  # γ, ζ
_LARGEST = 5.0  # logit up to which a causal gate is pulled


class Optimizer(Protocol):
    """What `fit` needs of an optimizer; those of Optax have it."""

    def init(self, params: Any, /) -> Any:
        """The state before the first step."""

    def update(self, updates: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        """What to add to the parameters, and the next state, from gradients."""
        ...


class Fit(NamedTuple):
    """What was fitted, and the value of the objective at every step, [steps]."""

    variables: Any
    objective: Array


class Causal(NamedTuple):
    """Gates in (0, 1), in the structure of the heads: fitted freely, pulled open (G⁺), pulled shut (G⁻)."""

    free: Any
    opened: Any
    shut: Any


class Roles(NamedTuple):
    """How far each head is one or the other; each in [0, 1], in the structure of the heads.

    Attributes:
      facilitating: stays open though pulled shut, G⁻.
      irrelevant: goes where it is pulled, G⁺ (1 - G⁻).
      interfering: stays shut though pulled open, 1 - G⁺.
    """

    facilitating: Any
    irrelevant: Any
    interfering: Any


def fit(
    objective: Callable[[Any, Any, Array, Array], Array],
    variables: Any,
    optimizer: Optimizer,
    key: Array,
    batches: Any = None,
    *,
    steps: int,
) -> Fit:
    """Descend an objective, in one scan.

    Args:
      objective: function (variables, batch, key, done) → number; `done` goes from 0 at the first step to 1 at the last.
      variables: where to begin, a pytree of floats.
      optimizer: as `optax.adam(0.1)`.
      key: PRNG key; every step gets its own.
      batches: pytree whose leaves have the batches on their first axis, taken in turns; None if none are needed.
      steps: how many.
    """

    def step(carry: tuple, index: Array) -> tuple[tuple, Array]:
        variables, state = carry
        batch = jax.tree.map(lambda leaf: leaf[index % leaf.shape[0]], batches)
        done = index / max(steps - 1, 1)
        value, slopes = jax.value_and_grad(objective)(variables, batch, jax.random.fold_in(key, index), done)
        updates, state = optimizer.update(slopes, state, variables)
        return (jax.tree.map(jnp.add, variables, updates), state), value

    (variables, _), values = jax.lax.scan(step, (variables, optimizer.init(variables)), jnp.arange(steps))
    return Fit(variables, values)


def sample(log_alpha: Any, key: Array) -> Any:
    """Hard-concrete gates in [0, 1], differentiable with respect to log α; 0 and 1 have a probability of their own.

    u ~ U(0, 1), s = σ((log u - log(1 - u) + log α) / β), gate = clip(s (ζ - γ) + γ, 0, 1).

    Args:
      log_alpha: a number for every head: a large one is an open gate.
      key: PRNG key.

    References:
      Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", section 2.2, with the constants
      of Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 6.
    """
    flat, rebuild = ravel_pytree(log_alpha)
    u = jax.random.uniform(key, flat.shape, flat.dtype, minval=jnp.finfo(flat.dtype).tiny)
    return rebuild(_stretched(jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + flat) / TEMPERATURE)))


def deterministic(log_alpha: Any) -> Any:
    """The gate to use when nothing is drawn any more: clip(σ(log α) (ζ - γ) + γ, 0, 1); exactly 0 or 1 at the ends.

    References:
      Louizos et al. 2018, equation 13.
    """
    return jax.tree.map(lambda a: _stretched(jax.nn.sigmoid(a)), log_alpha)


def open_probability(log_alpha: Any) -> Any:
    """P(gate ≠ 0) = σ(log α - β log(-γ/ζ)) for every head.

    References:
      Louizos et al. 2018, equation 12.
    """
    shift = TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])
    return jax.tree.map(lambda a: jax.nn.sigmoid(a - shift), log_alpha)


def penalty(log_alpha: Any) -> Array:
    """The expected number of heads that are not closed, Σ P(gate ≠ 0); times a weight, the price of heads."""
    return _total(open_probability(log_alpha))


def fit_hard_concrete(
    loss: Callable[[Any, Any], Array],
    log_alpha: Any,
    optimizer: Optimizer,
    key: Array,
    batches: Any = None,
    *,
    weight: float,
    steps: int,
) -> Fit:
    """L0 training of gates: minimise E[mean loss] + weight · `penalty`.

    Args:
      loss: function (gates, batch) → losses, whose mean is taken.
      log_alpha: where to begin; 2 is a gate that is open 19 times out of 20 or more.
      optimizer, key, batches, steps: as in `fit`.
      weight: λ, what a head costs, in the unit of the mean loss.

    Returns:
      log α; `deterministic` makes gates of it.

    References:
      Voita et al. 2019, section 6 (there the model is trained along; give `fit` an objective of both for that).
    """

    def objective(log_alpha: Any, batch: Any, key: Array, done: Array) -> Array:
        return jnp.mean(loss(sample(log_alpha, key), batch)) + weight * penalty(log_alpha)

    return fit(objective, log_alpha, optimizer, key, batches, steps=steps)


def fit_causal(
    loss: Callable[[Any, Any], Array],
    heads: Any,
    optimizer: Optimizer,
    key: Array,
    batches: Any = None,
    *,
    weight: float,
    steps: int,
) -> Causal:
    """Causal head gating: fit gates σ(θ) freely, and from there once pulled open and once pulled shut.

    Each fit minimises mean loss - λ Σ clip(θ), with λ = 0, λ = weight and λ = -weight.

    Args:
      loss: function (gates, batch) → losses, whose mean is taken.
      heads: any arrays in the structure of the gates; only their shapes count. The fit begins with gates of ½.
      optimizer, key, batches, steps: as in `fit`; each of the three fits takes `steps`.
      weight: of the pull, small against what a needed head is worth.

    Returns:
      The three sets of gates; `roles` reads them.

    References:
      Nam et al. 2025, "Causal Head Gating: A Framework for Interpreting Roles of Attention Heads in Transformers",
      section 3.
    """

    def objective(pull: float, theta: Any, batch: Any, key: Array, done: Array) -> Array:
        pulled = _total(jax.tree.map(lambda t: jnp.clip(t, -_LARGEST, _LARGEST), theta))
        return jnp.mean(loss(jax.tree.map(jax.nn.sigmoid, theta), batch)) - pull * pulled

    def fitted(pull: float, start: Any) -> Any:
        return fit(partial(objective, pull), start, optimizer, key, batches, steps=steps).variables

    free = fitted(0.0, jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf)), heads))
    found = Causal(free, fitted(weight, free), fitted(-weight, free))
    return jax.tree.map(jax.nn.sigmoid, found)


def roles(causal: Causal) -> Roles:
    """Facilitating, irrelevant or interfering, by the two fits that were pulled.

    References:
      Nam et al. 2025, section 3.
    """
    return Roles(
        causal.shut,
        jax.tree.map(lambda opened, shut: opened * (1 - shut), causal.opened, causal.shut),
        jax.tree.map(lambda opened: 1 - opened, causal.opened),
    )


def exactly(scores: Any, count: int) -> Any:
    """Gates of 1 for the `count` heads with the highest scores of all layers together, and of 0 for the others."""
    flat, rebuild = ravel_pytree(scores)
    _count("exactly", count, flat.size)
    return rebuild(jnp.zeros_like(flat).at[jax.lax.top_k(flat, count)[1]].set(1))


def relaxed(scores: Any, count: int, temperature: Any) -> Any:
    """A soft choice of `count` heads: gates that sum to `count`, and tend to `exactly` as the temperature falls.

    The sum of `count` softmaxes, each of which gives what the ones before have left: s ← s + log(1 - softmax(s / τ)).
    At high temperatures a gate may be a little above 1.

    Args:
      scores: a number for every head, with Gumbel noise added if heads are to be drawn.
      count: K.
      temperature: τ, above 0.

    References:
      Xie & Ermon 2019, "Reparameterizable Subset Sampling via Continuous Relaxations", section 3. Li, Cotterell &
      Sachan 2021, "Differentiable Subset Pruning of Transformer Heads", section 3.
    """
    flat, rebuild = ravel_pytree(scores)
    _count("relaxed", count, flat.size)
    smallest = jnp.finfo(flat.dtype).tiny

    def choose(scores: Array, _: None) -> tuple[Array, Array]:
        chosen = jax.nn.softmax(scores / temperature)
        return scores + jnp.log(jnp.maximum(1 - chosen, smallest)), chosen

    return rebuild(jnp.sum(jax.lax.scan(choose, flat, length=count)[1], axis=0))


def subset(scores: Any, count: int, temperature: Any, key: Array | None = None) -> Any:
    """Exactly `count` gates of 1, the others 0, with the derivative of the `relaxed` choice (straight through).

    Args:
      scores, count, temperature: as in `relaxed`.
      key: PRNG key of Gumbel noise: the heads are drawn without replacement, with odds exp(score). None draws nothing.
    """
    if key is not None:
        flat, rebuild = ravel_pytree(scores)
        scores = rebuild(flat + jax.random.gumbel(key, flat.shape, flat.dtype))
    soft = relaxed(scores, count, temperature)
    return jax.tree.map(lambda hard, soft: hard + soft - jax.lax.stop_gradient(soft), exactly(scores, count), soft)


def fit_subset(
    loss: Callable[[Any, Any], Array],
    scores: Any,
    count: int,
    optimizer: Optimizer,
    key: Array,
    batches: Any = None,
    *,
    steps: int,
    temperatures: tuple[float, float] = (1.0, 0.1),
) -> Fit:
    """Scores of the heads such that the `count` best are the ones to keep; `exactly` makes gates of them.

    Args:
      loss: function (gates, batch) → losses, whose mean is taken.
      scores: where to begin; zeros.
      count: K, heads that stay, of all layers together.
      optimizer, key, batches, steps: as in `fit`.
      temperatures: of the first and the last step; it falls by the same factor at every step.

    References:
      Li, Cotterell & Sachan 2021, section 3.
    """
    first, last = temperatures

    def objective(scores: Any, batch: Any, key: Array, done: Array) -> Array:
        return jnp.mean(loss(subset(scores, count, first * (last / first) ** done, key), batch))

    return fit(objective, scores, optimizer, key, batches, steps=steps)


def _stretched(s: Array) -> Array:
    low, high = STRETCH
    return jnp.clip(s * (high - low) + low, 0, 1)


def _total(tree: Any) -> Array:
    return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(tree)), jnp.zeros(()))


def _count(who: str, count: int, heads: int) -> None:
    if not 1 <= count <= heads:
        raise ValueError(f"gates.{who}: count must be from 1 to {heads}, the number of heads, got {count}.")
