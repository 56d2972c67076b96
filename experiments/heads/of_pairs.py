"""A translator as the report about its heads needs it, and sentences with their translations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.data import batches, corpora
from experiments.data.grammar import Pair
from experiments.data.vocabulary import Vocabulary
from experiments.heads import gold
from mhajax import translator
from mhajax.heads import ablation
from mhajax.report.subject import Kind, Pieces, Sentence, Subject, nats


def make_subject(
    shape: translator.Config,
    pairs: corpora.Sentences,
    words: Vocabulary,
    rows: int,
    known: Sequence[Pair] | None,
) -> Subject:
    """A translator, on sentences that it was not trained on.

    Args:
      shape: its config.
      pairs: the sentences, with their translations.
      words: its vocabulary.
      rows: sentences that are computed together.
      known: what is known about the words of each, if it is; of use where tokens are words.
    """
    known = known if words.kind == "words" else None
    annotated: Sequence[Pair] | None = None if known is None else known[: len(pairs)]
    sources, targets = (words.encode_all([pair[side] for pair in pairs]) for side in (0, 1))
    rows = min(rows, len(pairs))
    longest = max(len(side) for side in (*sources, *targets)) + 1  # one shape: compiling takes longer than measuring
    both = list(zip(sources, targets, strict=True))
    held_out = list(batches.evaluation_pairs(both, batch_size=rows, boundaries=(longest,)))
    relations = gold.RELATIONS if annotated else ()
    categories = (f"all {words.unit}s", *(gold.CATEGORIES if annotated else ()))

    def sentences_of(batch) -> list[Pair | None]:
        return [None if annotated is None or n < 0 else annotated[n] for n in batch.index]

    def capture(params, batch, names):
        return translator.apply_captured(
            params, batch.source, batch.target[:, :-1], shape, source_lengths=batch.source_lengths, capture=names
        )[1]

    def visible(batch) -> dict[str, np.ndarray]:
        source = np.arange(batch.source.shape[1]) < batch.source_lengths[:, None]
        target = np.arange(batch.target.shape[1] - 1) < batch.target_lengths[:, None]
        past = np.tril(np.ones((target.shape[1],) * 2, bool))
        return {
            "encoder": source[:, :, None] & source[:, None],
            "decoder": target[:, :, None] & past,
            "cross": target[:, :, None] & source[:, None],
        }

    def tokens(batch):
        source, target = batch.source, batch.target[:, :-1]
        return {"encoder": (source, source), "decoder": (target, target), "cross": (target, source)}

    def predicted(batch) -> np.ndarray:
        valid = np.arange(batch.target.shape[1] - 1) < batch.target_lengths[:, None]
        parts = [gold.positions(gold.CATEGORIES[c], sentences_of(batch), valid.shape[1]) for c in categories[1:]]
        return np.stack([valid, *parts], axis=-1)

    def losses(params, batch, gates):
        features = translator.features(
            params, batch.source, batch.target[:, :-1], shape,
            source_lengths=batch.source_lengths, gates=gates,
        )  # fmt: skip
        return nats(translator.logits(params, features, shape), batch.target[:, 1:])

    def ablated(params, batch, sums):
        def loss_fn(features):
            return sums(nats(translator.logits(params, features, shape), batch.target[:, 1:]))

        stages = translator.stages(
            params, batch.source, batch.target[:, :-1], shape, source_lengths=batch.source_lengths
        )
        return ablation.of_stages(stages, loss_fn)

    def sentence(batch, row: int) -> Sentence:
        number = int(batch.index[row])
        read, written = words.pieces(sources[number]), words.pieces(targets[number])
        source, target = [*read, "end"], ["begin", *written]
        after = [*written, "end"]
        across = [f"{a} → {b}" for a, b in zip(target, after, strict=True)]
        return Sentence(
            {"encoder": Pieces(source, source), "decoder": Pieces(target, target), "cross": Pieces(across, source)},
            Pieces(after, source), pairs[number][0],
        )  # fmt: skip

    heads = shape.num_heads
    kinds = (
        Kind("encoder", "Encoder: source to source", shape.encoder_layers, heads, "encoder"),
        Kind("decoder", "Decoder: target to target", shape.decoder_layers, heads, "decoder"),
        Kind("cross", "Cross attention: target to source", shape.decoder_layers, heads, "across", is_self=False),
    )
    return Subject(
        kinds=kinds, origin="test sentences, neither trained on nor used to choose the parameters",
        unit=words.unit, sequence="sentence",
        batches=held_out, index=lambda batch: batch.index, capture=capture, visible=visible, tokens=tokens,
        losses=losses, ablated=ablated, predicted=predicted, categories=categories,
        gold=lambda batch: {r.key: gold.keys(r, sentences_of(batch), visible(batch)[r.kind]) for r in relations},
        relations=relations, aligned=gold.ALIGNED.key if relations else None,
        baselines=lambda batch, r: gold.baselines(r, sentences_of(batch), visible(batch)[r.kind]),
        sentence=sentence,
        view_note="Rows of the decoder are the words read, in cross attention “word read → word written”.",
    )  # fmt: skip
