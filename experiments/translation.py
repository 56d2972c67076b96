"""Train a translator and judge it: BLEU and chrF on held-out sentences, and what its heads attend to.

The model is the Flax module `mhajax.linen.Model` of a `translator.Config`; it is trained by `mhajax.training`,
which does not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import heads, quick, tables, work
from experiments.data import batches, corpora, vocabulary
from experiments.data.vocabulary import Vocabulary
from experiments.folder import VOCABULARY
from experiments.heads import of_pairs, table
from experiments.task import Task, build_model, initialiser, mean_and_spread, seeds_of
from experiments.translating import Decoding, Translator, rows_of
from mhajax import linen, losses, training, translator
from mhajax.report import numbers, render, results
from mhajax.report.subject import Subject

_HEADS_MEASURED_ON = 200  # sentences


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The table [batches] of a translation.

    Attributes:
      tokens: target tokens per batch, padding included.
      boundaries: lengths to which sentences are padded; each costs one compilation. Longer pairs are left out of
        training (and counted), never out of evaluation.
    """

    tokens: int = 4096
    boundaries: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}.")
        if not self.boundaries or any(a >= b for a, b in zip((0, *self.boundaries), self.boundaries, strict=False)):
            raise ValueError(
                f"boundaries must be positive and ascending, such as [16, 32, 64], got {list(self.boundaries)}."
            )
        if self.boundaries[-1] > self.tokens:
            raise ValueError(
                f"tokens must be at least the last of boundaries, got tokens={self.tokens} and "
                f"boundaries={list(self.boundaries)}; a batch would hold no sentence."
            )


@dataclass(frozen=True, kw_only=True)
class Config(tables.Training):
    """`kind = "translation"`: train a translator, report BLEU and chrF, show its heads.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: of the data only the first sentences are used, and everything says so. Left out: all of it.
      data: the sentence pairs; a table of one of these kinds.
      vocabulary: how text becomes numbers.
      batches: how many sentences are taken at a time.
      model: the shape of the translator.
      training: how it is trained.
      decoding: how it translates.
      heads: the report about its heads.
    """

    kind: Literal["translation"] = "translation"
    quick: bool | None = None
    data: corpora.Grammar | corpora.Multi30k | corpora.ParallelFiles = corpora.Grammar()
    vocabulary: vocabulary.Config = vocabulary.Config()
    batches: Batches = Batches()
    model: translator.Config
    training: training.Config = training.Config()
    decoding: Decoding = Decoding()
    heads: tables.Heads = tables.Heads()


def shrink(config: Config) -> Config:
    """The same translation, small, for --quick."""
    return replace(
        config, **quick.shared(config), model=quick.narrow(config.model, encoder_layers=1, decoder_layers=1, unroll=1),
        data=quick.fewer_generated(config.data),
        batches=replace(config.batches, boundaries=(quick.LONGEST,), tokens=8 * quick.LONGEST),
        decoding=quick.least(
            config.decoding, beams=1, batch=quick.HELD_OUT, validation_sentences=quick.HELD_OUT
        ),
    )  # fmt: skip


def prepare(config: Config, folder: Path) -> Task:
    """Read the data, make the vocabulary (or take the run's own), and put the experiment together."""
    corpus = corpora.parallel(config.data)
    if config.quick:
        corpus = quick.few_pairs(corpus)
    words = _vocabulary(config, corpus, folder)
    model = build_model(config, words)
    pairs = _ids(words, corpus.train)
    training_batches = batches.PairBatches(
        pairs, batch_tokens=config.batches.tokens, boundaries=config.batches.boundaries, seed=config.training.seed
    )
    shown = corpus.validation[: config.decoding.validation_sentences]
    validation = _ids(words, corpus.validation)
    translate = Translator(model, words, config.decoding, config.batches.boundaries)
    translate.check_room(max(map(len, (shown, *corpus.tests.values()))), config.decoding.beams)
    validation_loss = _validation_loss(config, model)

    def evaluate(params: Any) -> dict[str, list[float]]:
        results: dict[str, list[float]] = {}
        for one in seeds_of(params):
            if not config.quick:  # it compiles another program, and --quick translates in any case
                loss, accuracy = validation_loss(one, validation)
                results.setdefault("validation_loss", []).append(loss)
                results.setdefault("validation_accuracy", []).append(accuracy)
            outputs = translate(one, [source for source, _ in shown], beams=1)
            results.setdefault("validation_bleu", []).append(bleu(outputs, [target for _, target in shown])[0])
        return {**results, "score": results["validation_bleu"]}

    notes = [
        f"{len(corpus.train):,} sentence pairs, {words.size:,} entries in the vocabulary, "
        f"{training_batches.batches_per_epoch} batches an epoch in {len(training_batches.shapes)} shapes"
    ]
    if training_batches.left_out:
        notes.append(
            f"{training_batches.left_out} training pairs are longer than {config.batches.boundaries[-1]} tokens "
            "(the last of batches.boundaries) and left out"
        )
    return Task(
        init_params=initialiser(model),
        loss=partial(_loss, model, config.training.label_smoothing),
        batches=lambda seen: training_batches.iterate(training_batches.position(seen)),
        tokens=lambda batch: int(batch.target_lengths.sum()),
        evaluate=evaluate,
        examine=partial(_subject, config, corpus, words),
        functional=partial(linen.functional, model),
        report=partial(_report, config, corpus, words, model, translate),
        epoch=training_batches.batches_per_epoch,
        hashes=corpus.hashes,
        unit=words.unit,
        notes=tuple(notes),
        examples=training_batches.examples,
    )


def bleu(outputs: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU of raw text, and sacrebleu's signature of how it was computed (Post 2018).

    Raises:
      ValueError: without a sentence, or unless there is one output for every reference.
    """
    from sacrebleu.metrics.bleu import BLEU

    _check_pairs("bleu", outputs, references)
    metric = BLEU(force=True)  # our references are raw text; a final " ." in generated text is not a mistake
    score = metric.corpus_score(list(outputs), [list(references)]).score
    return score, str(metric.get_signature())


def chrf(outputs: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus chrF2 of raw text, and its signature (Popović 2015). Raises as `bleu`."""
    from sacrebleu.metrics.chrf import CHRF

    _check_pairs("chrf", outputs, references)
    metric = CHRF()
    score = metric.corpus_score(list(outputs), [list(references)]).score
    return score, str(metric.get_signature())


def _check_pairs(who: str, outputs: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(outputs, str) or isinstance(references, str):
        raise ValueError(f"translation.{who}: outputs and references must be lists of sentences, got one text.")
    if not outputs or len(outputs) != len(references):
        raise ValueError(
            f"translation.{who}: there must be at least one sentence, and as many outputs as references, got "
            f"{len(outputs)} and {len(references)}; a test set without sentences has no score."
        )


def _subject(config: Config, corpus: corpora.ParallelCorpus, words: Vocabulary, sentences: int) -> Subject:
    """The model and the first sentences of its first test, for the report about its heads."""
    test, pairs = next(iter(corpus.tests.items()))
    shape = replace(config.model, vocab_size=words.size)
    rows = config.decoding.batch // 2 or 1
    return of_pairs.make_subject(shape, pairs[:sentences], words, rows, corpus.gold.get(test))


def _vocabulary(config: Config, corpus: corpora.ParallelCorpus, folder: Path) -> Vocabulary:
    """The run's own vocabulary; made from both sides of the training data the first time."""
    texts = [text for pair in corpus.train for text in pair]
    return vocabulary.load_or_train(folder / VOCABULARY, texts, config.vocabulary)


def _ids(words: Vocabulary, pairs: corpora.Sentences) -> list[tuple[list[int], list[int]]]:
    sources, targets = zip(*pairs, strict=True)
    return list(zip(words.encode_all(sources), words.encode_all(targets), strict=True))


def _loss(model: linen.Model, label_smoothing: float, params, batch: batches.PairBatch, key):
    """Label-smoothed cross-entropy per real target token, and its parts."""
    features = model.apply(
        {"params": params}, batch.source, batch.target[:, :-1],
        source_lengths=batch.source_lengths, deterministic=False, rngs={"dropout": key}, method="features",
    )  # fmt: skip
    sums = _token_sums(features, params["embedding"]["tokens"], batch, label_smoothing)
    return sums.loss / sums.weight, {"accuracy": sums.correct / sums.weight, "weight": sums.weight}


def _token_sums(features, table, batch, label_smoothing: float) -> losses.Sums:
    real = jnp.arange(features.shape[1]) < batch.target_lengths[:, None]
    return losses.linear_cross_entropy(
        features, table, batch.target[:, 1:], real, label_smoothing=label_smoothing, chunk=1024
    )


def _validation_loss(config: Config, model: linen.Model) -> Callable[[Any, Sequence], tuple[float, float]]:
    @jax.jit
    def sums(params, batch):
        features = model.apply(
            {"params": params}, batch.source, batch.target[:, :-1],
            source_lengths=batch.source_lengths, method="features",
        )  # fmt: skip
        return _token_sums(features, params["embedding"]["tokens"], batch, 0.0)

    def mean(params: Any, pairs: Sequence) -> tuple[float, float]:
        rows = rows_of(config.decoding.batch, len(pairs))
        parts, boundaries = [], config.batches.boundaries
        with work.piece("validation loss", len(pairs), "sentences") as piece:
            for batch in batches.evaluation_pairs(pairs, batch_size=rows, boundaries=boundaries):
                parts.append(jax.device_get(sums(params, batch)))
                piece.advance(int((batch.index >= 0).sum()))
        weight = sum(float(part.weight) for part in parts)
        return tuple(sum(float(getattr(p, name)) for p in parts) / weight for name in ("cross_entropy", "correct"))  # pyright: ignore

    return mean


def _report(config, corpus, words, model, translate, params, folder: Path, console: Console) -> dict[str, Any]:
    seeds = seeds_of(params)
    tests: dict[str, dict[str, Any]] = {}
    first_outputs: dict[str, list[str]] = {}
    signatures: dict[str, str] = {}
    for name, pairs in corpus.tests.items():
        sources, references = (list(side) for side in zip(*pairs, strict=True))
        scores: dict[str, list[float]] = {"bleu": [], "chrf": []}
        for number, one in enumerate(seeds):
            outputs = translate(one, sources)
            if number == 0:
                first_outputs[name] = outputs
            for metric, function in (("bleu", bleu), ("chrf", chrf)):
                score, signatures[metric] = function(outputs, references)
                scores[metric].append(round(score, 3))
        tests[name] = {"sentences": len(pairs), **mean_and_spread(scores)}
        _write_translations(folder / f"translations.{name}.tsv", sources, references, first_outputs[name])
    _show_scores(console, tests, signatures)
    main = next(iter(corpus.tests))
    _show_sample(console, corpus.tests[main], first_outputs[main])
    result = {
        **{name: value for name, value in tests[main].items() if name != "sentences"},
        "bleu_signature": signatures["bleu"], "chrf_signature": signatures["chrf"], "tests": tests,
    }  # fmt: skip
    if not config.quick:
        subject = _subject(config, corpus, words, _HEADS_MEASURED_ON)
        result["heads"] = _show_heads(subject, linen.functional(model, seeds[0]), folder, console)
    return result


def _write_translations(path: Path, sources: list[str], references: list[str], outputs: list[str]) -> None:
    lines = ["source\treference\ttranslation"]
    lines += [
        "\t".join(text.replace("\t", " ") for text in row) for row in zip(sources, references, outputs, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _show_scores(console: Console, tests: dict[str, dict[str, Any]], signatures: dict[str, str]) -> None:
    table = Table(box=None, padding=(0, 2), header_style="")
    for column in ("test", "sentences", "BLEU", "chrF"):
        table.add_column(column, justify="left" if column == "test" else "right")
    for name, test in tests.items():
        cells = [
            f"{test[metric]:.1f}" + (f" ± {test[f'{metric}_sd']:.1f}" if f"{metric}_sd" in test else "")
            for metric in ("bleu", "chrf")
        ]
        table.add_row(name, str(test["sentences"]), *(f"[bold]{cell}[/bold]" for cell in cells))
    console.print(table)
    for signature in signatures.values():
        console.print(f"  [dim]{signature}[/dim]", highlight=False, soft_wrap=True)
    console.print()


def _show_sample(console: Console, pairs: corpora.Sentences, outputs: list[str], size: int = 4) -> None:
    for (source, reference), output in list(zip(pairs, outputs, strict=True))[:size]:
        console.print(f"  [dim]source    [/dim] {source}", highlight=False, soft_wrap=True)
        console.print(f"  [dim]translated[/dim] {output}", highlight=False, soft_wrap=True)
        mark = "[green]the same[/green]" if output == reference else reference
        console.print(f"  [dim]reference [/dim] {mark}\n", highlight=False, soft_wrap=True)


def _show_heads(subject: Subject, params: Any, folder: Path, console: Console) -> list[dict[str, Any]]:
    """The table of the heads and the picture of cross-attention, for one seed."""
    from mhajax import figures

    found = results.examine_briefly(subject, params, heads.progress)
    table.show(console, subject.kinds, found, subject.unit)

    batch, row = render.choose_sentence(subject)
    words = subject.sentence(batch, row).written
    weights = np.asarray(jax.jit(subject.capture, static_argnums=2)(params, batch, ("weights",))["cross"]["weights"])
    drawing = figures.attention_patterns(
        weights[:, row, :, : len(words.queries), : len(words.keys)],
        words.queries, words.keys,
        title="Cross-attention of every head: the word being written (rows) reads the source (columns)",
    )  # fmt: skip
    figures.save(drawing, folder / "figures" / "cross_attention")
    return numbers.brief_as_json(subject, found)
