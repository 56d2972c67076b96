"""The report from the library: of plain weights whose answers are known, of a model, and of a module of one's own."""

import json
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhajax import language_model, report
from mhajax.report import text
from mhajax.report.subject import Relation

pytestmark = pytest.mark.usefixtures("quick_compiles")
L, B, N, T = 2, 11, 3, 7
HEADS = {"previous": (0, 0), "uniform": (0, 1), "first": (0, 2), "itself": (1, 0), "repeat": (1, 1), "other": (1, 2)}
TOKENS = np.random.default_rng(0).integers(0, 3, (B, T))
LENGTHS = np.array([T - 2, *[T] * (B - 1)])  # the first example has two tokens of padding


def visible():
    real = np.arange(T) < LENGTHS[:, None]
    return real[:, :, None] & real[:, None] & np.tri(T, dtype=bool)


def weights():
    """[L, B, N, T, T]: each head does what its name says; a query that cannot rests on the first token."""
    made = np.zeros((L, B, N, T, T))
    for b in range(B):
        for t in range(T):
            same = [s for s in range(t) if TOKENS[b, s] == TOKENS[b, t]]
            keys = {"previous": [max(t - 1, 0)], "uniform": range(t + 1), "first": [0], "itself": [t]}
            keys |= {"repeat": same or [0], "other": range(t + 1)}
            for name, (layer, head) in HEADS.items():
                made[layer, b, head, t, list(keys[name])] = 1 / len(keys[name])
    made[:, 0, :, LENGTHS[0] :] = 1 / T  # what padding does is nobody's business
    return made


class Watched:
    """A progress that remembers."""

    def __init__(self):
        self.pieces = []

    @contextmanager
    def __call__(self, what, total, unit):
        piece = SimpleNamespace(what=what, total=total, unit=unit, done=0)
        piece.advance = lambda count=1: setattr(piece, "done", piece.done + count)
        self.pieces.append(piece)
        yield piece


@pytest.fixture(scope="module")
def watched():
    return Watched()


@pytest.fixture(scope="module")
def found(watched):
    return report.weights(
        weights(), tokens=TOKENS, visible=visible(), pieces=lambda ids: ["<abc"[i + 1] for i in ids], name="<mine>",
        shown=2, progress=watched,
    )  # fmt: skip


def rows(found):
    return {(row["layer"], row["head"]): row for row in found.numbers["heads"]}


def test_every_head_does_what_it_was_made_to_do(found):
    roles = {name: rows(found)[place]["role"] for name, place in HEADS.items()}
    assert roles == {
        "previous": "previous", "first": "first", "itself": "itself", "repeat": "repeat", "uniform": None, "other": None
    }  # fmt: skip


def test_values_and_baselines_are_those_counted_by_hand(found):
    seen, made = visible(), weights()
    far = np.abs(np.arange(T)[:, None] - np.arange(T))
    queries = seen.any(-1).sum()
    alike = seen / np.maximum(seen.sum(-1, keepdims=True), 1)
    for layer, head in HEADS.values():
        one = rows(found)[layer, head]["measures"]
        by_hand = (made[layer, :, head] * seen * far).sum() / queries
        assert one["distance"]["value"] == pytest.approx(by_hand, abs=1e-5)
        assert one["distance"]["baseline"] == pytest.approx((alike * far).sum() / queries, abs=1e-5)
        assert one["first token"]["value"] == pytest.approx(
            (made[layer, :, head] * seen)[..., 0].sum() / queries, abs=1e-5
        )
        for measure in one.values():
            assert measure["value"] is None or measure["low"] <= measure["value"] <= measure["high"]
    assert rows(found)[HEADS["previous"]]["measures"]["previous token"]["value"] == 1
    uniform = rows(found)[HEADS["uniform"]]["measures"]
    assert uniform["entropy"]["value"] == pytest.approx(uniform["entropy"]["baseline"], abs=1e-5)
    best = found.numbers["best_heads"]["attention"]
    assert best["previous token"]["chosen"] == [[list(HEADS["previous"])]] * 2
    assert len(found.numbers["layers"]["attention"]["distance"]) == L and found.numbers["examples"] == B
    assert json.dumps(found.numbers, allow_nan=False)


def test_the_page_is_whole_and_says_nothing_of_losses(found, watched, tmp_path):
    html = found.page.save(tmp_path / "report.html").read_text()
    assert "Where the heads of &lt;mine&gt; look" in html and "<mine>" not in html and "http://" not in html
    for heading in ("Near and far", "Where heads look", "Do heads differ", "See every head", "How this was measured"):
        assert heading in html
    assert "nats per" not in html and "first seed" not in html.lower() and "untrained" not in html
    assert [(p.what, p.total, p.unit, p.done) for p in watched.pieces] == [("where heads look", B, "examples", B)]
    assert list(found.drawings) == ["near_and_far_attention"]


@pytest.mark.slow
def test_weights_alone_are_enough_also_between_two_texts(found):
    made = weights()[:, 1:]  # without the padding
    alone = rows(report.weights(jnp.asarray(made)))
    given = rows(report.weights(made, tokens=TOKENS[1:]))
    assert set(alone[0, 0]["measures"]) == {"distance", "entropy", "first token"}
    for place, row in alone.items():
        assert {name: given[place]["measures"][name] for name in row["measures"]} == row["measures"]
    across = np.concatenate([made, 0 * made[..., :2]], -1).astype(np.float16)  # [L, B, N, T, S]
    wide = rows(report.weights(across))
    assert wide[0, 2]["measures"]["first token"]["value"] == pytest.approx(1, abs=1e-3)


GOOD = weights()
WRONG = {
    "four axes": (lambda: report.weights(GOOD[0]), r"weights must be \[L, B, N, T, S\] .* got \(11, 3, 7, 7\)"),
    "one example": (lambda: report.weights(GOOD[:, :1]), "at least 2 examples"),
    "logits": (lambda: report.weights(GOOD - 1), r"at least 0, got -1 to .* not the logits"),
    "integers": (lambda: report.weights(GOOD.astype(int)), "real numbers, .* got int64"),
    "NaN": (lambda: report.weights(GOOD * np.nan), "must be finite"),
    "rows": (lambda: report.weights(GOOD / 2), r"sum to 1 .* got 0.5 at .*=\[0, 0, 0, 0\], and 462 such"),
    "hidden keys": (
        lambda: report.weights(GOOD, visible=visible() & (np.arange(T) > 0)), "check that True in visible means"
    ),
    "no key": (lambda: report.weights(GOOD, visible=visible() & False), "some query must have a visible key"),
    "visible": (lambda: report.weights(GOOD, visible=np.tri(T, dtype=bool)), r"\[B, T, S\]=\(11, 7, 7\), .* \(7, 7\)"),
    "visible numbers": (lambda: report.weights(GOOD, visible=visible() * 1.0), "must be bool .* got float64"),
    "tokens": (lambda: report.weights(GOOD, tokens=TOKENS[0]), r"integers \[B, T\]=\(11, 7\), .* got int64 \(7,\)"),
    "tokens of another text": (lambda: report.weights(GOOD[..., :3, :], tokens=TOKENS[:, :3]), "T=3 and S=7"),
    "pieces": (lambda: report.weights(GOOD, pieces=["a"]), "pieces must be a function .* got list"),
    "shown": (lambda: report.weights(GOOD, shown=0), "shown must be a whole number of at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_cannot_be_right_are_refused(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^report.weights: .*{message}"):
        call()


V, LENGTH, WINDOWS = 11, 8, 6
CONFIG = language_model.Config(vocab_size=V, d_model=8, num_heads=2, num_layers=1, d_ff=8)
TEXT = np.random.default_rng(1).integers(0, V, WINDOWS * LENGTH + 1)


def of_text(model=language_model, params=None, tokens=TEXT, **options):
    return report.heads(model, params, CONFIG, tokens, **{"length": LENGTH, **options})


WRONG_TEXTS = {
    "two axes": (lambda: of_text(tokens=TEXT[None]), r"integers \[n\], one running text, got int64 \(1, 49\)"),
    "letters": (lambda: of_text(tokens=np.array(["a"])), "must be integers"),
    "too short": (lambda: of_text(tokens=TEXT[:25]), "at least 4 windows of length=8, more than 25 tokens, got 25"),
    "no length": (lambda: of_text(length=1), "length must be a whole number of at least 2 tokens, got 1"),
    "another vocabulary": (lambda: of_text(tokens=TEXT + 5), f"below vocab_size={V}, got 1[1-5]; .* tokenizer"),
    "no such token": (lambda: of_text(hidden=V), f"hidden must be a token, .* below vocab_size={V}, got {V}"),
    "no model": (lambda: of_text(model=ModuleType("mine")), "'mine' without features, logits, apply_captured, st"),
    "one seed's baseline": (
        lambda: of_text(params=[1, 2], untrained=[1]), "untrained must be as many models as params, 2, got 1"
    ),
    "shown": (lambda: of_text(shown=True), "shown must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TEXTS)
def test_texts_and_models_that_cannot_be_reported_are_refused(name):
    call, message = WRONG_TEXTS[name]
    with pytest.raises(ValueError, match=f"^report.*{message}"):
        call()


def test_relations_must_be_of_attentions_that_are_there():
    whole = SimpleNamespace(num_layers=1, num_heads=2)
    read = text.Text(TEXT, LENGTH, 4, "token", lambda ids: [str(one) for one in ids], str, "windows")
    subject = text.make_subject(language_model, whole, read)
    nouns = Relation("pronoun → its noun", "encoder", "noun")
    for changes, message in (
        ({"relations": (nouns,)}, "must be of one of the subject's kinds of attention, self, got 'encoder'"),
        ({"aligned": "self: a → b"}, "must be the key of one of its relations, none, got 'self: a → b'"),
    ):
        with pytest.raises(ValueError, match=message):
            report.examine(subject._replace(**changes), [None], [None])
    with pytest.raises(ValueError, match="as many models as trained, at least one, got 2 and 1"):
        report.examine(subject, [None], [None, None])


@pytest.fixture(scope="module")
def params():
    return [language_model.init_params(jax.random.key(seed), CONFIG) for seed in (3, 4)]


@pytest.mark.slow
def test_a_model_and_its_weights_alone_say_the_same_of_where_heads_look(params):
    watched = Watched()
    whole = of_text(params=params[0], shown=2, name="tiny", progress=watched)
    windows = TEXT[:-1].reshape(WINDOWS, LENGTH)
    _, captured = language_model.apply_captured(params[0], windows, CONFIG, capture=("weights",))
    alone = rows(report.weights(captured.attention["weights"], tokens=windows))
    for place, row in rows(whole).items():
        measures = alone[place]["measures"]
        assert set(measures) < set(row["measures"])
        for name, one in measures.items():
            assert one == pytest.approx(row["measures"][name], abs=2e-5, nan_ok=True), name
    assert whole.numbers["seeds"] == 1 and whole.numbers["sentences"] == WINDOWS
    html = whole.page.html()
    assert "What the heads of tiny do" in html and "windows of the text that was handed in" in html
    assert "lost_self" in whole.drawings and all(p.done == p.total for p in watched.pieces if p.unit == "windows")
    assert {p.what for p in watched.pieces} >= {"where heads look", "the loss without each head", "measuring heads"}


@pytest.mark.slow
def test_a_module_of_ones_own_and_several_models(params):
    own = ModuleType("own")
    for name in ("features", "logits", "apply_captured", "stages"):
        setattr(own, name, getattr(language_model, name))
    with pytest.raises(ValueError, match="untrained must be given, .* own has no init_params"):
        of_text(model=own, params=params)
    found = of_text(model=own, params=params, untrained=params[::-1])
    assert found.numbers["seeds"] == 2 and len(found.numbers["heads"]) == 4
    assert "2 trained models (seeds)" in found.page.html()
