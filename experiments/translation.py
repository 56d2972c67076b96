"""Train a translator and judge it: BLEU and chrF on held-out sentences, and what its heads attend to.

The model is the Flax module `mhajax.linen.Translator`; it is trained by `mhajax.training`, which does not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import host, quick, work
from experiments.config import Translation
from experiments.data import batches, corpora, vocabulary
from experiments.data.vocabulary import BOS, EOS, Vocabulary
from experiments.folder import VOCABULARY
from experiments.heads import examined, findings, numbers, report, table
from experiments.task import Task, seeds_of
from mhajax import cache, decoding, linen, losses, transformer, translator

_HEADS_MEASURED_ON = 200  # sentences


def prepare(config: Translation, folder: Path) -> Task:
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
    translate = Translator(config, model, words)
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
        examine=partial(examined.of_translator, config, corpus, words),
        functional=partial(linen.functional, model),
        report=partial(_report, config, corpus, words, model, translate),
        epoch=training_batches.batches_per_epoch,
        hashes=corpus.hashes,
        unit=words.unit,
        notes=tuple(notes),
        examples=training_batches.examples,
    )


def build_model(config: Translation, words: Vocabulary) -> linen.Translator:
    """The Flax module, with the vocabulary's size filled in."""
    from dataclasses import replace

    return linen.Translator(replace(config.model, vocab_size=words.size))


def initialiser(model: linen.Translator) -> Callable[[jax.Array], Any]:
    """A function PRNG key → parameters of the module."""
    return partial(_init_params, model)


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


def _rows(batch: int, sentences: int) -> int:
    """The rows of a batch: all, where more than half are taken; a shape of its own is compiled only for a few."""
    return batch if 2 * sentences > batch else sentences


def _longest(source: int) -> int:
    """Tokens that a translation of so many may have."""
    return source * 3 // 2 + 8


def _check_pairs(who: str, outputs: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(outputs, str) or isinstance(references, str):
        raise ValueError(f"translation.{who}: outputs and references must be lists of sentences, got one text.")
    if not outputs or len(outputs) != len(references):
        raise ValueError(
            f"translation.{who}: there must be at least one sentence, and as many outputs as references, got "
            f"{len(outputs)} and {len(references)}; a test set without sentences has no score."
        )


class Translator:
    """Text in, text out, in batches of few shapes."""

    def __init__(self, config: Translation, model: linen.Translator, words: Vocabulary):
        self._config, self._model, self._words = config, model, words
        self._decode = jax.jit(self._decode_batch, static_argnames=("beams", "length"))

    def __call__(self, params: Any, sentences: Sequence[str], *, beams: int | None = None) -> list[str]:
        """Translations of the sentences; `beams` other than the config's if given."""
        settings = self._config.decoding
        beams = settings.beams if beams is None else beams
        self.check_room(len(sentences), beams)
        ids = self._words.encode_all(sentences)
        outputs = [""] * len(sentences)
        rows = _rows(settings.batch, len(sentences))
        boundaries = self._config.batches.boundaries
        with work.piece("translating", len(sentences), "sentences") as piece:
            for batch in batches.evaluation_batches(ids, batch_size=rows, boundaries=boundaries):
                longest = _longest(batch.source.shape[1])
                tokens = self._decode(params, batch.source, batch.source_lengths, beams=beams, length=longest)
                for number, output in zip(batch.index, np.asarray(tokens), strict=True):
                    if number >= 0:
                        outputs[number] = self._words.decode(output)
                piece.advance(int((batch.index >= 0).sum()))
        return outputs

    def check_room(self, sentences: int, beams: int) -> None:
        """Refuse beams that cannot fit into memory."""
        rows, decoder = _rows(self._config.decoding.batch, sentences) * beams, self._model.config.decoder
        longest = _longest(self._config.batches.boundaries[-1])
        layer = jax.eval_shape(lambda: cache.init((rows,), longest, decoder))
        host.check_room(
            "[decoding] keys and values of all beams", layer, decoder.num_layers, "decoding.batch or decoding.beams"
        )

    def _decode_batch(self, params, source, source_lengths, *, beams, length):
        config = self._model.config
        params = linen.functional(self._model, params)
        state = translator.begin(params, source, length, config, source_lengths=source_lengths)
        first = jnp.full(source.shape[0], BOS)
        rows = jnp.repeat(jnp.arange(source.shape[0]), beams)
        params = translator.unstack(params)
        reading = translator.select(state, rows)  # what is read stays; what is written moves through the loop

        def step(tokens, written):
            logits, state = translator.extend(params, tokens[:, None], reading._replace(written=written), config)
            return logits[:, 0], state.written

        if beams == 1:
            key = jax.random.key(0)  # greedy takes none
            return decoding.generate(step, reading.written, first, decoding.greedy, key, length=length, end=EOS)
        return decoding.beam_search(
            step, transformer.select, reading.written, first,
            beams=beams, length=length, end=EOS, length_penalty=self._config.decoding.length_penalty,
        ).tokens[:, 0]  # fmt: skip


def _vocabulary(config: Translation, corpus: corpora.ParallelCorpus, folder: Path) -> Vocabulary:
    """The run's own vocabulary; made from both sides of the training data the first time."""
    texts = [text for pair in corpus.train for text in pair]
    return vocabulary.load_or_train(folder / VOCABULARY, texts, config.vocabulary)


def _ids(words: Vocabulary, pairs: corpora.Sentences) -> list[tuple[list[int], list[int]]]:
    sources, targets = zip(*pairs, strict=True)
    return list(zip(words.encode_all(sources), words.encode_all(targets), strict=True))


def _init_params(model: linen.Translator, key: jax.Array) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, token, token)["params"]


def _loss(model: linen.Translator, label_smoothing: float, params, batch: batches.PairBatch, key):
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


def _validation_loss(config: Translation, model: linen.Translator) -> Callable[[Any, Sequence], tuple[float, float]]:
    @jax.jit
    def sums(params, batch):
        features = model.apply(
            {"params": params}, batch.source, batch.target[:, :-1],
            source_lengths=batch.source_lengths, method="features",
        )  # fmt: skip
        return _token_sums(features, params["embedding"]["tokens"], batch, 0.0)

    def mean(params: Any, pairs: Sequence) -> tuple[float, float]:
        rows = _rows(config.decoding.batch, len(pairs))
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
        shown = examined.of_translator(config, corpus, words, _HEADS_MEASURED_ON)
        result["heads"] = _show_heads(shown, linen.functional(model, seeds[0]), folder, console)
    return result


def mean_and_spread(scores: dict[str, list[float]]) -> dict[str, Any]:
    """Mean over seeds; with more than one also the standard deviation and the single values."""
    result: dict[str, Any] = {name: round(float(np.mean(values)), 3) for name, values in scores.items()}
    for name, values in scores.items():
        if len(values) > 1:
            result |= {f"{name}_sd": round(float(np.std(values, ddof=1)), 3), f"{name}_by_seed": values}
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


def _show_heads(model: examined.Examined, params: Any, folder: Path, console: Console) -> list[dict[str, Any]]:
    """The table of the heads and the picture of cross-attention, for one seed."""
    from mhajax import figures

    found = findings.of_one(model, params)
    table.show(console, model.kinds, found, model.unit)

    batch, row = report.worth_showing(model)
    words = model.sentence(batch, row).written
    weights = np.asarray(jax.jit(model.capture, static_argnums=2)(params, batch, ("weights",))["cross"]["weights"])
    drawing = figures.attention_patterns(
        weights[:, row, :, : len(words.queries), : len(words.keys)],
        words.queries, words.keys,
        title="Cross-attention of every head: the word being written (rows) reads the source (columns)",
    )  # fmt: skip
    figures.save(drawing, folder / "figures" / "cross_attention")
    return numbers.of_one(model, found)
