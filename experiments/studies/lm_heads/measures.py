"""What is measured of a language model's heads, as tallies and estimates."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import work
from experiments.data import fetch, files
from experiments.errors import DataError
from experiments.studies import models
from experiments.studies.lm_heads import BLIMP, Config
from mhajax import PerAttention, embedding, language_model
from mhajax.heads import ablation, importance, roles, surgery
from mhajax.pretrained import Pretrained
from mhajax.statistics import Measure, Report, Tally, estimate, select_and_report

ROLES = ("previous token", "same token before", "after the same token")
INDUCTION = ROLES[2]
SHARES = (0.25, 0.5)  # of the heads that are removed


class Pruned(NamedTuple):
    """A model of which heads were really removed.

    Attributes:
      share: of all heads.
      by_importance: the rise of the loss, nats per token, baseline 0.
      at_random: the same of each random set of the same layers.
      heads: N and K that are left in every layer.
      megabytes: of the parameters.
      tokens_per_second: read of one batch of windows; with all heads the first of both.
    """

    share: float
    by_importance: Measure
    at_random: list[Measure]
    heads: tuple[int, int]
    megabytes: tuple[float, float]
    tokens_per_second: tuple[float, float]


class Found(NamedTuple):
    """Everything that the page shows.

    Attributes:
      roles: of every head [L, N] by role, and of the best, against the best of shuffled parameters.
      sink: mass on the first token of a text, [L, N].
      agreement: by file, the logit difference with all heads.
      without: what of it is lost without each head, [L, N], and of the head that was chosen.
      pruned: for each share.
    """

    roles: dict[str, tuple[Measure, Report]]
    sink: Measure
    agreement: dict[str, Measure]
    without: tuple[Measure, Report]
    whole: Measure
    pruned: list[Pruned]


def measure(config: Config) -> Found:
    """Open the model and ask everything."""
    model = models.load(config.model)
    if model.model is not language_model:
        raise DataError(f"{config.model}: must be a language model, got one of {model.model.__name__}.")
    if model.tokenizer is None:
        raise DataError(f"{config.model}: there is no tokenizer beside the model.")
    text = files.read_text(fetch.locate("tinyshakespeare", config.data.root) / "input.txt")
    size = 2 * config.length
    ids = np.asarray(model.tokenizer.encode(text[: 12 * config.windows * size]).ids)
    windows = ids[: config.windows * size].reshape(config.windows, size)
    others = [models.shuffled(model.params, seed) for seed in range(config.draws)]
    return Found(
        _roles(config, model, others), _sink(model, windows), *_agreement(config, model), _prune(config, model, windows)
    )


def _roles(config: Config, model: Pretrained, others: list[Any]) -> dict[str, tuple[Measure, Report]]:
    """Mass on the keys of each role, on random tokens repeated."""
    shape = model.config
    sequences = roles.repeated_tokens(
        jax.random.key(0), shape.vocab_size, sequences=config.sequences, length=config.length, repeats=2
    )

    @jax.jit
    def of_sequence(params, tokens):
        _, seen = language_model.apply_captured(params, tokens[None], shape)
        weights, ids = seen.attention["weights"], tokens[None, None]  # [L, 1, N, T, T]
        visible = jnp.tril(jnp.ones((tokens.size, tokens.size), bool))
        found = (
            roles.previous_token(weights, visible), roles.duplicate_token(weights, visible, ids),
            roles.induction(weights, visible, ids),
        )  # fmt: skip
        whole = lambda tally: jax.tree.map(lambda a: jnp.broadcast_to(a, weights.shape[:3])[:, 0], tally)  # noqa: E731
        return tuple(map(whole, found))  # [L, N] each

    def tallies(params: Any) -> tuple[Tally, ...]:
        found = [jax.device_get(of_sequence(params, one)) for one in sequences]
        return jax.tree.map(lambda *parts: np.stack(parts), *found)  # [sequences, L, N]

    with work.piece("roles of heads", 1 + len(others), "models") as piece:
        ours = tallies(model.params)
        piece.advance(1)
        theirs = []
        for params in others:
            theirs.append(tallies(params))
            piece.advance(1)
    found = {}
    for index, name in enumerate(ROLES):
        null = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(one[index] for one in theirs))
        best = select_and_report(ours[index], heads=(1, 2), alternatives=null)
        found[name] = (estimate(ours[index]), best)
    return found


def _sink(model: Pretrained, windows: np.ndarray) -> Measure:
    """Mass on the first token, from all places but the first, [L, N]."""

    @jax.jit
    def of_window(params, tokens):
        _, seen = language_model.apply_captured(params, tokens[None], model.config)
        return seen.attention["weights"][:, 0, :, 1:, 0].sum(-1)  # [L, N]

    total = np.stack(
        [
            np.asarray(of_window(model.params, jnp.asarray(one)))
            for one in work.each(windows, "first token", len(windows), "windows")
        ]
    )
    count = np.full(total.shape, windows.shape[1] - 1.0)
    uniform = np.broadcast_to((1 / np.arange(2, windows.shape[1] + 1)).sum(), total.shape)
    return estimate(Tally(total, count, uniform))


def _agreement(config: Config, model: Pretrained) -> tuple[dict[str, Measure], tuple[Measure, Report], Measure]:
    """Logit of the right form minus that of the wrong one after each prefix, and without each head."""
    assert model.tokenizer is not None
    folder = fetch.locate("blimp", config.data.root)
    prefixes, forms, files_of = [], [], []
    for name in BLIMP:
        taken = 0
        for line in files.read_lines(folder / name):
            pair = json.loads(line)
            right, wrong = (
                model.tokenizer.encode(f" {pair[f'one_prefix_word_{which}']}").ids for which in ("good", "bad")
            )
            first = next((i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), None)
            if first is None or taken == config.pairs:
                continue
            prefixes.append([*model.tokenizer.encode(pair["one_prefix_prefix"]).ids, *right[:first]])
            forms.append((right[first], wrong[first]))
            files_of.append(name)
            taken += 1

    @jax.jit
    def differences(params, tokens, lengths, forms):
        def loss_fn(features):  # the difference at the last token of each prefix, [B]
            last = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)[:, 0]
            rows = params.table[forms]  # [B, 2, D]
            return jnp.einsum("bd,bfd->bf", last, rows) @ jnp.array([1.0, -1.0])

        stages = language_model.stages(params, tokens, model.config)
        features = language_model.features(params, tokens, model.config)
        return loss_fn(features), ablation.of_stages(stages, loss_fn).attention  # [B], [L, B, N]

    whole, lost, number = [], [], []
    some = list(models.batches(prefixes, tokens=256, step=4))
    for batch in work.each(iter(some), "agreement without each head", len(some), "batches"):
        rows = np.array([forms[max(n, 0)] for n in batch.index])
        full, without = jax.device_get(differences(model.params, batch.tokens, np.maximum(batch.lengths, 1), rows))
        real = batch.index >= 0
        whole.append(full[real])
        lost.append((full[:, None] - np.moveaxis(without, 1, 0).reshape(len(full), -1))[real])
        number.append(batch.index[real])
    order = np.argsort(np.concatenate(number))
    whole, lost = np.concatenate(whole)[order], np.concatenate(lost)[order]
    lost = lost.reshape(len(whole), model.config.num_layers, model.config.num_heads)
    ones, none = np.ones(len(whole)), np.zeros(len(whole))
    by_file = {name: estimate(Tally(*(a[np.array(files_of) == name] for a in (whole, ones, none)))) for name in BLIMP}
    tally = Tally(lost, np.ones(lost.shape), np.zeros(lost.shape))
    best = select_and_report(tally, heads=(1, 2))
    return by_file, (estimate(tally), best), estimate(Tally(whole, ones, none))


def _prune(config: Config, model: Pretrained, windows: np.ndarray) -> list[Pruned]:
    """Heads removed by their importance on the first half of the windows, measured on the second."""
    shape, half = model.config, len(windows) // 2
    size = (shape.num_layers, shape.num_heads)

    @partial(jax.jit, static_argnums=1)
    def nats(params, config, tokens, gates=None):
        """Of every window, [B], summed over its tokens."""
        x = language_model.features(params, tokens[:, :-1], config, gates=gates)
        logits = embedding.logits(params.table, x)
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, -1) - picked, -1)

    @jax.jit
    def slopes(params, tokens):
        loss = lambda gates: nats(params, shape, tokens, gates)  # noqa: E731
        return importance.michel(loss, PerAttention(attention=jnp.ones(size))).attention.total  # [L, B, N]

    parts = [jnp.asarray(one[None]) for one in windows]
    each = work.each(iter(parts[:half]), "importance", half, "windows")
    scores = np.sum([np.asarray(slopes(model.params, one)).sum(1) for one in each], axis=0)  # [L, N]
    later = parts[half:]
    full = np.concatenate([np.asarray(nats(model.params, shape, one)) for one in later])
    counts = np.full(len(full), windows.shape[1] - 1.0)

    def rise(params: Any, config: Any) -> Measure:
        found = np.concatenate([np.asarray(nats(params, config, one)) for one in later])
        return estimate(Tally(found - full, counts, np.zeros(len(full))))

    def speed(params: Any, config: Any) -> float:
        batch = jnp.asarray(np.concatenate([windows] * 2)[:8])
        nats(params, config, batch).block_until_ready()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            nats(params, config, batch).block_until_ready()
            times.append(time.perf_counter() - began)
        return batch.size / float(np.median(times))

    weight = lambda params: sum(a.nbytes for a in jax.tree.leaves(params)) / 1e6  # noqa: E731
    before, found = speed(model.params, shape), []
    random = np.random.default_rng(0)
    with work.piece("heads removed", len(SHARES) * (1 + config.draws), "models") as piece:
        for share in SHARES:
            keep = np.ones(size, bool)
            keep.ravel()[np.argsort(scores.ravel())[: round(share * keep.size)]] = False
            small, smaller = surgery.prune(model.params, shape, PerAttention(attention=keep))
            by_importance = rise(small, smaller)
            piece.advance(1)
            at_random = []
            for _ in range(config.draws):
                gates = np.stack([random.permutation(row) for row in keep]).astype(np.float32)  # as many of every layer
                wanted = PerAttention(attention=jnp.asarray(gates))
                gated = np.concatenate([np.asarray(nats(model.params, shape, one, wanted)) for one in later])
                at_random.append(estimate(Tally(gated - full, counts, np.zeros(len(full)))))
                piece.advance(1)
            found.append(Pruned(
                share, by_importance, at_random, (smaller.num_heads, smaller.kv_heads),
                (weight(model.params), weight(small)), (before, speed(small, smaller)),
            ))  # fmt: skip
    return found
