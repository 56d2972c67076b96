"""The page of the study: a section for each question, in tables, figures and sentences; and the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.studies.study import Answer, Verdict
from experiments.studies.word_sense import findings, rules
from experiments.studies.word_sense.findings import ARMS, Model
from experiments.studies.word_sense.measure import BAG, CONTEXT, FIXED, MAJORITY, RETRAINED, STATIC, OfWord
from mhajax import figures
from mhajax.figures import Drawing
from mhajax.report.page import Column, Page, Section
from mhajax.statistics import Measure

if TYPE_CHECKING:
    from experiments.studies.word_sense import Config

_PLACES = {
    "first": "to the beginning",
    "before": "directly before the word",
    "after": "directly after the word",
    "last": "to the end",
}


def make(models: dict[str, Model], config: Config) -> Answer:
    """Verdicts, numbers, page and figures."""
    verdicts = rules.all_of(models, config.tolerated)
    page = Page("Do heads bring the cue to an ambiguous word?", *_lead(models, verdicts))
    drawings: dict[str, Drawing] = {}
    _sense(page.section("Can the sense be told from the word's vector?"), models, drawings, config)
    _heads(page.section("Which heads cost most?"), models, drawings, config)
    _cues(page.section("Do heads attend to the cue?"), models, drawings)
    _moved(page.section("Does it still work where the cue is moved?"), models, drawings, config)
    _verdicts(page.section("Verdicts"), models, verdicts)
    _method(page.section("Method and limits"), models, config)
    return Answer(verdicts, {"models": {name: _numbers(found) for name, found in models.items()}}, page, drawings)


def _lead(models: dict[str, Model], verdicts: tuple[Verdict, ...]) -> list[str]:
    words = next(iter(models.values())).seen.words
    named = ", ".join(word.name for word in words)
    return [
        f"“I went to the bank”: money or river? {len(words)} ambiguous word{'s' * (len(words) > 1)} ({named}) in "
        f"{sum(len(word.gold) for word in words):,} test sentences of Wikipedia (CoarseWSD-20), read by "
        f"{' and '.join(models)}.",
        *(f"{verdict.claim}: {verdict.word}." for verdict in verdicts),
    ]


def _sense(section: Section, models: dict[str, Model], drawings: dict[str, Drawing], config: Config) -> None:
    section.text(
        "The classifier is the nearest mean of a sense (cosine, channels scaled to variance 1), trained on the "
        "training sentences of a word, as many of each sense. The measure is macro-F1 on its test sentences: rare "
        "senses count as much as frequent ones. Compared are the vector of the ambiguous word in its sentence "
        f"({CONTEXT}); the same where every head of every layer attends evenly to all it may see, with a classifier "
        f"trained on such vectors ({RETRAINED}) or the one of the untouched model ({FIXED}); the mean input vector of "
        f"all other words that the model sees ({BAG}); the input vector of the word itself, the same in every "
        f"sentence, so that nothing can be told ({STATIC}); and always the most frequent sense ({MAJORITY})."
    )
    for name, found in models.items():
        rows = [
            ["mean of the words" if word == "mean" else word, *(_bare(of[arm]) for arm in ARMS)]
            for word, of in found.words.items()
        ]  # fmt: skip
        section.table(
            ["word", *(Column(arm, ".3f", "") for arm in ARMS)], rows,
            caption=f"{name}: macro-F1, with vectors of layer {found.seen.layer} of {found.seen.layers}.",
        )  # fmt: skip
        section.table(
            ["contextual minus", Column("macro-F1, mean of the words", ".3f")],
            [[arm, found.lead[arm]] for arm in ARMS[1:]]
            + [["uniform, less half of the lead over the bag", found.taken]],
            caption=f"{name}: paired differences.",
        )
    drawn = {
        f"{name}, {word}: {arm}": _four(of[arm])
        for name, found in models.items()
        for word, of in found.words.items()
        if word != "mean"
        for arm in (CONTEXT, RETRAINED)
    }
    drawings["sense"] = figures.relation_accuracy(
        drawn, title="Telling the sense of a word", label="macro-F1", baseline_name="bag of words"
    )
    section.figure(drawings["sense"], "Contextual vectors, and those of uniform attention.", name="sense")
    section.text(*(_layer_note(name, found) for name, found in models.items()))


def _layer_note(name: str, found: Model) -> str:
    seen = found.seen
    best = int(np.argmax(seen.validated))
    return (
        f"{name}: cross-validated on training sentences, macro-F1 of the first {len(seen.validated)} layers is "
        f"highest in layer {best + 1} ({seen.validated[best]:.3f}); layer {seen.layer} "
        f"({seen.validated[seen.layer - 1]:.3f}) is the first within the tolerance, and is "
        f"used. Heads of the {seen.layers - seen.layer} layers after it cannot matter here."
    )


def _heads(section: Section, models: dict[str, Model], drawings: dict[str, Drawing], config: Config) -> None:
    section.text(
        "Each head of the layers that are run is removed, one at a time, from the untouched model. Macro-F1 is too "
        "coarse to rank heads where nearly all answers are right; so heads are ranked by the margin: the score of "
        "the right sense minus the best of the others, here as a share of its mean. p is that of “there is a head "
        "that costs anything”, adjusted for all heads (sign flips over sentences, maximum over heads). Every word "
        "counts alike."
    )
    for name, found in models.items():
        inner = section.section(f"Heads of {name}")
        heads, seen = found.heads, found.seen
        marks = [["•" if p < 0.05 and lost > 0 else "" for p, lost in zip(*row, strict=True)]
                 for row in zip(heads.pvalues, heads.lost.value, strict=True)]  # fmt: skip
        drawings[f"heads {name}"] = figures.head_table(
            100 * heads.lost.value, title=f"{name}: margin that is lost without each head",
            label="% of the mean margin", baseline=0.0, words=marks,
        )  # fmt: skip
        inner.figure(drawings[f"heads {name}"], "• p < 0.05, adjusted for all heads.", name=f"heads-{name}")
        rows = []
        for head in heads.top:
            at = divmod(int(head), seen.heads)
            rows.append([
                f"{at[0]}·{at[1]}", _at(heads.lost, at), float(heads.pvalues[at]), _at(heads.f1, at),
                _at(heads.attention, at), float(heads.attention_pvalues[at]),
            ])  # fmt: skip
        inner.table(
            ["head", Column("margin lost", ".1%"), Column("p", ".4f"), Column("macro-F1 lost", ".3f"),
             Column("attention to the cue, more than to other words", ".3f"), Column("its p", ".4f")],
            rows, caption=f"The {len(rows)} heads that cost most, layer·head.",
        )  # fmt: skip
        significant = int(((heads.pvalues < 0.05) & (heads.lost.value > 0)).sum())
        worst = float(heads.f1.value.max())
        sets = found.sets
        inner.text(
            f"{significant} of {heads.pvalues.size} heads lower the margin by more than chance. The largest loss of "
            f"macro-F1 by one head is {100 * worst:.1f} points (the largest of many: it flatters).",
            f"Removed together, the {len(heads.top)} heads chosen on one half of the sentences cost, on the other "
            f"half, {rules.signed(sets.margin, '.3f')} of the margin of {heads.whole:.3f} and {rules.points(sets.f1)} "
            f"of macro-F1. {len(sets.margins_of_random)} sets of as many random heads of the same layers cost "
            f"{sets.margins_of_random.min():.3f} to {sets.margins_of_random.max():.3f} of the margin (median "
            f"{np.median(sets.margins_of_random):.3f}), and up to {100 * sets.f1_of_random.max():.1f} points.",
            "Stability: the top heads of resampled sentences overlap with these by "
            f"{rules.signed(heads.stability, '.2f')} (Jaccard; by chance {float(heads.stability.baseline):.2f})."
            + ("" if np.isnan(heads.between_words) else
               f" The top heads of two different words overlap by {heads.between_words:.2f}."),
        )  # fmt: skip
        inner.items([f"{word}: {rules.listed(top, seen.heads)}" for word, top in heads.top_of_word.items()])


def _cues(section: Section, models: dict[str, Model], drawings: dict[str, Drawing]) -> None:
    section.text(
        "The cue of a sentence is the word whose leaving out lowers the margin of the model's answer most. No gold is "
        "used for it. For every head: attention from the ambiguous word to the cue, minus the mean attention to words "
        "that are no cue, at about the same distance on the same side, in all sentences."
    )
    for name, found in models.items():
        seen, heads = found.seen, found.heads
        drawings[f"attention {name}"] = figures.head_table(
            100 * heads.attention.value, title=f"{name}: attention to the cue, more than to other words",
            label="points of attention", baseline=0.0,
            words=[["•" if p < 0.05 and value > 0 else "" for p, value in zip(*row, strict=True)]
                   for row in zip(heads.attention_pvalues, heads.attention.value, strict=True)],
        )  # fmt: skip
        section.figure(drawings[f"attention {name}"], f"{name}. • p < 0.05, adjusted.", name=f"attention-{name}")
        agreement = "not defined" if np.isnan(heads.agreement) else f"{heads.agreement:.2f}"
        section.text(
            f"{name}: rank correlation, over heads, of attention to the cue and margin lost without the head: "
            f"{agreement}."
        )
        section.table(
            ["word", "sentences with a cue", "distance (median)", "before the word", "most frequent cues"],
            [_cue_row(word) for word in seen.words], caption=f"{name}: cues.",
        )  # fmt: skip


def _cue_row(word: OfWord) -> list[object]:
    cues = word.cues
    named = ", ".join(f"{cue} ({often})" for cue, often in findings.cue_words(word))
    return [word.name, f"{len(cues.words)} of {len(word.some)}", f"{np.median(np.abs(cues.distance)):.0f}",
            f"{(cues.distance < 0).mean():.0%}", named]  # fmt: skip


def _moved(section: Section, models: dict[str, Model], drawings: dict[str, Drawing], config: Config) -> None:
    section.text(
        "The cue is moved; the classifier is the one of unmoved sentences. Beside it one other word of the sentence, "
        "at random, is moved in the same way: what that costs is the price of a broken sentence, not of the cue's "
        "place. All numbers of a model are of the same sentences, those in which the ambiguous word sees another word."
    )
    drawn = {}
    for name, found in models.items():
        seen = found.seen
        cues = sum(len(word.cues.words) for word in seen.words)
        rows: list[list[object]] = [
            ["nothing", *(float(found.moved[word, "cue", "first"].baseline) for word in found.words)]
        ]
        for place, moved in _PLACES.items():
            hidden = place not in findings.places(seen)
            for which in ("cue", "other"):
                what = f"{'the cue' if which == 'cue' else 'another word'} {moved}" + (
                    " (out of sight)" if hidden else ""
                )
                rows.append([what, *(_bare(found.moved[word, which, place]) for word in found.words)])
            if not hidden:
                drawn[f"{name}: {moved}"] = _four(found.moved["mean", "cue", place])
        section.table(
            ["moved", *(Column(word, ".3f", "") for word in found.words)], rows,
            caption=f"{name}: macro-F1.",
        )  # fmt: skip
        section.table(
            ["the cue is moved", Column("macro-F1 lost, mean of the words", ".3f", ""), "was there already"],
            [[_PLACES[place], _bare(found.loss[place]),
              f"{sum(word.cues.still[place] for word in seen.words)} of {cues}"] for place in findings.places(seen)],
            caption=f"{name}: paired loss; tolerated is {config.tolerated:g}.",
        )  # fmt: skip
        if seen.causal:
            section.text(
                f"{name} reads from left to right: a word sees only what stands before it. A cue that is moved behind "
                "the word is out of its sight, whatever heads do; that is shown, and is no part of the rule."
            )
    drawings["moved"] = figures.relation_accuracy(
        drawn, title="The sense, with the cue moved", label="macro-F1, mean of the words", baseline_name="unmoved"
    )
    section.figure(drawings["moved"], "Macro-F1 where the cue is moved.", name="moved")


def _verdicts(section: Section, models: dict[str, Model], verdicts: tuple[Verdict, ...]) -> None:
    section.text(
        "Causal: supported if (1) the contextual vector tells the sense better than a bag of the visible words and "
        "than the static vector, (2) uniform attention takes away at least half of the lead over the bag, and (3) the "
        "chosen heads cost more margin than each of the layer-matched random sets; refuted if one fails. Robust: "
        "supported if the loss stays within the tolerance in every place, refuted if it is clearly above it in one."
    )
    section.items([f"{verdict.claim}: {verdict.word}. {verdict.because}" for verdict in verdicts])
    section.text("What would change it:")
    section.items([
        "A causal verdict would change with a stronger bag of words (one that learns which words count), which makes "
        "condition 1 harder, and with another level of intervention: a uniform head still mixes the cue in, only "
        "evenly.",
        "A robust verdict would change with more sentences where it is not resolved, and with rewritten sentences "
        "instead of one moved word: most sentences have more than one cue, and the others stay where they are.",
    ])  # fmt: skip


def _method(section: Section, models: dict[str, Model], config: Config) -> None:
    some = sum(len(word.some) for word in next(iter(models.values())).seen.words)
    early = [
        f"{name}: in {sum(word.alone for word in found.seen.words)} test sentences the ambiguous word sees no other "
        "word; they are counted as they are, and have no cue. No token is put before a sentence that its tokenizer "
        "does not put there: its first token has nothing to attend to but itself, and in language models often serves "
        "as a sink of attention. A cue that is moved to the beginning gets that place: whether what is lost then is "
        "lost by that or by the distance was not measured."
        for name, found in models.items()
        if found.seen.causal
    ]
    section.text(
        f"At most {config.reach} words on either side of the ambiguous one are read. Its vector is the mean over its "
        "tokens, after the chosen layer and before any last normalisation. Heads and cues are measured in "
        f"{some} test sentences, at most {config.per_sense} of each sense, so macro-F1 there is that of more "
        "balanced senses; all other numbers are of all test sentences. Intervals of macro-F1: 95 %, percentiles of "
        f"{config.resamples:,} resamples of the sentences of each word; of heads: see statistics.estimate. The number "
        "for a model is the mean over its words: it speaks about these words, not about words in general.",
        *early,
    )


def _four(measure: Measure) -> tuple[float, ...]:
    """For a picture: a percentile interval may, by a hair, not hold its own value."""
    value, low, high, baseline = map(float, measure)
    return value, min(low, value), max(high, value), baseline


def _bare(measure: Measure) -> Measure:
    """Without the baseline, which stands in a column of its own or in the caption."""
    return measure._replace(baseline=np.asarray(np.nan))


def _at(measure: Measure, at: tuple[int, ...]) -> Measure:
    return Measure(*(np.asarray(part)[at] for part in measure))


def plain(measure: Measure, at: tuple[int, ...] = ()) -> dict[str, float | None]:
    """One measure for result.json; None is what is not known."""
    parts = {name: float(part) for name, part in _at(measure, at)._asdict().items()}
    return {name: round(part, 6) if np.isfinite(part) else None for name, part in parts.items()}


def _numbers(found: Model) -> dict[str, Any]:
    seen, heads, sets = found.seen, found.heads, found.sets
    return {
        "layer": seen.layer, "layers": seen.layers, "validated": seen.validated.tolist(),
        "conditions": rules.conditions(found),
        "macro_f1": {word: {arm: plain(one) for arm, one in of.items()} for word, of in found.words.items()},
        "lead": {arm: plain(one) for arm, one in found.lead.items()},
        "uniform_takes_less_half": plain(found.taken),
        "sets": {
            "margin": plain(sets.margin), "macro_f1": plain(sets.f1),
            "random_margins": sets.margins_of_random.tolist(), "random_macro_f1": sets.f1_of_random.tolist(),
            "chosen": {word.name: [[divmod(int(head), seen.heads) for head in half] for half in word.chosen]
                       for word in seen.words},
        },
        "margin": heads.whole, "stability": plain(heads.stability), "between_words": heads.between_words,
        "agreement_of_attention_and_loss": heads.agreement,
        "top": {word: [divmod(int(head), seen.heads) for head in top]
                for word, top in {"all": heads.top, **heads.top_of_word}.items()},
        "moved": {f"{word}: {which} {place}": plain(one) for (word, which, place), one in found.moved.items()},
        "moved_loss": {place: plain(one) for place, one in found.loss.items()},
        "moved_loss_simultaneous": {place: plain(one) for place, one in found.loss_strict.items()},
        "sentences": {word.name: {"test": len(word.gold), "heads": len(word.some), "cues": len(word.cues.words),
                                  "no_other_word": word.alone} for word in seen.words},
        "heads": [
            {"layer": layer, "head": head, "margin_lost": plain(heads.lost, (layer, head)),
             "p": float(heads.pvalues[layer, head]), "macro_f1_lost": plain(heads.f1, (layer, head)),
             "attention_to_cue": plain(heads.attention, (layer, head)),
             "attention_p": float(heads.attention_pvalues[layer, head])}
            for layer, head in np.ndindex(heads.pvalues.shape)
        ],
    }  # fmt: skip
