"""The report of a run's heads: one page with tables, figures and a view of every head on some sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.heads import gold, roles
from experiments.heads.costs import ORDERS
from experiments.heads.examined import Examined, Kind
from experiments.heads.findings import TOLERATED, Findings, Relation
from experiments.heads.roles import Role
from mhajax import figures, view
from mhajax.figures import Drawing
from mhajax.heads import matching
from mhajax.report.page import Column, Page
from mhajax.statistics import Measure

Drawings = dict[str, Drawing]
VIEWED = 128  # words of a sentence that the view shows at most; the weights of all heads grow with its square
_ACROSS = {"encoder": "encoder", "decoder": "decoder", "cross": "across", "self": "attention"}


def make(model: Examined, found: Findings, trained: Sequence[Any], name: str, shown: int) -> tuple[Page, Drawings]:
    """The page and its figures.

    Args:
      model, found, trained: as in `findings.examine`, and what it returned.
      name: of the run.
      shown: sentences in the view.
    """
    seeds, heads = len(trained), sum(kind.layers * kind.heads for kind in model.kinds)
    sentences = sum(int((model.index(batch) >= 0).sum()) for batch in model.batches)
    of_seed = roles.roles(model, found, 0)
    page = Page(f"What the heads of {name} do", *_lead(model, found, seeds, heads, sentences))
    drawings: Drawings = {}
    if found.relations:
        _relations(page, found, drawings, seeds)
    if found.alignment:
        _alignment(page, model, found, trained[0], drawings, seeds)
    _near_and_far(page, model, found, drawings, seeds)
    _places(page, found)
    _lost(page, model, found, of_seed, drawings)
    _pruned(page, model, found, drawings, heads, seeds)
    if found.stability:
        _stable(page, model, found, drawings)
    _different(page, model, found, drawings)
    _view(page, model, trained[0], of_seed, shown)
    _method(page, model, seeds, sentences, _has_roles(of_seed))
    return page, drawings


def _lead(model: Examined, found: Findings, seeds: int, heads: int, sentences: int) -> list[str]:
    models = (
        f"{seeds} trained models (seeds) of one config, {heads} heads each"
        if seeds > 1
        else f"One model, {heads} heads"
    )
    needed, removable = found.needed[model.categories[0]], found.removable[TOLERATED[-1]]
    lines = [f"{models}, measured on {sentences} held-out {model.sequence}s."]
    followed = [answer for answer in found.relations if not answer.part and answer.found.difference.low > 0]
    asked = [answer for answer in found.relations if not answer.part]
    if asked:
        lines.append(
            f"Of {len(asked)} relations that were asked about, {len(followed)} are followed by a head better than by "
            "the best rule that knows no words."
        )
    lines.append(
        f"{_share(needed)} of the heads are of use: without one of them the loss is higher. In the order of their "
        f"importance, {_number(removable)} of {heads} heads can be removed before the perplexity is more than "
        f"{TOLERATED[-1]:.0%} higher; in one random order, {float(removable.baseline):.1f}."
    )
    return lines


def _relations(page: Page, found: Findings, drawings: Drawings, seeds: int) -> None:
    section = page.section("Which heads follow the grammar")
    section.text(
        "For each relation: how often the strongest key of the best head is a right one. Each seed chooses its "
        "best head on one half of the sentences and is measured on the other. The baseline is the best rule that "
        "knows no words (a fixed offset, the nearest noun), chosen in the same way; beside it the best head of "
        "untrained models."
    )
    whole = [answer for answer in found.relations if not answer.part]
    drawn = {f"{_ACROSS[answer.kind]}: {answer.name}": tuple(map(float, answer.found.best)) for answer in whole}
    drawn = {name: numbers for name, numbers in drawn.items() if np.isfinite(numbers).all()}
    if drawn:
        drawings["relations"] = figures.relation_accuracy(
            drawn, title="How well the best head follows each relation",
            label="share of queries whose strongest key is right", baseline_name="best rule",
        )  # fmt: skip
        section.figure(drawings["relations"], "The best head of each relation, and the best rule.", name="relations")
    section.table(*_relation_table(whole, seeds), caption="Relations, over all distances.")
    parts = [answer for answer in found.relations if answer.part]
    if parts:
        inner = section.section("How far heads reach")
        inner.text("The same for pronouns whose noun is near or far, each with the best head at that distance.")
        inner.table(*_relation_table(parts, seeds), caption="Relations by the distance between query and key.")


def _alignment(page: Page, model: Examined, found: Findings, params: Any, drawings: Drawings, seeds: int) -> None:
    section = page.section("How well cross attention aligns words")
    section.text(
        "Alignment error rate (0 is perfect) of the best cross-attention head: each target word is linked to the "
        "source word that gets most attention, in the row that writes the word or in the row that reads it. Each seed "
        "chooses its head on one half of the sentences and is measured on the other."
    )
    section.table(
        [
            "read",
            *(Column(f"error rate, against {name}", ".1%", "lower") for name in next(iter(found.alignment.values()))),
        ],
        [[reading, *map(_scalar, by_baseline.values())] for reading, by_baseline in found.alignment.items()],
        caption=f"Best head of {_seeds(seeds)}; baselines: the diagonal, and the attention of another sentence.",
    )
    answer = next(a for a in found.relations if (a.kind, a.name, a.part) == ("cross", gold.ALIGNED.name, ""))
    cross = next(kind for kind in model.kinds if kind.name == "cross")
    layer, head = divmod(int(np.ravel(answer.found.chosen[0])[0]), cross.heads)
    batch, row = worth_showing(model)
    words, right = model.sentence(batch, row).written, model.right(batch)[gold.ALIGNED.key][row]
    weights = np.asarray(jax.jit(model.capture, static_argnums=2)(params, batch, ("weights",))["cross"]["weights"])
    drawings["alignment"] = figures.alignment_matrix(
        weights[layer, row, head, : len(words.queries), : len(words.keys)], words.queries, words.keys,
        sure=[(int(t), int(s)) for t, s in np.argwhere(right)],
        title=f"The best aligning head of the first seed, {layer}·{head}: word written, word looked at",
    )  # fmt: skip
    section.figure(drawings["alignment"], "One sentence, with the gold links framed.", name="alignment")


def worth_showing(model: Examined) -> tuple[Any, int]:
    """A sentence, as batch and row, that fits a page and in which the languages order their words differently."""
    rows = [(batch, row) for batch in model.batches for row in model.rows(batch)]
    lengths = [model.sentence(batch, row).length for batch, row in rows]
    fits = [place for place, length in zip(rows, lengths, strict=True) if 9 <= length <= 14]
    if not model.relations or not fits:
        return rows[int(np.argmin(np.abs(np.asarray(lengths) - 11)))]

    def crossings(place: tuple[Any, int]) -> int:
        batch, row = place
        links = np.argwhere(model.right(batch)[gold.ALIGNED.key][row])  # (target, source), by target
        return sum(b < a for i, (_, a) in enumerate(links) for _, b in links[i:])

    return max(fits, key=crossings)


def _relation_table(answers: Sequence[Relation], seeds: int) -> tuple[list[str | Column], list[list[object]]]:
    columns: list[str | Column] = [
        "relation", Column("best head, against the best rule", ".0%"), "best rule",
        Column("best untrained head", ".0%", ""), "seeds with p < 0.05", "questions",
    ]  # fmt: skip
    rows: list[list[object]] = [
        [
            f"{_ACROSS[answer.kind]}: {answer.name}" + (f", {answer.part}" if answer.part else ""),
            _scalar(answer.found.best), answer.rule, float(answer.untrained.value), f"{answer.seeds} of {seeds}",
            f"{answer.asked}",
        ]
        for answer in answers
    ]  # fmt: skip
    return columns, rows


def _near_and_far(page: Page, model: Examined, found: Findings, drawings: Drawings, seeds: int) -> None:
    section = page.section("Near and far")
    section.text(
        f"Distance: {model.unit}s between a query and what it looks at. Entropy: 0 is one key, 1 all visible keys "
        "alike. The baseline is uniform attention to the same keys."
    )
    for kind in model.kinds:
        measures = found.heads[kind.name]
        names = {"distance": f"mean distance ({model.unit}s)", "entropy": "entropy (share of the largest)"}
        drawings[f"near_and_far_{kind.name}"] = figures.by_layer(
            {label: measures[name].value[0] for name, label in names.items()},
            title=f"{kind.title}: how far and how widely each head looks (first seed)",
            baselines={label: measures[name].baseline[0] for name, label in names.items()},
        )
        section.figure(
            drawings[f"near_and_far_{kind.name}"], f"{kind.title}, first seed.", name=f"near_and_far_{kind.name}"
        )
    rows: list[list[object]] = []
    for kind in model.kinds:
        for layer in range(kind.layers):
            of_layer = {name: _at(measure, layer) for name, measure in found.layers[kind.name].items()}
            early = {name: _at(measure, layer) for name, measure in found.untrained[kind.name].items()}
            rows.append([
                f"{_ACROSS[kind.name]}, layer {layer}", of_layer["distance"], float(early["distance"].value),
                of_layer["entropy"], float(early["entropy"].value), of_layer["first token"],
            ])  # fmt: skip
    section.table(
        [
            "layer", Column("distance", ".2f", ""), Column("untrained", ".2f", ""), Column("entropy", ".2f", ""),
            Column("untrained", ".2f", ""), Column(f"on the first {model.unit}", ".0%"),
        ],
        rows,
        caption=f"Means over the heads of a layer, {_seeds(seeds)} and {model.sequence}s; baseline: uniform attention.",
    )  # fmt: skip


def _places(page: Page, found: Findings) -> None:
    section = page.section("Where heads look")
    section.text(
        "For each place, the share of its attention that the head gives it that does so most, chosen on one half of "
        "the sentences and measured on the other. The baseline is uniform attention to the same keys."
    )
    rows = [
        [f"{_ACROSS[kind]}: {name}", _scalar(report.best)]
        for kind, of in found.best.items()
        for name, report in of.items()
    ]
    section.table(["place", Column("best head", ".0%")], rows, caption="The head that looks there most.")


def _lost(
    page: Page, model: Examined, found: Findings, of_seed: dict[tuple[str, int, int], Role], drawings: Drawings
) -> None:
    section = page.section("What is lost without a head")
    section.text(
        f"Loss without the head minus loss with all heads, in thousandths of a nat per {model.unit}, one head at a "
        "time; nothing is trained again. Above 0 the head is of use."
        + (" The word in a cell is the head's role (see the last section)." if _has_roles(of_seed) else "")
    )
    first = model.categories[0]
    for kind in model.kinds:
        lost = found.lost[first][kind.name]
        words = [[of_seed[kind.name, layer, n].word for n in range(kind.heads)] for layer in range(kind.layers)]
        value, low, high = (1000 * part[0] for part in lost[:3])
        drawings[f"lost_{kind.name}"] = figures.head_table(
            value, title=f"{kind.title}: what is lost without each head (first seed)",
            label=f"10⁻³ nats per {model.unit}", baseline=0.0, words=words, interval=(low, high),
        )  # fmt: skip
        section.figure(drawings[f"lost_{kind.name}"], f"{kind.title}, first seed.", name=f"lost_{kind.name}")
    rows = [[category, found.needed[category], *_most_needed(model, found, category)] for category in found.lost]
    section.table(
        ["loss on", Column("heads that are needed", ".0%"), "the most needed (first seed)", Column("costs", ".3f")],
        rows,
        caption="Needed: removal raises the loss, with false discoveries held at 5 %. Costs in nats per "
        f"{model.unit}.",
    )  # fmt: skip


def _has_roles(of_seed: dict[tuple[str, int, int], Role]) -> bool:
    return any(role.word for role in of_seed.values())


def _most_needed(model: Examined, found: Findings, category: str) -> tuple[str, Measure]:
    best: tuple[str, Measure] | None = None
    for kind in model.kinds:
        lost = found.lost[category][kind.name]
        layer, head = np.unravel_index(np.nanargmax(lost.value[0]), lost.value[0].shape)
        here = Measure(*(part[0, layer, head] for part in lost))
        if best is None or here.value > best[1].value:
            best = f"{_ACROSS[kind.name]} {layer}·{head}", here
    assert best is not None
    return best


def _pruned(page: Page, model: Examined, found: Findings, drawings: Drawings, heads: int, seeds: int) -> None:
    section = page.section("How many heads can be removed")
    section.text(
        "Heads are removed one after the other, and nothing is trained again. Importance is Michel's (the mean "
        f"size of the loss's slope along a head's gate), found on one half of the {model.sequence}s; the loss is "
        "measured on the other."
    )
    removed = np.arange(heads + 1)
    lines = {}
    for order in ORDERS:
        value, low, high = (np.asarray(part) for part in found.pruned[order][:3])
        lines[order] = (value, low, high)
    drawings["pruning"] = figures.pruning_curve(
        removed, lines, title="Loss while heads are removed", ylabel=f"nats per {model.unit}"
    )
    section.figure(
        drawings["pruning"], f"Mean and 95 % interval over {_seeds(seeds)} and {model.sequence}s.", name="pruning"
    )
    section.table(
        ["perplexity may rise by", Column(f"heads that can go, of {heads}", ".1f")],
        [[f"{share:.0%}", measure] for share, measure in found.removable.items()],
        caption="In the order of importance; the baseline removes heads in one random order, the same for all seeds.",
    )


def _stable(page: Page, model: Examined, found: Findings, drawings: Drawings) -> None:
    section = page.section("Do the same heads come back in other seeds")
    section.text(
        "Head numbers mean nothing across seeds, so the heads of each pair of seeds are matched within layers "
        f"(Hungarian algorithm) by how alike their outputs are on the same {model.unit}s (CKA: 1 is the same up to "
        "rotation and scale)."
    )
    rows: list[list[object]] = []
    for kind in model.kinds:
        stable = found.stability[kind.name]
        untrained = None if stable.untrained is None else float(stable.untrained.value)
        rows.append([kind.title, _scalar(stable.matched), untrained])
        similar = found.similarity[kind.name][0, 1]
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


def _different(page: Page, model: Examined, found: Findings, drawings: Drawings) -> None:
    section = page.section("Do heads differ")
    section.text(
        "Over all pairs of heads of a layer: how different the places are where they look (Jensen–Shannon "
        "divergence: 0 the same, 1 no key in common), and how alike what they write is (cosine). The baseline is "
        "untrained heads."
    )
    names = list(next(iter(found.differences.values())))
    rows = [
        [f"{_ACROSS[kind.name]}, layer {layer}", *(_at(found.differences[kind.name][name], layer) for name in names)]
        for kind in model.kinds
        for layer in range(kind.layers)
    ]
    columns = [Column(name, ".2f", "higher" if "look" in name else "") for name in names]
    section.table(["layer", *columns], rows, caption="Means over pairs of heads.")
    for kind in model.kinds:
        alike = found.similarity[kind.name][0, 0]
        name = f"map_{kind.name}"
        drawings[name] = figures.head_map(
            np.sqrt(np.maximum(1 - (alike + alike.T) / 2, 0)) * (1 - np.eye(len(alike))), kind.layers,
            title=f"{kind.title}: heads as near as their outputs are alike (first seed)",
        )  # fmt: skip
        section.figure(drawings[name], f"{kind.title}: distance is √(1 - CKA), in two dimensions.", name=name)


def _view(page: Page, model: Examined, params: Any, of_seed: dict[tuple[str, int, int], Role], shown: int) -> None:
    section = page.section("See every head")
    several = "an attention, " if len(model.kinds) > 1 else ""
    longest = max(model.sentence(batch, row).length for batch in model.batches for row in model.rows(batch))
    cut = f" Of a {model.sequence} the first {VIEWED} {model.unit}s are shown." if longest > VIEWED else ""
    section.text(f"Choose a {model.sequence}, {several}layers and heads; hover or tap a {model.unit}. First seed.{cut}")
    titles = {kind.name: kind.title for kind in model.kinds}
    notes = {(titles[kind], layer, n): role.note for (kind, layer, n), role in of_seed.items() if role.note}
    section.view(
        view.heads(sentences(model, params, shown), notes=notes, title="Every head", unit=model.unit),
        "Attention of every head."
        + (" Frames are gold links." if model.relations else "")
        + (
            " Rows of the decoder are the words read, in cross attention “word read → word written”."
            if "cross" in titles
            else ""
        ),
    )


def sentences(model: Examined, params: Any, shown: int) -> list[view.Sentence]:
    """Some sentences with the weights of every head: every so many of the corpus, from short to long.

    Of a long one the first `VIEWED` words: what an attention to the past does there does not hang on what follows.
    """
    capture = jax.jit(model.capture, static_argnums=2)
    rows = [(b, r) for b, batch in enumerate(model.batches) for r in model.rows(batch)]
    lengths = [model.sentence(model.batches[b], r).length for b, r in rows]
    wanted = [i for i, length in enumerate(lengths) if 7 <= length <= 14] or [int(np.argmin(lengths))]
    chosen = [wanted[i] for i in np.linspace(0, len(wanted) - 1, min(shown, len(wanted))).astype(int)]
    found = []
    for b, r in (rows[i] for i in chosen):
        batch = model.batches[b]
        seen, right, words = capture(params, batch, ("weights",)), model.right(batch), model.sentence(batch, r)
        attentions = {}
        for kind in model.kinds:
            queries, keys = (side[:VIEWED] for side in words.words[kind.name])
            weights = np.asarray(seen[kind.name]["weights"])[:, r, :, : len(queries), : len(keys)]
            links = [(t, s) for t, s in _gold(model, kind, right, r) if max(t, s) < VIEWED]
            attentions[kind.title] = view.Attention(queries, keys, weights, links)
        found.append(view.Sentence(words.text, attentions))
    return found


def _gold(model: Examined, kind: Kind, right: dict[str, np.ndarray], row: int) -> list[tuple[int, int]]:
    """The gold links of a sentence that are drawn: in cross attention the alignment of what is written."""
    drawn = [r for r in model.relations if r.kind == kind.name]
    drawn = [r for r in drawn if r.role == "aligns"] if kind.name == "cross" else drawn
    return sorted({(int(t), int(s)) for r in drawn for t, s in np.argwhere(right[r.key][row])})


def _method(page: Page, model: Examined, seeds: int, sentences: int, roles_found: bool) -> None:
    section = page.section("How this was measured")
    rows = f"{model.sequence}s"
    over = f"over seeds and {rows}" if seeds > 1 else f"over {rows} of one model"
    items = [
        f"Intervals are 95 %, {over}: they say what other {rows} (and seeds) like these would give. In "
        f"simulations they cover 94 to 99 times in 100, but about 90 where few seeds, or few {rows} of one model, are "
        "drawn from a very skewed distribution (exponential), and 2 seeds that differ make them very long."
    ]
    if model.relations:
        items.append(
            f"p: sign flips by {model.sequence} with the largest statistic of all heads (Westfall–Young), so that "
            "looking at many heads is paid for."
        )
    if roles_found:
        items.append(
            "A head has a role if the lower end of its interval is at least a quarter of the way from the baseline to "
            "1."
        )
    section.items([*items, f"{sentences} {model.origin}."])


def _at(measure: Measure, *place: int) -> Measure:
    return Measure(*(np.asarray(part)[place] for part in measure))


def _scalar(measure: Measure) -> Measure:
    return Measure(*(np.asarray(part).reshape(()) for part in measure))


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _share(measure: Measure) -> str:
    return f"{float(measure.value):.0%}" + _interval(measure, ".0%")


def _number(measure: Measure) -> str:
    return f"{float(measure.value):.1f}" + _interval(measure, ".1f")


def _interval(measure: Measure, form: str) -> str:
    return "" if np.isnan(measure.low) else f" [{float(measure.low):{form}}, {float(measure.high):{form}}]"
