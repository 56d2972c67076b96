"""Sections of the page that need attention weights only: of a model, and of plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mhajax import figures, view
from mhajax.figures import Drawing
from mhajax.report.page import Column, Page
from mhajax.report.roles import Roles
from mhajax.report.subject import Kind, Subject
from mhajax.statistics import Measure, Report

Drawings = dict[str, Drawing]
Measures = Mapping[str, Mapping[str, Measure]]  # kind of attention → measure
VIEWED = 128  # tokens of a sentence that the view shows at most; the weights of all heads grow with its square
_SHORT, _LONG = 7, 14  # tokens of the sentences that the view would rather show
_ROOM = 2**22  # weights in the view, of sentences longer than that: each is more than a byte of the page


def near_and_far(
    page: Page, subject: Subject, heads: Measures, layers: Measures, drawings: Drawings, *,
    seeds: int, untrained: Measures | None = None,
) -> None:  # fmt: skip
    """How far and how widely heads look: a figure of every head, and a table of the layers."""
    first = " (first seed)" if untrained is not None else ""
    section = page.section("Near and far")
    section.text(
        f"Distance: {subject.unit}s between a query and what it looks at. Entropy: 0 is one key, 1 all visible keys "
        "alike. The baseline is uniform attention to the same keys."
    )
    for kind in subject.kinds:
        measures, name = heads[kind.name], f"near_and_far_{kind.name}"
        labels = {"distance": f"mean distance ({subject.unit}s)", "entropy": "entropy (share of the largest)"}
        drawings[name] = figures.by_layer(
            {label: measures[measure].value[0] for measure, label in labels.items()},
            title=f"{kind.title}: how far and how widely each head looks{first}",
            baselines={label: measures[measure].baseline[0] for measure, label in labels.items()},
        )
        section.figure(drawings[name], f"{kind.title}{', first seed' if first else ''}.", name=name)
    before = [Column("untrained", ".2f", "")] if untrained is not None else []
    rows: list[list[object]] = []
    for kind in subject.kinds:
        for layer in range(kind.layers):
            row: list[object] = [f"{kind.label}, layer {layer}"]
            for measure in ("distance", "entropy"):
                row.append(at(layers[kind.name][measure], layer))
                row += [] if untrained is None else [float(at(untrained[kind.name][measure], layer).value)]
            rows.append([*row, at(layers[kind.name]["first token"], layer)])
    over = f"{seeds_text(seeds)} and {subject.sequence}s" if untrained is not None else f"and {subject.sequence}s"
    comma = ", " if untrained is not None else " "
    section.table(
        [
            "layer", Column("distance", ".2f", ""), *before, Column("entropy", ".2f", ""), *before,
            Column(f"on the first {subject.unit}", ".0%"),
        ],
        rows,
        caption=f"Means over the heads of a layer{comma}{over}; baseline: uniform attention.",
    )  # fmt: skip


def where(page: Page, subject: Subject, best: Mapping[str, Mapping[str, Report]]) -> None:
    """The head that looks most at each place."""
    section = page.section("Where heads look")
    section.text(
        "For each place, the share of its attention that the head gives it that does so most, chosen on one half of "
        f"the {subject.sequence}s and measured on the other. The baseline is uniform attention to the same keys."
    )
    rows = [
        [f"{kind.label}: {name}", scalar(report.best)]
        for kind in subject.kinds
        for name, report in best[kind.name].items()
    ]
    section.table(["place", Column("best head", ".0%")], rows, caption="The head that looks there most.")


def different(
    page: Page, subject: Subject, differences: Measures, drawings: Drawings, *,
    similarity: Mapping[str, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """How the heads of a layer differ; with how alike their outputs are [seeds, seeds, L·N, L·N], a map of them."""
    section = page.section("Do heads differ")
    text = (
        "Over all pairs of heads of a layer: how different the places are where they look (Jensen–Shannon divergence: "
        "0 the same, 1 no key in common)"
    )
    if similarity is None:
        section.text(f"{text}. The baseline is the same heads with the keys of one of them shuffled.")
    else:
        section.text(f"{text}, and how alike what they write is (cosine). The baseline is untrained heads.")
    names = list(next(iter(differences.values())))
    rows = [
        [f"{kind.label}, layer {layer}", *(at(differences[kind.name][name], layer) for name in names)]
        for kind in subject.kinds
        for layer in range(kind.layers)
    ]
    better = "" if similarity is None else "higher"
    columns = [Column(name, ".2f", better if "look" in name else "") for name in names]
    section.table(["layer", *columns], rows, caption="Means over pairs of heads.")
    for kind in subject.kinds if similarity is not None else ():
        assert similarity is not None
        alike = similarity[kind.name][0, 0]
        name = f"map_{kind.name}"
        drawings[name] = figures.head_map(
            np.sqrt(np.maximum(1 - (alike + alike.T) / 2, 0)) * (1 - np.eye(len(alike))), kind.layers,
            title=f"{kind.title}: heads as near as their outputs are alike (first seed)",
        )  # fmt: skip
        section.figure(drawings[name], f"{kind.title}: distance is √(1 - CKA), in two dimensions.", name=name)


def every_head(page: Page, subject: Subject, params: Any, roles: Roles, shown: int, which: str = "First seed.") -> None:
    """A view of every head on some sentences."""
    section = page.section("See every head")
    several = "an attention, " if len(subject.kinds) > 1 else ""
    longest = max(subject.sentence(batch, row).length for batch in subject.batches for row in subject.rows(batch))
    cut = f"Of a {subject.sequence} the first {VIEWED} {subject.unit}s are shown." if longest > VIEWED else ""
    choose = f"Choose a {subject.sequence}, {several}layers and heads; hover or tap a {subject.unit}."
    section.text(" ".join(filter(None, (choose, which, cut))))
    titles = {kind.name: kind.title for kind in subject.kinds}
    notes = {(titles[kind], layer, n): role.note for (kind, layer, n), role in roles.items() if role.note}
    parts = ("Attention of every head.", "Frames are gold links." if subject.relations else "", subject.view_note)
    section.view(
        view.heads(sentences(subject, params, shown), notes=notes, title="Every head", unit=subject.unit),
        " ".join(filter(None, parts)),
    )


def sentences(subject: Subject, params: Any, shown: int) -> list[view.Sentence]:
    """Some sentences with the weights of every head: every so many of the corpus, from short to long.

    Those of 7 to 14 tokens, if there are any. Of a long one the first `VIEWED` tokens: what an attention to the past
    does there does not hang on what follows; and no more of them than a page has room for.
    """
    capture = jax.jit(subject.capture, static_argnums=2)
    rows = [(b, r) for b, batch in enumerate(subject.batches) for r in subject.rows(batch)]
    lengths = [subject.sentence(subject.batches[b], r).length for b, r in rows]
    wanted = [i for i, length in enumerate(lengths) if _SHORT <= length <= _LONG]
    if not wanted:
        wanted = [i for i, length in enumerate(lengths) if length > _LONG] or [int(np.argmax(lengths))]
        room = _ROOM // (subject.num_heads * min(max(lengths), VIEWED) ** 2)
        shown = min(shown, max(1, room))
    chosen = [wanted[i] for i in np.linspace(0, len(wanted) - 1, min(shown, len(wanted))).astype(int)]
    found = []
    for b, r in (rows[i] for i in chosen):
        batch = subject.batches[b]
        captured, gold, sentence = capture(params, batch, ("weights",)), subject.gold(batch), subject.sentence(batch, r)
        attentions = {}
        for kind in subject.kinds:
            queries, keys = (side[:VIEWED] for side in sentence.pieces[kind.name])
            weights = np.asarray(captured[kind.name]["weights"])[:, r, :, : len(queries), : len(keys)]
            links = [(t, s) for t, s in _links(subject, kind, gold, r) if max(t, s) < VIEWED]
            attentions[kind.title] = view.Attention(queries, keys, weights, links)
        found.append(view.Sentence(sentence.text, attentions))
    return found


def _links(subject: Subject, kind: Kind, gold: Mapping[str, np.ndarray], row: int) -> list[tuple[int, int]]:
    """The gold links of a sentence that are drawn: where words are aligned, the alignment of what is written alone."""
    drawn = [relation for relation in subject.relations if relation.kind == kind.name]
    aligned = [relation for relation in drawn if relation.key == subject.aligned]
    return sorted({(int(t), int(s)) for r in aligned or drawn for t, s in np.argwhere(gold[r.key][row])})


def intervals(subject: Subject, over: str) -> str:
    """What the intervals say, which are taken over `over`: for the section on how it was measured."""
    rows = f"{subject.sequence}s"
    return (
        f"Intervals are 95 %, {over}: they say what other {rows} (and seeds) like these would give. In "
        f"simulations they cover 94 to 99 times in 100, but about 90 where few seeds, or few {rows} of one model, are "
        "drawn from a very skewed distribution (exponential), and 2 seeds that differ make them very long."
    )


ROLES = "A head has a role if the lower end of its interval is at least a quarter of the way from the baseline to 1."


def at(measure: Measure, *position: int) -> Measure:
    """One layer, or one head, of a measure."""
    return Measure(*(np.asarray(part)[position] for part in measure))


def scalar(measure: Measure) -> Measure:
    """A measure of one number, without axes."""
    return Measure(*(np.asarray(part).reshape(()) for part in measure))


def seeds_text(count: int) -> str:
    """So many seeds, in words."""
    return "one seed" if count == 1 else f"{count} seeds"
