"""The page about a model's heads: tables, figures and a view of every head on some sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mhajax import figures
from mhajax.heads import matching
from mhajax.report import roles, sections
from mhajax.report.importance import ORDERS
from mhajax.report.page import Column, Page
from mhajax.report.results import TOLERATED, Followed, Results
from mhajax.report.roles import Roles
from mhajax.report.sections import Drawings, scalar, seeds_text
from mhajax.report.subject import Subject
from mhajax.statistics import Measure


def render(subject: Subject, results: Results, trained: Sequence[Any], name: str, shown: int) -> tuple[Page, Drawings]:
    """The page and its figures.

    Args:
      subject, results, trained: as in `results.examine`, and what it returned.
      name: of the subject.
      shown: sentences in the view.
    """
    seeds = len(trained)
    of_seed = roles.roles(subject, results, 0)
    page = Page(f"What the heads of {name} do", *_lead(subject, results, seeds))
    drawings: Drawings = {}
    if results.relations:
        _relations(page, subject, results, drawings, seeds)
    if results.alignment:
        _alignment(page, subject, results, trained[0], drawings, seeds)
    sections.near_and_far(
        page, subject, results.heads, results.layers, drawings, seeds=seeds, untrained=results.untrained
    )
    sections.where(page, subject, results.best)
    _ablation(page, subject, results, of_seed, drawings)
    _pruned(page, subject, results, drawings, seeds)
    if results.stability:
        _stable(page, subject, results, drawings)
    sections.different(page, subject, results.differences, drawings, similarity=results.similarity)
    sections.every_head(page, subject, trained[0], of_seed, shown)
    _method(page, subject, seeds, _has_roles(of_seed))
    return page, drawings


def _lead(subject: Subject, results: Results, seeds: int) -> list[str]:
    heads = subject.num_heads
    models = (
        f"{seeds} trained models (seeds) of one config, {heads} heads each"
        if seeds > 1
        else f"One model, {heads} heads"
    )
    needed, removable = results.needed[subject.categories[0]], results.removable[TOLERATED[-1]]
    lines = [f"{models}, measured on {subject.size} held-out {subject.sequence}s."]
    followed = [answer for answer in results.relations if not answer.part and answer.found.difference.low > 0]
    asked = [answer for answer in results.relations if not answer.part]
    if asked:
        lines.append(
            f"Of {len(asked)} relations that were asked about, {len(followed)} are followed by a head better than by "
            "the best positional baseline."
        )
    lines.append(
        f"{_share(needed)} of the heads are of use: without one of them the loss is higher. In the order of their "
        f"importance, {_number(removable)} of {heads} heads can be removed before the perplexity is more than "
        f"{TOLERATED[-1]:.0%} higher; in one random order, {float(removable.baseline):.1f}."
    )
    return lines


def _relations(page: Page, subject: Subject, results: Results, drawings: Drawings, seeds: int) -> None:
    section = page.section("Which heads follow which relation")
    section.text(
        "For each relation: how often the key with most weight of the best head is a right one. Each seed chooses its "
        f"best head on one half of the {subject.sequence}s and is measured on the other. The baseline is the best "
        "positional one (such as a fixed offset), chosen in the same way; beside it the best head of untrained models."
    )
    whole = [answer for answer in results.relations if not answer.part]
    drawn = {
        f"{subject.kind(answer.kind).label}: {answer.name}": tuple(map(float, answer.found.best)) for answer in whole
    }
    drawn = {name: numbers for name, numbers in drawn.items() if np.isfinite(numbers).all()}
    if drawn:
        drawings["relations"] = figures.relation_accuracy(
            drawn, title="How well the best head follows each relation",
            label="share of queries whose key with most weight is right", baseline_name="positional baseline",
        )  # fmt: skip
        section.figure(
            drawings["relations"], "The best head of each relation, and the best positional baseline.", name="relations"
        )
    section.table(*_relation_table(subject, whole, seeds), caption="Relations, over all distances.")
    parts = [answer for answer in results.relations if answer.part]
    if parts:
        inner = section.section("How far heads reach")
        inner.text("The same for keys that are near or far, each with the best head at that distance.")
        inner.table(*_relation_table(subject, parts, seeds), caption="Relations by the distance between query and key.")


def _alignment(page: Page, subject: Subject, results: Results, params: Any, drawings: Drawings, seeds: int) -> None:
    section = page.section("How well cross attention aligns words")
    section.text(
        "Alignment error rate (0 is perfect) of the best cross-attention head: each target word is linked to the "
        "source word that gets most attention, in the row that writes the word or in the row that reads it. Each seed "
        "chooses its head on one half of the sentences and is measured on the other."
    )
    section.table(
        [
            "read",
            *(Column(f"error rate, against {name}", ".1%", "lower") for name in next(iter(results.alignment.values()))),
        ],
        [[reading, *map(scalar, by_baseline.values())] for reading, by_baseline in results.alignment.items()],
        caption=f"Best head of {seeds_text(seeds)}; baselines: the diagonal, and the attention of another sentence.",
    )
    aligned = subject.aligned_relation()
    assert aligned is not None
    answer = next(a for a in results.relations if (a.kind, a.name, a.part) == (aligned.kind, aligned.name, ""))
    layer, head = divmod(int(np.ravel(answer.found.chosen[0])[0]), subject.kind(aligned.kind).heads)
    batch, row = choose_sentence(subject)
    words, gold = subject.sentence(batch, row).written, subject.gold(batch)[aligned.key][row]
    captured = jax.jit(subject.capture, static_argnums=2)(params, batch, ("weights",))
    weights = np.asarray(captured[aligned.kind]["weights"])
    drawings["alignment"] = figures.alignment_matrix(
        weights[layer, row, head, : len(words.queries), : len(words.keys)], words.queries, words.keys,
        sure=[(int(t), int(s)) for t, s in np.argwhere(gold)],
        title=f"The best aligning head of the first seed, {layer}·{head}: word written, word looked at",
    )  # fmt: skip
    section.figure(drawings["alignment"], "One sentence, with the gold links framed.", name="alignment")


def choose_sentence(subject: Subject) -> tuple[Any, int]:
    """A sentence, as batch and row, that fits a page and in which the languages order their words differently."""
    rows = [(batch, row) for batch in subject.batches for row in subject.rows(batch)]
    lengths = [subject.sentence(batch, row).length for batch, row in rows]
    fits = [place for place, length in zip(rows, lengths, strict=True) if 9 <= length <= 14]
    aligned = subject.aligned
    if aligned is None or not fits:
        return rows[int(np.argmin(np.abs(np.asarray(lengths) - 11)))]

    def crossings(place: tuple[Any, int]) -> int:
        batch, row = place
        links = np.argwhere(subject.gold(batch)[aligned][row])  # (target, source), by target
        return sum(b < a for i, (_, a) in enumerate(links) for _, b in links[i:])

    return max(fits, key=crossings)


def _relation_table(
    subject: Subject, answers: Sequence[Followed], seeds: int
) -> tuple[list[str | Column], list[list[object]]]:
    columns: list[str | Column] = [
        "relation", Column("best head, against the positional baseline", ".0%"), "positional baseline",
        Column("best untrained head", ".0%", ""), "seeds with p < 0.05", "questions",
    ]  # fmt: skip
    rows: list[list[object]] = [
        [
            f"{subject.kind(answer.kind).label}: {answer.name}" + (f", {answer.part}" if answer.part else ""),
            scalar(answer.found.best), answer.baseline, float(answer.untrained.value), f"{answer.seeds} of {seeds}",
            f"{answer.asked}",
        ]
        for answer in answers
    ]  # fmt: skip
    return columns, rows


def _ablation(page: Page, subject: Subject, results: Results, of_seed: Roles, drawings: Drawings) -> None:
    section = page.section("Ablation effect of every head")
    section.text(
        f"Loss without the head minus loss with all heads, in thousandths of a nat per {subject.unit}, one head at a "
        "time; nothing is trained again. Above 0 the head is of use."
        + (" The word in a cell is the head's role (see the last section)." if _has_roles(of_seed) else "")
    )
    first = subject.categories[0]
    for kind in subject.kinds:
        effect = results.ablation[first][kind.name]
        words = [[of_seed[kind.name, layer, n].word for n in range(kind.heads)] for layer in range(kind.layers)]
        value, low, high = (1000 * part[0] for part in effect[:3])
        drawings[f"lost_{kind.name}"] = figures.head_table(
            value, title=f"{kind.title}: ablation effect of each head (first seed)",
            label=f"10⁻³ nats per {subject.unit}", baseline=0.0, words=words, interval=(low, high),
        )  # fmt: skip
        section.figure(drawings[f"lost_{kind.name}"], f"{kind.title}, first seed.", name=f"lost_{kind.name}")
    rows = [
        [category, results.needed[category], *_most_needed(subject, results, category)] for category in results.ablation
    ]
    section.table(
        ["loss on", Column("heads that are needed", ".0%"), "the most needed (first seed)", Column("costs", ".3f")],
        rows,
        caption="Needed: removal raises the loss, with false discoveries held at 5 %. Costs in nats per "
        f"{subject.unit}.",
    )  # fmt: skip


def _has_roles(of_seed: Roles) -> bool:
    return any(role.word for role in of_seed.values())


def _most_needed(subject: Subject, results: Results, category: str) -> tuple[str, Measure]:
    best: tuple[str, Measure] | None = None
    for kind in subject.kinds:
        effect = results.ablation[category][kind.name]
        layer, head = np.unravel_index(np.nanargmax(effect.value[0]), effect.value[0].shape)
        here = Measure(*(part[0, layer, head] for part in effect))
        if best is None or here.value > best[1].value:
            best = f"{kind.label} {layer}·{head}", here
    assert best is not None
    return best


def _pruned(page: Page, subject: Subject, results: Results, drawings: Drawings, seeds: int) -> None:
    heads, section = subject.num_heads, page.section("How many heads can be removed")
    section.text(
        "Heads are removed one after the other, and nothing is trained again. Importance is Michel's (the mean "
        f"size of the loss's slope along a head's gate), found on one half of the {subject.sequence}s; the loss is "
        "measured on the other."
    )
    removed = np.arange(heads + 1)
    lines = {}
    for order in ORDERS:
        value, low, high = (np.asarray(part) for part in results.pruned[order][:3])
        lines[order] = (value, low, high)
    drawings["pruning"] = figures.pruning_curve(
        removed, lines, title="Loss while heads are removed", ylabel=f"nats per {subject.unit}"
    )
    section.figure(
        drawings["pruning"], f"Mean and 95 % interval over {seeds_text(seeds)} and {subject.sequence}s.", name="pruning"
    )
    section.table(
        ["perplexity may rise by", Column(f"heads that can go, of {heads}", ".1f")],
        [[f"{share:.0%}", measure] for share, measure in results.removable.items()],
        caption="In the order of importance; the baseline removes heads in one random order, the same for all seeds.",
    )


def _stable(page: Page, subject: Subject, results: Results, drawings: Drawings) -> None:
    section = page.section("Do the same heads come back in other seeds")
    section.text(
        "Head numbers mean nothing across seeds, so the heads of each pair of seeds are matched within layers "
        f"(Hungarian algorithm) by how alike their outputs are on the same {subject.unit}s (CKA: 1 is the same up to "
        "rotation and scale)."
    )
    rows: list[list[object]] = []
    for kind in subject.kinds:
        stable = results.stability[kind.name]
        untrained = None if stable.untrained is None else float(stable.untrained.value)
        rows.append([kind.title, scalar(stable.matched), untrained])
        similar = results.similarity[kind.name][0, 1]
        blocks = np.repeat(np.arange(kind.layers), kind.heads)
        order = matching.match(similar, blocks=(blocks, blocks)).order
        drawings[f"matched_{kind.name}"] = figures.matched_heads(
            similar, order, kind.layers, title=f"{kind.title}: heads of two seeds", label="CKA of outputs",
            names=("seed 0", "seed 1"),
        )  # fmt: skip
        section.figure(
            drawings[f"matched_{kind.name}"], f"{kind.title}: before and after matching.", name=f"matched_{kind.name}"
        )
    section.table(
        ["attention", Column("likeness of matched heads", ".2f"), Column("untrained models, matched", ".2f", "")],
        rows, caption="Mean over all pairs of seeds; the baseline matches heads at random.",
    )  # fmt: skip


def _method(page: Page, subject: Subject, seeds: int, roles_found: bool) -> None:
    section = page.section("How this was measured")
    rows = f"{subject.sequence}s"
    items = [sections.intervals(subject, f"over seeds and {rows}" if seeds > 1 else f"over {rows} of one model")]
    if subject.relations:
        items.append(
            f"p: sign flips by {subject.sequence} with the largest statistic of all heads (Westfall–Young), so that "
            "looking at many heads is paid for."
        )
    if roles_found:
        items.append(sections.ROLES)
    section.items([*items, f"{subject.size} {subject.origin}."])


def _share(measure: Measure) -> str:
    return f"{float(measure.value):.0%}" + _interval(measure, ".0%")


def _number(measure: Measure) -> str:
    return f"{float(measure.value):.1f}" + _interval(measure, ".1f")


def _interval(measure: Measure, form: str) -> str:
    return "" if np.isnan(measure.low) else f" [{float(measure.low):{form}}, {float(measure.high):{form}}]"
