"""The small table of what each head of a translator does, measured on held-out sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.data import batches, grammar
from mhajax.heads import patterns, statistics
from mhajax.heads.statistics import Estimate

_OFFSETS = range(-8, 9)


class Question(NamedTuple):
    """Something a head may do: which key is right for which query, by gold.

    Attributes:
      name: as the table shows it.
      attention: "encoder", "decoder" or "cross".
      gold: pair → (query, key) indices.
    """

    name: str
    attention: str
    gold: Callable[[grammar.Pair], Sequence[tuple[int, int]]]


def _links(targets: Sequence[int]) -> list[tuple[int, int]]:
    return [(place, target) for place, target in enumerate(targets) if target >= 0]


# In the decoder row t reads target word t - 1 (row 0 reads the beginning) and writes word t.
QUESTIONS = (
    Question("verb → subject", "encoder", lambda pair: _links(pair.source.subjects)),
    Question("pronoun → noun", "encoder", lambda pair: _links(pair.source.antecedents)),
    Question("bank → cue", "encoder", lambda pair: _links(pair.cues)),
    Question("verb → subject", "decoder", lambda pair: [(v + 1, s + 1) for v, s in _links(pair.target.subjects)]),
    Question("aligned, written", "cross", lambda pair: [(target, source) for source, target in pair.alignment]),
    Question("aligned, read", "cross", lambda pair: [(target + 1, source) for source, target in pair.alignment]),
)


class Row(NamedTuple):
    """One head: numbers with intervals by the name of the measure."""

    attention: str
    layer: int
    head: int
    measures: dict[str, Estimate]


def measure(
    capture: Callable[[batches.PairBatch], Any],
    pairs: Sequence[tuple[list[int], list[int]]],
    gold: Sequence[grammar.Pair] | None,
    boundaries: tuple[int, ...],
) -> tuple[list[Row], dict[tuple[str, str], float]]:
    """Measure every head on held-out sentences.

    Args:
      capture: batch → `translator.Seen` with weights [L, B, N, T, S].
      pairs: token ids.
      gold: annotations of the same sentences, when a token is a word; else None.
      boundaries: lengths to pad to.

    Returns:
      A row per head, and for (attention, question) the best that a fixed offset reaches.
    """
    sums: dict[tuple[str, str], list[np.ndarray]] = {}
    counts: dict[tuple[str, str], list[np.ndarray]] = {}
    by_offset: dict[tuple[str, str], list[np.ndarray]] = {}
    for batch in batches.evaluation_pairs(pairs, batch_size=min(50, len(pairs)), boundaries=boundaries):
        real = batch.index >= 0
        weights = capture(batch)
        spread = jax.device_get(_spread(weights, batch.source_lengths, batch.target_lengths))
        for key, (total, count) in spread.items():
            sums.setdefault(key, []).append(np.moveaxis(total, 1, 0)[real])  # [B, L, N]
            counts.setdefault(key, []).append(count[real])
        if gold is None:
            continue
        for question in QUESTIONS:
            key = (question.attention, question.name)
            array = getattr(weights, question.attention)["weights"]  # [L, B, N, T, S]
            right = np.zeros((array.shape[1], *array.shape[3:]), bool)
            for row, number in enumerate(batch.index):
                if number >= 0:
                    for query, answer in question.gold(gold[number]):
                        right[row, query, answer] = True
            asked: np.ndarray = np.any(right, axis=-1)
            hit = np.asarray(patterns.hits(array, right[None, :, None])) & asked[None, :, None]
            sums.setdefault(key, []).append(np.moveaxis(hit.sum(-1), 1, 0)[real])
            counts.setdefault(key, []).append(asked.sum(-1)[real])
            by_offset.setdefault(key, []).append(_offset_hits(right)[real])
    baseline = {
        key: float(np.concatenate(hit).sum(0).max() / max(np.concatenate(counts[key]).sum(), 1))
        for key, hit in by_offset.items()
    }
    estimates = {
        key: statistics.ratio(np.concatenate(sums[key]), np.concatenate(counts[key])[:, None, None]) for key in sums
    }
    return [row for attention in ("encoder", "decoder", "cross") for row in _rows(attention, estimates)], baseline


def show(console: Console, rows: list[Row], baseline: dict[tuple[str, str], float]) -> None:
    """Print a table for each kind of attention, with the best fixed offset as its last line."""
    for attention, title in (
        ("encoder", "Encoder heads: source to source"),
        ("decoder", "Decoder heads: target to target"),
        ("cross", "Cross-attention heads: target to source"),
    ):
        of_kind = [row for row in rows if row.attention == attention]
        names = list(of_kind[0].measures)
        table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None, padding=(0, 1))
        table.add_column("layer·head", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        asked = [name for name in names if (attention, name) in baseline]
        best = {name: np.nanmax([row.measures[name].value for row in of_kind]) for name in asked}
        for row in of_kind:
            cells = [_cell(name, row.measures[name], row.measures[name].value == best.get(name)) for name in names]
            table.add_row(f"{row.layer}·{row.head}", *cells)
        if best:
            cells = [f"{100 * baseline[attention, name]:.0f}{' ' * 11}" if name in best else "" for name in names]
            table.add_row("best offset", *cells, style="dim")
        console.print(table)
        console.print()
    console.print(
        "distance: tokens between query and what it looks at; entropy: 0 is one key, 1 all alike. Relations: % of the "
        "queries whose most attended key is the right one, with the 95 % interval over sentences; best offset is what "
        "always looking the same number of words away would reach." if baseline else
        "distance: tokens between query and what it looks at; entropy: 0 is one key, 1 all alike.",
        style="dim", highlight=False,
    )  # fmt: skip
    console.print()


def as_json(rows: list[Row], baseline: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """The rows as plain objects: value, low, high and, where there is one, baseline of every measure."""
    return [
        {
            "attention": row.attention, "layer": row.layer, "head": row.head,
            "measures": {
                name: {
                    **{part: _rounded(value) for part, value in estimate._asdict().items()},
                    **({"fixed_offset": round(baseline[key], 4)} if (key := (row.attention, name)) in baseline else {}),
                }
                for name, estimate in row.measures.items()
            },
        }
        for row in rows
    ]  # fmt: skip


def _rounded(value: np.ndarray) -> float | None:
    """Four decimals; null in JSON where nothing could be measured."""
    return None if np.isnan(value) else round(float(value), 4)


def _cell(name: str, estimate: Estimate, best: bool) -> str:
    if name == "distance":
        return f"{estimate.value:.1f}"
    if name == "entropy":
        return f"{estimate.value:.2f}"
    if np.isnan(estimate.value):
        return "–"
    value, low, high = (100 * part for part in estimate)
    interval = f"{low:.0f}–{high:.0f}"
    return f"{'[bold]' if best else ''}{value:.0f}{'[/bold]' if best else ''} [dim]{interval:>10}[/dim]"


def _rows(attention: str, estimates: dict[tuple[str, str], Estimate]) -> list[Row]:
    mine = {name: estimate for (kind, name), estimate in estimates.items() if kind == attention}
    layers, heads = next(iter(mine.values())).value.shape
    return [
        Row(attention, layer, head, {name: Estimate(*(a[layer, head] for a in e)) for name, e in mine.items()})
        for layer in range(layers)
        for head in range(heads)
    ]


@jax.jit
def _spread(seen, source_lengths, target_lengths):
    """Sums [L, B, N] of distance and entropy over the real queries, and their number [B], for each attention."""
    out = {}
    for name, queries, keys in (
        ("encoder", source_lengths, source_lengths),
        ("decoder", target_lengths, None),
        ("cross", target_lengths, source_lengths),
    ):
        weights = getattr(seen, name)["weights"]  # [L, B, N, T, S]
        t, s = jnp.arange(weights.shape[-2]), jnp.arange(weights.shape[-1])
        visible = t[None, :] + 1 if keys is None else keys[:, None]
        real = (t[None, :] < queries[:, None])[None, :, None]
        for measure, value in (
            ("distance", patterns.mean_distance(weights, t, s)),
            ("entropy", patterns.entropy(weights, visible[None, :, None])),
        ):
            out[name, measure] = (jnp.sum(jnp.where(real, value, 0), axis=-1), queries)
    return out


def _offset_hits(right: np.ndarray) -> np.ndarray:
    """For each sentence and each offset, how many gold links [B, T, S] lie on that diagonal: [B, offsets]."""
    queries = np.arange(right.shape[1])
    hits = []
    for offset in _OFFSETS:
        keys = queries + offset
        inside = (keys >= 0) & (keys < right.shape[2])
        hits.append(right[:, queries[inside], keys[inside]].sum(-1))
    return np.stack(hits, axis=-1)
