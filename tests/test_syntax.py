"""The study of syntax on a made-up treebank and hand-made attention; and the real one, where it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

from experiments import config as configs
from experiments import kinds
from experiments.data import dependencies, pretrained_files
from experiments.data.dependencies import Arc
from experiments.errors import ConfigError, DataError
from experiments.studies import STUDIES, models, syntax
from experiments.studies.syntax import counts, findings, report, words
from experiments.studies.syntax.counts import Question
from experiments.studies.syntax.words import Answers, Pieces
from mhajax.report.page import Page

LAYERS, HEADS = 2, 3
TREES = """\
# text = Dogs see big cats.
1\tDogs\tdog\tNOUN\t_\t_\t2\tnsubj\t_\t_
2\tsee\tsee\tVERB\t_\t_\t0\troot\t_\t_
3\tbig\tbig\tADJ\t_\t_\t4\tamod\t_\t_
4\tcats\tcat\tNOUN\t_\t_\t2\tobj\t_\tSpaceAfter=No
5\t.\t.\tPUNCT\t_\t_\t2\tpunct\t_\t_

# text = Am Tag sieht sie ihn
1-2\tAm\t_\t_\t_\t_\t_\t_\t_\t_
1\tAn\tan\tADP\t_\t_\t3\tcase\t_\t_
2\tdem\tder\tDET\t_\t_\t3\tdet\t_\t_
3\tTag\tTag\tNOUN\t_\t_\t4\tobl\t_\t_
3.1\tsie\tsie\tPRON\t_\t_\t_\t_\t4:nsubj\t_
4\tsieht\tsehen\tVERB\t_\t_\t0\troot\t_\t_
5\tsie\tsie\tPRON\t_\t_\t4\tnsubj\t_\t_
6\tihn\ter\tPRON\t_\t_\t4\tobj\t_\t_

"""


@pytest.fixture
def sentences(tmp_path):
    file = tmp_path / "trees.conllu"
    file.write_text(TREES, encoding="utf-8")
    return dependencies.read(file)


def test_trees_are_of_written_words(sentences):
    english, german = sentences
    assert english.text == "Dogs see big cats." and english.words == ("Dogs", "see", "big", "cats", ".")
    assert english.arcs[0] == Arc(0, 1, "nsubj") and len(english.arcs) == 4
    assert german.text == "Am Tag sieht sie ihn" and german.words == ("Am", "Tag", "sieht", "sie", "ihn")
    assert set(german.arcs) == {
        Arc(0, 1, "case"), Arc(0, 1, "det"), Arc(1, 2, "obl"), Arc(3, 2, "nsubj"), Arc(4, 2, "obj")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\t2\tnsubj\t_", "\t2\tnsubj", "line 2: a word must have 10 columns between tabs, got 9"),
        ("\t2\tnsubj", "\t9\tnsubj", "line 2: the head must be 0 or a word of the sentence, got '9'"),
        ("2\tsee", "x\tsee", "line 3: a word must begin with its number"),
        (TREES, "# nothing\n", "there is no sentence in it"),
    ],
)
def test_what_is_no_tree_is_refused_by_file_and_line(tmp_path, old, new, said):
    file = tmp_path / "trees.conllu"
    file.write_text(TREES.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        dependencies.read(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


class Halves:
    """A tokenizer that cuts words of four letters and more after the second one, between [ and ]."""

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode(self, text):
        offsets, start = [(0, 0)], 0
        for word in text.replace(".", " .").split():
            begin = text.index(word, start)
            start = begin + len(word)
            before = begin - (text[begin - 1 : begin] == " ")  # a space belongs to the piece after it
            offsets += [(before, begin + 2), (begin + 2, start)] if len(word) > 3 else [(before, start)]
        return SimpleNamespace(ids=list(range(len(offsets) + 1)), offsets=[*offsets, (0, 0)])

    def token_to_id(self, token):
        return {"<s>": 7}.get(token)


def test_pieces_belong_to_the_word_in_which_they_begin(sentences):
    english, german = words.pieces(sentences, Halves())
    assert english.word == [-1, 0, 0, 1, 2, 3, 3, 4, -1] and english.size == 5
    assert german.word == [-1, 0, 1, 2, 2, 3, 4, -1]
    started = words.pieces(sentences, Halves(), "<s>")[1]
    assert started.word == [-1, *german.word] and started.tokens[0] == 7
    with pytest.raises(DataError, match=r"arms\.start must be a token of the model, got '<x>'"):
        words.pieces(sentences, Halves(), "<x>")


def test_attention_to_pieces_is_summed_and_from_them_averaged():
    random = np.random.default_rng(0)
    weights = jax.nn.softmax(3 * random.normal(size=(2, 3, 5, 7, 7)))  # [L, B, N, T, T]
    word = np.array([[-1, 0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 2, -1, -1], [-1, 1, 1, 3, 0, -1, -1]])
    found = np.asarray(words.to_words(weights, word))
    expected = np.zeros_like(found)
    for row in range(3):
        for a in range(7):
            for b in range(7):
                of = np.flatnonzero(word[row] == a)
                for t in of:
                    for s in np.flatnonzero(word[row] == b):
                        expected[:, row, :, a, b] += weights[:, row, :, t, s] / len(of)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    other, whole = np.asarray(words.most(found, itself=False)), np.asarray(words.most(found, itself=True))
    for where in np.ndindex(2, 3, 5, 7):
        row = expected[where].copy()
        assert whole[where] == (row.argmax() if row.any() else -1)
        row[where[-1]] = 0
        assert other[where] == (row.argmax() if row.any() else -1)


def planted(every, heads: dict[tuple[int, int], np.ndarray], offset: dict[tuple[int, int], int]):
    """Answers of heads that know a question (its number), or look at an offset; others look at the last word."""
    for number, one in enumerate(every):
        size = one.right.shape[1]
        answer = np.full((LAYERS, HEADS, size), size - 1)
        for head, question in heads.items():
            right = one.right[question]
            answer[head] = np.where(one.asks[question], right.argmax(-1), answer[head])
        for head, apart in offset.items():
            answer[head] = np.clip(np.arange(size) + apart, 0, size - 1)
        yield number, Answers(answer, answer)


def test_questions_of_both_directions_and_what_offsets_answer(sentences):
    wanted = counts.questions(sentences, 2)
    assert wanted == [Question(name, way) for name in ("nsubj", "obj") for way in counts.DIRECTIONS]
    texts = words.pieces(sentences, Halves())
    every = [counts.asked(*pair, wanted, False) for pair in zip(sentences, texts, strict=True)]
    assert [np.argwhere(one.right[0]).tolist() for one in every] == [[[0, 1]], [[3, 2]]]
    assert [np.argwhere(one.right[1]).tolist() for one in every] == [[[1, 0]], [[2, 3]]]
    offsets = counts.distances(2, False)
    base = counts.baseline(every, offsets)
    assert offsets.tolist() == [-2, -1, 1, 2] and base.asked.tolist() == [[1, 1]] * 4
    assert base.by_offset[0].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert base.by_offset[2].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert base.places.tolist() == [[3, 4, 4, 3]] * 2

    causal = [counts.asked(*pair, wanted, True) for pair in zip(sentences, texts, strict=True)]
    assert [np.argwhere(one.right[0]).tolist() for one in causal] == [[], [[3, 2]]]
    assert counts.distances(2, True).tolist() == [-2, -1]

    unread = texts[0]._replace(word=[-1 if word == 0 else word for word in texts[0].word])
    assert not counts.asked(sentences[0], unread, wanted, False).right[:2].any()


def test_a_word_with_two_dependents_is_right_with_either_and_asked_once():
    sentence = dependencies.Sentence("a b c", ((0, 1), (2, 3), (4, 5)), (Arc(0, 1, "conj"), Arc(2, 1, "conj")))
    asked = counts.asked(sentence, Pieces([1, 2, 3], [0, 1, 2], 3), [Question("conj", "to the dependent")], False)
    assert asked.asks.sum() == 1 and asked.right[0, 1].tolist() == [True, False, True, False]


@pytest.fixture
def examined(sentences):
    """Twelve sentences, a head that knows the subject's verb, one that looks at the word before; random heads."""
    many = sentences * 6
    wanted = counts.questions(many, 6)
    texts = words.pieces(many, Halves())
    every = [counts.asked(*pair, wanted, False) for pair in zip(many, texts, strict=True)]
    offsets, number = counts.distances(3, False), wanted.index(Question("nsubj", "to the head"))
    knows, before = (1, 2), (0, 1)
    trained = counts.count(planted(every, {knows: number}, {before: -1}), every, offsets)
    random = [counts.count(planted(every, {}, {}), every, offsets) for _ in range(3)]
    base = counts.baseline(every, offsets)
    found, order = (
        findings.relations(wanted, base, offsets, trained, random),
        findings.order(base, offsets, trained, random),
    )
    return report.Examined(
        "minilm", "English", 12, 60, 3, False, {q.relation: 12 for q in wanted}, found, order,
        findings.verdicts("here", found, order), 1.0,
    )  # fmt: skip


def test_a_planted_head_is_found_and_reported(examined, tmp_path):
    one = next(one for one in examined.found if one.question == Question("nsubj", "to the head"))
    assert one.best.best.value == 1 and findings.chosen_heads(one.best.chosen, HEADS) == ((1, 2), (1, 2))
    assert one.heads[1, 2] == 1 and one.asked == 12 and one.random.value == 0 and one.p < 0.05
    assert one.best.best.baseline < 0.6 and one.best.difference.low > 0 and one.above_random.low > 0
    assert set(examined.order.chosen) == {(0, 1)} and set(examined.order.offset) == {-1}
    assert examined.order.best.value == 1 and examined.order.positional == [((0, 1), -1, 1.0)]
    follows, order = examined.verdicts
    assert follows.word == "supported" and "To the head 100.0%" in follows.because
    assert order.word in ("supported", "not resolved")  # 12 sentences may be too few for an interval above 90 %

    answer = report.make(syntax.Config(), [examined])
    assert len(answer.verdicts) == 2 and isinstance(answer.page, Page) and "supported" in answer.page.html()
    questions = answer.numbers["arms"][0]["questions"]
    assert {"nsubj", "obj"} <= {question["relation"] for question in questions}
    assert any("nsubj" in name for name in answer.drawings)


def test_verdicts_follow_the_rule(examined):
    subject = [one for one in examined.found if one.question.relation == "nsubj"]
    part = lambda low, high: subject[0].strict[0]._replace(low=np.array(low), high=np.array(high))  # noqa: E731
    above, across, below = part(0.1, 0.3), part(-0.1, 0.1), part(-0.3, -0.1)
    for pairs, word in (
        (((above, above), (below, below)), "supported"),
        (((above, across), (below, above)), "not resolved"),
        (((above, below), (below, above)), "refuted"),
        (((across, across), (across, across)), "not resolved"),
    ):
        found = [one._replace(strict=pair) for one, pair in zip(subject, pairs, strict=True)]
        assert findings.verdicts("x", found, examined.order)[0].word == word
    share, more = examined.order.best, examined.order.above_random
    for low, high, difference, word in (
        (0.9, 0.95, 0.1, "supported"), (0.85, 0.95, 0.1, "not resolved"), (0.8, 0.89, 0.1, "refuted"),
        (0.91, 0.95, -0.1, "not resolved"),
    ):  # fmt: skip
        order = examined.order._replace(
            best=share._replace(low=np.array(low), high=np.array(high)),
            above_random=more._replace(low=np.array(difference), high=np.array(0.5)),
        )
        assert findings.verdicts("x", [], order)[1].word == word


def test_shuffled_weights_keep_every_scale_within_a_layer():
    from mhajax import encoder

    config = encoder.Config(d_model=12, num_heads=2, num_layers=3, vocab_size=11)
    params = encoder.init_params(jax.random.key(0), config)
    params = params._replace(stack=params.stack._replace(layers=jax.tree.map(
        lambda a: a * jnp.arange(1, 4, dtype=a.dtype).reshape(3, *[1] * (a.ndim - 1)), params.stack.layers
    )))  # fmt: skip
    found = models.shuffled(params, 0)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params.stack.layers), jax.tree.leaves(found.stack.layers), strict=True):
        assert a.shape == b.shape
        for layer in range(3):
            np.testing.assert_array_equal(np.sort(np.ravel(a[layer])), np.sort(np.ravel(b[layer])))
    w = params.stack.layers.attention.w_q
    assert not np.array_equal(w, found.stack.layers.attention.w_q)
    assert not np.array_equal(found.stack.layers.attention.w_q, models.shuffled(params, 1).stack.layers.attention.w_q)


def test_the_config_is_read_and_shrunk():
    config = configs.read("configs/syntax.toml")
    assert isinstance(config, syntax.Config) and STUDIES["syntax"] is syntax
    assert [(arm.model, arm.language) for arm in config.arms] == [("minilm", "en"), ("minilm", "de"), ("smollm2", "en")]
    small = kinds.shrink(config)
    assert small.quick and len(small.arms) == 1 and small.arms[0].sentences == syntax.QUICK
    with pytest.raises(ConfigError, match="arms must differ in model or language"):
        configs.read("configs/syntax.toml", ['arms=[{model="minilm"}, {model="minilm"}]'])
    with pytest.raises(ConfigError, match="draws must be at least 2, got 1"):
        configs.read("configs/syntax.toml", ["arms=[{draws=1}]"])


@pytest.mark.parametrize("language", tiered(["en", "de"], "de"))
def test_the_real_trees(language):
    try:
        file = dependencies.path(dependencies.Treebanks(), language)
    except DataError as missing:
        pytest.skip(str(missing))
    sentences = dependencies.read(file)
    written = [line[9:-1] for line in Path(file).open(encoding="utf-8") if line.startswith("# text = ")]
    assert [sentence.text for sentence in sentences] == written and len(written) == 1000
    try:
        tokenizer = models.load(str(pretrained_files.locate("minilm"))).tokenizer
    except DataError:
        return
    texts = words.pieces(sentences, tokenizer)
    unread = sum(len({*range(text.size)} - {*text.word}) for text in texts)
    assert unread <= 3, "words that no piece begins in"
