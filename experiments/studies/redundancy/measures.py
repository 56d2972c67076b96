"""What is measured for `redundancy`: losses of windows without sets of heads, as arrays in nats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import work
from experiments.data import fetch, files
from experiments.errors import DataError
from experiments.studies import models
from experiments.studies.redundancy import Config
from mhajax.heads import importance
from mhajax.pretrained import Pretrained
from mhajax.report import text
from mhajax.report.subject import Subject
from mhajax.statistics import Tally

RANKINGS = ("single effect", "Michel's importance", "Shapley share")
ROWS = 4  # windows that are computed together
TOKENS = 256  # of windows times gates that are computed together


class Alone(NamedTuple):
    """Single and joint effects of a model's heads on some windows.

    Attributes:
      single: loss without each head - loss, [windows, L, N].
      joint: loss without all heads of a layer - loss, [windows, L].
    """

    single: np.ndarray
    joint: np.ndarray


class Judged(NamedTuple):
    """Losses on the judged windows.

    Attributes:
      full, none: with all heads and without any, [windows].
      removed: heads that are removed at each point, [P].
      ranked: losses in the order of each ranking, name → [P, windows].
      drawn: in random orders of the same layers as the first ranking, [draws, P, windows].
    """

    full: np.ndarray
    none: np.ndarray
    removed: np.ndarray
    ranked: dict[str, np.ndarray]
    drawn: np.ndarray


class Found(NamedTuple):
    """Everything that the page shows; losses are sums over the tokens of a window.

    Attributes:
      tokens: predicted in each chosen window, and in each judged one.
      effects: on the chosen windows.
      michel: importance on the chosen windows, [windows, L, N].
      shares: Shapley shares of each pair of orders, nats per token, [pairs, L, N].
      best: layer and head of the largest single effect.
      after: effects when that head is gone, [windows, L, N]; 0 for itself.
      judged: the curves.
      control_effects, control: the same of the model with its numbers in another order, which has no random orders.
    """

    tokens: tuple[np.ndarray, np.ndarray]
    effects: Alone
    michel: np.ndarray
    shares: np.ndarray
    best: tuple[int, int]
    after: np.ndarray
    judged: Judged
    control_effects: Alone
    control: Judged


def measure(config: Config) -> Found:
    """Open the model and ask everything."""
    from experiments.heads.pretrained import hidden_token

    loaded = _first_layers(models.load(config.model), config.layers)
    if loaded.tokenizer is None:
        raise DataError(f"{config.model}: there is no tokenizer beside the model.")
    tokenizer, hidden = loaded.tokenizer, hidden_token(config.model, loaded)
    content = files.read_text(fetch.locate("tinyshakespeare", config.data.root) / "input.txt")
    wanted = (config.chosen + config.judged) * config.length + 1
    ids = np.asarray(tokenizer.encode(content[: 16 * wanted], add_special_tokens=False).ids, np.int32)[:wanted]
    if len(ids) < wanted:
        raise DataError(f"{config.model}: the text must have {wanted:,} tokens, got {len(ids):,}; take fewer windows.")
    read = text.Text(ids, config.length, 1, "token", _unread, tokenizer.decode, "windows of a text")
    subject = text.make_subject(loaded.model, loaded.config, read, hidden)
    windows = subject.batches
    chosen, judged = _joined(windows[: config.chosen], ROWS), _joined(windows[config.chosen :], ROWS)
    asked = _Asked(config, loaded.model, subject)
    effects = asked.alone(loaded.params, chosen, "single effects")
    sizes = _predicted(chosen), _predicted(judged)
    best = np.unravel_index(int(effects.single.sum(0).argmax()), effects.single.shape[1:])
    best = int(best[0]), int(best[1])
    after = asked.singles(_without(loaded.model, loaded.params, best), chosen, f"effects without {best[0]}·{best[1]}")
    after[(slice(None), *best)] = 0
    michel = np.concatenate([np.moveaxis(np.asarray(asked.michel(loaded.params, one)), 1, 0) for one in chosen])
    shares = asked.shapley(loaded.params, windows[: config.pairs])
    sums = (effects.single.sum(0), michel.sum(0), shares.sum(0))
    scores: dict[str, np.ndarray] = dict(zip(RANKINGS, sums, strict=True))
    control = models.shuffled(loaded.params)
    fewer = _joined(windows[: config.control], ROWS)
    control_effects = asked.alone(control, fewer, "single effects, numbers in another order")
    return Found(
        sizes, effects, michel, shares, best, after, asked.judged(loaded.params, judged, scores, config.draws),
        control_effects, asked.judged(control, judged, {RANKINGS[0]: control_effects.single.sum(0)}, 0),
    )  # fmt: skip


class _Asked:
    """The functions of a model, compiled once each for all parameters of its shape."""

    def __init__(self, config: Config, model: ModuleType, subject: Subject):
        (kind,) = subject.kinds
        self.config, self.ones = config, jnp.ones((kind.layers, kind.heads))
        together = lambda batch: max(1, TOKENS // batch.tokens.size)  # noqa: E731 - sets of heads

        def loss_of(params: Any, batch: Any) -> Callable[[Any], jax.Array]:
            return lambda gates: jnp.sum(subject.losses(params, batch, {"self": gates}) * batch.predicted, axis=-1)

        def single(params, batch):
            """[L, B, N], the cheap way."""
            without = subject.ablated(params, batch, lambda nats: jnp.sum(nats * batch.predicted, axis=-1))["self"]
            return without - loss_of(params, batch)(self.ones)[:, None]

        def joint(params, batch):
            groups = importance.layers(self.ones)
            return importance.joint(loss_of(params, batch), self.ones, groups, batch_size=together(batch)).total

        def michel(params, batch):
            return importance.michel(loss_of(params, batch), self.ones).total

        def shapley(params, batch, orders):
            tokens = jnp.sum(batch.predicted, axis=-1)
            given = {"tokens": tokens, "batch_size": together(batch)}
            return importance.shapley(loss_of(params, batch), self.ones, orders, **given).by_order

        def curves(params, batch, orders, counts):
            loss = loss_of(params, batch)
            found = importance.curves(loss, self.ones, orders, counts, batch_size=together(batch))
            return found.total, found.baseline, loss(0 * self.ones)

        self.single, self.joint, self.michel = map(jax.jit, (single, joint, michel))
        self._shapley, self._curves = jax.jit(shapley), jax.jit(curves)

    def alone(self, params: Any, batches: Sequence[Any], what: str) -> Alone:
        """Single effects, and those of whole layers."""
        single = self.singles(params, batches, what)
        each = work.each(batches, "joint effects of layers", len(batches), "batches")
        return Alone(single, np.concatenate([np.asarray(self.joint(params, one)).T for one in each]))

    def singles(self, params: Any, batches: Sequence[Any], what: str) -> np.ndarray:
        """[windows, L, N]."""
        each = work.each(batches, what, len(batches), "batches")
        return np.concatenate([np.moveaxis(np.asarray(self.single(params, one)), 1, 0) for one in each])

    def shapley(self, params: Any, windows: Sequence[Any]) -> np.ndarray:
        """Shares by a pair of orders for each window, [pairs, L, N]: orders and windows are drawn together."""
        pairs = np.asarray(importance.antithetic(jax.random.key(0), self.ones.size, len(windows)))
        each = work.each(zip(windows, pairs, strict=True), "Shapley shares", len(windows), "pairs of orders")
        return np.concatenate([np.asarray(self._shapley(params, window, pair[None])) for window, pair in each])

    def judged(self, params: Any, batches: Sequence[Any], scores: Mapping[str, np.ndarray], draws: int) -> Judged:
        """Losses while heads go in the order of scores, least first, and in random orders beside the first of them."""
        heads = self.ones.size
        counts = np.array([round(share * heads) for share in self.config.curve])
        orders = np.stack([np.argsort(score.ravel(), kind="stable") for score in scores.values()])[:, : counts[-1]]
        if draws:
            random = importance.random_orders(jax.random.key(1), self.ones, orders[0], draws)
            orders = np.concatenate([orders, np.asarray(random)])
        each = work.each(batches, "heads removed", len(batches), "batches")
        parts = [jax.device_get(self._curves(params, one, orders, counts)) for one in each]
        total, full, none = (np.concatenate(some, axis=-1) for some in zip(*parts, strict=True))
        return Judged(full, none, counts, dict(zip(scores, total, strict=False)), total[len(scores) :])


def effect(total: np.ndarray, tokens: np.ndarray, baseline: np.ndarray | float = 0.0) -> Tally:
    """A Tally of arrays whose first axis are the windows."""
    return Tally(total, tokens.reshape(-1, *(1,) * (total.ndim - 1)), np.broadcast_to(baseline, total.shape))


def _joined(windows: Sequence[Any], rows: int) -> list[Any]:
    """Batches of so many windows."""
    pieces = [windows[start : start + rows] for start in range(0, len(windows), rows)]
    return [jax.tree.map(lambda *parts: np.concatenate(parts), *some) for some in pieces]


def _first_layers(loaded: Pretrained, count: int | None) -> Pretrained:
    """The model with its first layers only; all of them if None."""
    if count is None or count >= loaded.config.num_layers:
        return loaded
    layers = jax.tree.map(lambda leaf: leaf[:count], loaded.params.stack.layers)
    params = loaded.params._replace(stack=loaded.params.stack._replace(layers=layers))
    return loaded._replace(params=params, config=replace(loaded.config, num_layers=count))


def _predicted(batches: Sequence[Any]) -> np.ndarray:
    """How many tokens are predicted in each window."""
    return np.concatenate([np.sum(batch.predicted, axis=-1) for batch in batches])


def _unread(tokens: Sequence[int]) -> list[str]:
    return [str(token) for token in tokens]


def _without(model: ModuleType, params: Any, head: tuple[int, int]) -> Any:
    """The parameters with a head that writes nothing, which is a gate of 0."""
    own = model.attentions(params)["attention"]
    return model.with_attentions(params, {"attention": own._replace(w_o=jnp.asarray(own.w_o).at[head].set(0))})
