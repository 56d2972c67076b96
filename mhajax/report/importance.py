"""What depends on heads: the loss without each of them, and without more and more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhajax.heads import importance
from mhajax.report.progress import Progress, silent
from mhajax.report.subject import FILLER, Subject
from mhajax.statistics import Tally


class Importance(NamedTuple):
    """What depends on the heads of one model, in nats.

    Attributes:
      ablation: category of tokens (of which there are any) → kind → [sentences, L, N]: the ablation effect, loss
        without the head minus loss with all; per token.
      michel: kind → [sentences, L, N]: Michel's importance, the size of the loss's slope along the gate; per token.
      pruned: order of removal → [removals + 1, sentences]: the loss per token after each removal; orders are found on
        the other half of the sentences than those on which the loss is measured.
      order: heads from the least important to the most, as (kind, layer, head), by all sentences.
    """

    ablation: dict[str, dict[str, Tally]]
    michel: dict[str, Tally]
    pruned: dict[str, Tally]
    order: list[tuple[str, int, int]]


ORDERS = ("least important first", "in one random order")


def make_measure(subject: Subject, progress: Progress = silent, *, seed: int = 0) -> Callable[[Any], Importance]:
    """A function from parameters to what depends on the heads; compiled once for all models of this shape.

    Args:
      subject: the functions of the model, and its sentences.
      progress: told how far it is.
      seed: of the random order of removal.
    """

    def of_sentences(params, batch, predicted, gates):
        return jnp.sum(subject.losses(params, batch, gates) * predicted[..., 0], axis=-1)  # [B]

    @jax.jit
    def removed(params, batch, predicted):
        sums = lambda nats: jnp.einsum("bt,btc->bc", nats, predicted).reshape(-1)  # noqa: E731
        without = subject.ablated(params, batch, sums)  # [L, B·C, N]
        full = sums(subject.losses(params, batch, subject.gates))
        shape = predicted.shape[::2]  # [B, C]
        return {
            kind: jnp.moveaxis((losses - full[:, None]).reshape(len(losses), *shape, -1), 0, 2)
            for kind, losses in without.items()
        }  # [B, C, L, N]

    @jax.jit
    def slopes(params, batch, predicted):
        found = importance.michel(lambda gates: of_sentences(params, batch, predicted, gates), subject.gates)
        return {kind: jnp.moveaxis(tally.total, 0, 1) for kind, tally in found.items()}  # [B, L, N]

    @jax.jit
    def along(params, batch, predicted, positions):
        """The losses [removals + 1, B] when every sentence removes its heads in its own order, positions [B, heads]."""
        sizes = {kind.name: (kind.layers, kind.heads) for kind in subject.kinds}

        def after(removals):
            flat, start, gates = (positions >= removals).astype(jnp.float32), 0, {}
            for kind in sorted(sizes):
                layers, heads = sizes[kind]
                part = flat[:, start : start + layers * heads].reshape(-1, layers, heads)
                gates[kind], start = jnp.swapaxes(part, 0, 1), start + layers * heads  # [L, B, N]
            return of_sentences(params, batch, predicted, gates)

        return jax.lax.map(after, jnp.arange(positions.shape[1] + 1))

    def measure(params: Any) -> Importance:
        ablation, slope, counts, number = [], [], [], []
        for batch in subject.watched("the loss without each head", progress):
            predicted, valid = subject.predicted(batch), subject.index(batch) != FILLER
            found = jax.device_get((removed(params, batch, predicted), slopes(params, batch, predicted)))
            found = jax.tree.map(lambda a, valid=valid: a[valid], found)
            ablation.append(found[0])
            slope.append(found[1])
            counts.append(predicted.sum(1)[valid])
            number.append(subject.index(batch)[valid])
        ablation, slope = (jax.tree.map(lambda *parts: np.concatenate(parts), *found) for found in (ablation, slope))
        counts, odd = np.concatenate(counts), np.concatenate(number) % 2 == 1
        random = np.random.default_rng(seed).permutation(subject.num_heads)
        orders = {
            ORDERS[0]: [np.argsort(_flat(slope, odd != half)) for half in (False, True)],  # by the other half
            ORDERS[1]: [random, random],
        }
        pruned = {name: _pruned(params, order) for name, order in orders.items()}
        tokens = counts[:, :1]
        return Importance(
            {
                category: {
                    kind: Tally(a[:, c], counts[:, c, None, None], np.zeros_like(a[:, c]))
                    for kind, a in ablation.items()
                }
                for c, category in enumerate(subject.categories)
                if counts[:, c].any()
            },
            {kind: Tally(a, tokens[..., None], np.zeros_like(a)) for kind, a in slope.items()},
            {name: Tally(a, tokens[:, 0], a[:1]) for name, a in pruned.items()},
            [_place(slope, int(head)) for head in np.argsort(_flat(slope, np.ones(len(odd), bool)))],
        )

    def _pruned(params: Any, orders: list[np.ndarray]) -> np.ndarray:
        """[removals + 1, sentences]; orders are for sentences of even and of odd number."""
        positions = np.argsort(np.stack(orders), axis=-1)  # when each head goes
        found = []
        for batch in subject.watched("the loss without more and more heads", progress):
            index = subject.index(batch)
            curve = np.asarray(along(params, batch, subject.predicted(batch), positions[index % 2]))
            found.append(curve[:, index != FILLER])
        return np.concatenate(found, axis=1)

    return measure


def _flat(slope: dict[str, np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """Mean importance of every head, kind after kind in the order of `ravel_pytree`, which sorts the keys of a dict."""
    return np.concatenate([slope[kind][chosen].mean(0).ravel() for kind in sorted(slope)])


def _place(slope: dict[str, np.ndarray], head: int) -> tuple[str, int, int]:
    """Kind, layer and number within the layer of a head by its number among all."""
    for kind in sorted(slope):
        layers, heads = slope[kind].shape[1:]
        if head < layers * heads:
            return kind, head // heads, head % heads
        head -= layers * heads
    raise IndexError(head)
