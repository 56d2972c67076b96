"""The page of the study, its figures, and the numbers of its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.studies.study import Answer, Verdict
from experiments.studies.syntax.counts import DIRECTIONS
from experiments.studies.syntax.findings import FLIPS, POSITIONAL, SUBJECT, Found, Order, chosen_heads
from mhajax import figures
from mhajax.figures import Drawing
from mhajax.report.page import Column, Page, Section, element
from mhajax.statistics import Measure

if TYPE_CHECKING:
    from experiments.studies.syntax import Config

ALPHA = 0.05
MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2"}  # as they are written


def name(model: str, language: str) -> str:
    """A model and what it reads."""
    return f"{MODELS.get(model, Path(model).name)}, {language}"


class Examined(NamedTuple):
    """What was found of one arm.

    Attributes:
      model, language: as a reader calls them.
      sentences, words: how many.
      draws: of random weights.
      causal: whether the model sees only what stands before.
      arcs: relation → how many there are.
      found: of every question.
      order: the head that follows word order most.
      verdicts: on subject and verb, and on word order.
      seconds: it took.
    """

    model: str
    language: str
    sentences: int
    words: int
    draws: int
    causal: bool
    arcs: dict[str, int]
    found: list[Found]
    order: Order
    verdicts: tuple[Verdict, Verdict]
    seconds: float

    @property
    def name(self) -> str:
        """What a reader calls it."""
        return name(self.model, self.language)


def make(config: Config, arms: Sequence[Examined]) -> Answer:
    """The answer of the study."""
    drawings: dict[str, Drawing] = {}
    page = Page("Does a head follow word order, or subject and verb?", *_lead(config, arms))
    _verdicts(page, arms)
    for number, arm in enumerate(arms):
        _arm(page, arm, drawings, f"{number + 1}-{arm.language.lower()}")
    _method(page, config, arms)
    _changes(page, arms)
    verdicts = tuple(verdict for arm in arms for verdict in arm.verdicts)
    return Answer(verdicts, {"arms": [_numbers(arm) for arm in arms]}, page, drawings)


def _lead(config: Config, arms: Sequence[Examined]) -> list[str]:
    lines = ["A quick look at few sentences: its numbers mean nothing."] if config.quick else []
    for arm in arms:
        beaten = sum(_beats(one) for one in arm.found)
        lines.append(
            f"{arm.name}: a head follows subject and verb – {arm.verdicts[0].word}; a head follows word order – "
            f"{arm.verdicts[1].word}. Of {len(arm.found)} questions (relations, each in two directions), {beaten} "
            "are answered by a head better than by the best fixed offset and by the best of as many heads with "
            "random weights."
        )
    return lines


def _verdicts(page: Page, arms: Sequence[Examined]) -> None:
    section = page.section("The question, and the answers")
    section.text(
        "A multi-head layer can look at several things at once: one head may follow the order of the words, "
        "another the relation between subject and verb. Here every head of a pretrained model is asked for gold "
        "dependency relations it was never shown. For every word the head's answer is the word that gets most of "
        "its attention."
    )
    rows = [[v.claim, v.word, v.because] for arm in arms for v in arm.verdicts]
    section.items(
        [element("span", claim, " ", element("strong", word), ". ", because) for claim, word, because in rows]
    )
    section.text(
        f"The rules were written down before the run. Subject and verb ({SUBJECT}): supported if, in one "
        "direction or the other, the head that one half of the sentences chose beats on the other half both the "
        "best fixed offset and the best of as many heads with random weights, with the whole interval (97.5%, "
        "for two directions); refuted if in each direction one of these intervals lies below 0; else not "
        "resolved. Word order: supported if the whole interval of the share of words from which a head looks at "
        f"one fixed offset is at {POSITIONAL:.0%} or above, and more than for heads with random weights; refuted "
        "if the whole interval is below; else not resolved."
    )


def _arm(page: Page, arm: Examined, drawings: dict[str, Drawing], stem: str) -> None:
    section = page.section(arm.name)
    num_layers, num_heads = arm.order.heads.shape
    section.text(
        f"{arm.sentences:,} sentences, {arm.words:,} words; {num_layers} layers with {num_heads} heads each, called "
        f"layer·head from 0·0. Beside them as many heads with random weights, {arm.draws} times."
    )
    if arm.causal:
        there = sum(2 * count for count in arm.arcs.values())
        seen = sum(one.asked for one in arm.found)
        section.text(
            "This model reads from left to right: a word sees only what stands before it, so only the one of the "
            f"two words that comes later is asked for the earlier one ({seen:,} questions of about {there:,}). "
            "Its numbers are not comparable with those of a model that sees the whole sentence."
        )
    for direction in DIRECTIONS:
        some = [one for one in arm.found if one.question.direction == direction]
        if some:
            _direction(section, arm, some, drawings, f"{stem}-{direction.replace(' ', '-')}")
    _subjects(section, arm, drawings, stem)
    _order(section, arm, drawings, stem)


def _direction(section: Section, arm: Examined, some: list[Found], drawings: dict[str, Drawing], stem: str) -> None:
    direction = some[0].question.direction
    asked = "the word it depends on" if direction == DIRECTIONS[0] else "one that depends on it"
    inner = section.section(f"From a word to {asked}")
    drawings[stem] = figures.relation_accuracy(
        {one.question.relation: one.best.best for one in some},
        title=f"The best head of each relation, {direction} ({arm.name})",
        label="share of words whose strongest word is right",
        baseline_name="best fixed offset",
        second={one.question.relation: one.random.value for one in some},
        second_name="best of as many random heads",
    )
    inner.figure(drawings[stem], "Each chosen on one half of the sentences and reported on the other.", name=stem)
    inner.table(
        [
            "relation", Column("asked", ",d"), "head", Column("accuracy, vs best fixed offset", ".1%"), "offset",
            Column("above offset", "+.0%"), Column("p (adjusted)", ".4f"), Column("best random head", ".0%"),
            Column("above random", "+.0%"),
        ],
        [
            [
                one.question.relation, one.asked, _heads(one.best.chosen, arm), one.best.best,
                _distinct(f"{offset:+d}" for offset in one.offset), _alone(one.best.difference),
                format(one.adjusted, ".4f"), one.random, _alone(one.above_random),
            ]
            for one in some
        ],
        caption=f"{arm.name}, {direction}. Two heads or offsets: the halves of the sentences chose differently.",
    )  # fmt: skip


def _subjects(section: Section, arm: Examined, drawings: dict[str, Drawing], stem: str) -> None:
    some = [one for one in arm.found if one.question.relation == SUBJECT]
    if not some:
        return
    inner = section.section("Every head on subject and verb")
    for one in some:
        name = f"{stem}-{SUBJECT}-{one.question.direction.replace(' ', '-')}"
        drawings[name] = figures.head_table(
            one.heads,
            title=f"{SUBJECT}, {one.question.direction}: every head ({arm.name})",
            label="share right",
            baseline=float(one.best.best.baseline),
        )
        inner.figure(
            drawings[name],
            f"{_asker(one)} White: the best fixed offset, {one.best.best.baseline:.1%}; red is above it.",
            name=name,
        )


def _asker(one: Found) -> str:
    return (
        "The subject looks for its verb."
        if one.question.direction == DIRECTIONS[0]
        else "The verb looks for its subject."
    )


def _order(section: Section, arm: Examined, drawings: dict[str, Drawing], stem: str) -> None:
    inner, order = section.section("Heads that follow word order"), arm.order
    positional = [f"{_head(where)} at {offset:+d} ({share:.1%})" for where, offset, share in order.positional]
    inner.text(
        f"The largest share of words from which a head looks most at the word at one fixed offset (not 0): "
        f"{_distinct(map(_head, order.chosen))} at {_distinct(f'{offset:+d}' for offset in order.offset)}, "
        f"{order.best.value:.1%} [{order.best.low:.1%}, {order.best.high:.1%}]; of heads with random weights "
        f"{order.random.value:.1%}. On all sentences, {POSITIONAL:.0%} or more: "
        f"{', '.join(positional) or 'no head'}."
    )
    drawings[f"{stem}-order"] = figures.head_table(
        order.heads, title=f"Word order: the share of each head's best offset ({arm.name})", label="share of words"
    )
    inner.figure(drawings[f"{stem}-order"], "How often each head looks at its own best offset.", name=f"{stem}-order")


def _method(page: Page, config: Config, arms: Sequence[Examined]) -> None:
    section = page.section("How it was measured")
    family = ", ".join(f"{len(arm.found)} ({arm.name})" for arm in arms)
    draws = ", ".join(f"1/{arm.draws + 1}" for arm in arms[:1])
    heads = arms[0].order.heads.size
    section.items([
        "Sentences: Parallel Universal Dependencies, with gold trees. A word is what is written; of a written "
        "word that the tree takes apart (German am: an dem) the parts' relations count for the whole. Relations "
        f"are those of the treebank, subtypes by themselves, with {config.instances} arcs or more; not "
        "punctuation.",
        "Attention between words: attention to a split word is summed over its pieces, attention from it "
        "averaged over them. Special tokens ([CLS], [SEP], a token that starts the text) are left out and the "
        "rest is not divided by its sum, so that a piece which looks at them says little about its word.",
        "The answer for a relation is the other word with most attention; a word itself is never a right answer "
        "and left out. For word order a word itself counts as an answer. Who has several dependents of a "
        "relation is right with any of them. Words count as keys with punctuation.",
        f"Fixed offsets: 1 to {config.offsets} words to either side, the best chosen on the same half of the "
        "sentences as the head. Intervals of 95% are over sentences (jackknife).",
        "Random heads: the same model with the numbers of every array in random order within each layer, which "
        "keeps every scale; of each draw the best of all its heads, chosen in the same way. Their intervals are "
        "over draws and sentences.",
        f"Many hypotheses: for each question the null is that no head of the {heads} (as of {arms[0].name}) beats "
        "the best fixed offset, or none the best random heads; the test flips the signs of whole sentences for "
        "all heads at once and compares the best head with the best under flips (max-statistic). p is the larger "
        f"of both, so both must be beaten. The smallest p that {FLIPS:,} flips can reach is 1/{FLIPS + 1:,}. Over "
        f"the questions of an arm ({family}) it is adjusted by Benjamini and Hochberg; {ALPHA} or less counts. "
        f"The draws themselves are too few for a test of their own (no p below {draws}); they give the interval.",
    ])  # fmt: skip
    section.text(
        "Clark et al. 2019, What Does BERT Look At?, section 4.2. Voita et al. 2019, Analyzing Multi-Head "
        "Self-Attention, sections 5.1 and 5.2. That a head's strongest word is the right one says where it "
        "looks, not that the model needs it: for that, heads must be removed."
    )


def _changes(page: Page, arms: Sequence[Examined]) -> None:
    section = page.section("What would change the answer")
    section.items([
        "A rule that knows more than a distance, such as the nearest noun to the left: a head that beats every "
        "offset may follow parts of speech, not the relation.",
        "Other models: small ones trained for sentence vectors (MiniLM) have changed heads since they were language "
        "models; German is a language that MiniLM and SmolLM2 were hardly trained on.",
        "Another half of the sentences: heads that the two halves choose differently are no stable answer.",
        "Renormalised attention without special tokens: heads that rest on them most of the time would answer from "
        "what little is left, as here, but with every piece of a word alike.",
    ])  # fmt: skip
    section.text(f"It took {sum(arm.seconds for arm in arms):.0f} seconds.")


def _beats(one: Found) -> bool:
    return bool(one.best.difference.low > 0 and one.above_random.low > 0 and one.adjusted <= ALPHA)


def _alone(measure: Measure) -> Measure:
    """Without the baseline, which is 0 of a difference."""
    return measure._replace(baseline=np.array(np.nan))


def _heads(chosen: Any, arm: Examined) -> str:
    return _distinct(map(_head, chosen_heads(chosen, arm.order.heads.shape[1])))


def _head(where: tuple[int, int]) -> str:
    return f"{where[0]}·{where[1]}"


def _distinct(texts: Any) -> str:
    return " / ".join(dict.fromkeys(texts)).replace("-", "\N{MINUS SIGN}")


def _numbers(arm: Examined) -> dict[str, Any]:
    """What stands in result.json of an arm."""
    num_heads = arm.order.heads.shape[1]
    return {
        "model": arm.model, "language": arm.language, "sentences": arm.sentences, "words": arm.words,
        "draws": arm.draws, "causal": arm.causal, "seconds": arm.seconds,
        "questions": [
            {
                "relation": one.question.relation, "direction": one.question.direction, "asked": one.asked,
                "arcs": arm.arcs[one.question.relation],
                "heads": chosen_heads(one.best.chosen, num_heads), "best_head": _measure(one.best.best),
                "offsets": one.offset, "above_offset": _measure(one.best.difference),
                "best_random_head": _measure(one.random), "above_random": _measure(one.above_random),
                "above_offset_97.5": _measure(one.strict[0]), "above_random_97.5": _measure(one.strict[1]),
                "p": one.p, "p_adjusted": one.adjusted, "beats_both": _beats(one),
                **({"every_head": one.heads.tolist()} if one.question.relation == SUBJECT else {}),
            }
            for one in arm.found
        ],
        "order": {
            "share": _measure(arm.order.best), "heads": arm.order.chosen, "offsets": arm.order.offset,
            "best_random_head": _measure(arm.order.random), "above_random": _measure(arm.order.above_random),
            "positional": [{"head": where, "offset": o, "share": s} for where, o, s in arm.order.positional],
            "every_head": arm.order.heads.tolist(),
        },
    }  # fmt: skip


def _measure(measure: Measure) -> dict[str, float]:
    """A number that could not be had is null in the file."""
    return {name: float(part) for name, part in measure._asdict().items()}
