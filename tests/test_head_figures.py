"""Figures of heads: tables are the input, words are where they belong, distances survive, mistakes are named."""

import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from tiers import tiered

from mhajax import figures

pytest.importorskip("matplotlib")

TARGET, SOURCE = ["die", "alte", "Bank"], ["the", "old", "$bank$", "of", "rivers"]


def attention(*shape):
    raw = np.random.default_rng(0).random(shape).astype(np.float32)
    return raw / raw.sum(-1, keepdims=True)


def between(count):
    return np.random.default_rng(1).normal(size=(count, count)).astype(np.float32)


def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def plane(count):
    return np.random.default_rng(2).normal(size=(count, 2))


def drawings(num_layers, num_heads):
    values = attention(num_layers, num_heads)
    count = num_layers * num_heads
    words = [["previous", "antecedent"][layer % 2 : layer % 2 + 1] * num_heads for layer in range(num_layers)]
    curve = np.linspace(1, 0, 5)
    return {
        "table": figures.head_table(
            values, title="Roles", label="share of attention", words=words, interval=(values - 0.05, values + 0.05)
        ),
        "layers": figures.by_layer(
            {"mean distance (tokens)": values, "entropy (nats)": values},
            title="Layers",
            baselines={"entropy (nats)": np.ones(num_layers)},
        ),
        "map": figures.head_map(distances(plane(count)), num_layers, title="Heads as far apart as they are"),
        "pruning": figures.pruning_curve(
            range(5), {"random": (curve, curve - 0.1, curve + 0.1)}, title="Pruning", ylabel="BLEU"
        ),
        "relations": figures.relation_accuracy(
            {"a relation with a long name": (0.5, 0.4, 0.6, 0.3), "other": (0.7, 0.6, 0.8, 0.1)},
            title="Relations",
            label="share right",
        ),
        "alignment": figures.alignment_matrix(
            attention(3, 5), TARGET, SOURCE, sure=[(0, 0)], possible=[(1, 1)], title="Gold"
        ),
        "interactions": figures.interaction_matrix(between(count), num_layers, title="Pairs", label="nats"),
        "matching": figures.matched_heads(between(count), np.arange(count)[::-1], num_layers, title="Matching"),
        "lines": figures.token_lines(attention(2, 3, 5), TARGET, SOURCE, title="Lines"),
    }


@pytest.fixture(scope="module")
def small():
    return drawings(2, 4)


@pytest.fixture(scope="module")
def large():
    return drawings(12, 16)


NAMES = "table layers map pruning relations alignment interactions matching lines".split()


def texts(drawing):
    """What is written anywhere in a figure."""
    import matplotlib.text

    return {text.get_text() for text in drawing.figure.findobj(matplotlib.text.Text)} - {""}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", tiered(["small", "large"], "large"))
def test_nothing_leaves_the_page_and_the_page_is_no_poster(size, name, request):
    figure = request.getfixturevalue(size)[name].figure
    width, height = figure.get_size_inches()
    assert 2 < width < 13 and 1.5 < height < 9
    figure.draw_without_rendering()
    box = figure.get_tightbbox()  # inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


@pytest.mark.slow
def test_files_are_the_same_every_time(small, tmp_path):
    again = drawings(2, 4)
    for name in ("map", "lines"):
        first, second = (
            figures.save(made[name], tmp_path / run / name) for run, made in (("first", small), ("second", again))
        )
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes(), one
        assert not re.search(rb"CreationDate|Producer|/Creator", first[1].read_bytes())


def test_svg_goes_into_a_page(small):
    one, other = figures.svg(small["lines"]), figures.svg(small["relations"])
    assert one == figures.svg(small["lines"])
    seen = []
    for text in (one, other):
        assert text.startswith("<svg ") and text.endswith("</svg>")
        assert "<!--" not in text and "<metadata" not in text and '">*{' not in text
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
        seen.append(set(ids))
    assert not seen[0] & seen[1]
    root = xml.fromstring(one)
    assert root.get("aria-label") == "Lines" and root.get("viewBox")


def test_head_table_has_words_and_intervals():
    values, low, high = np.array([[0.5, 0.25, 1.0]]), np.array([[0.4, -0.05, 1.0]]), np.array([[0.6, 0.3, 1.0]])
    drawing = figures.head_table(
        values, title="t", label="x", words=[["previous", "", "subject"]], interval=(low, high)
    )
    assert drawing.table == (
        ("layer", "head", "value", "low", "high", "word"),
        [(0, 0, 0.5, 0.4, 0.6, "previous"), (0, 1, 0.25, -0.05, 0.3, ""), (0, 2, 1.0, 1.0, 1.0, "subject")],
    )
    written = [text.get_text() for text in drawing.figure.axes[0].texts]
    small = [".40 to .60", "\N{MINUS SIGN}.05 to .30", "1.00 to 1.00"]
    assert written == ["0.50", "previous", small[0], "0.25", small[1], "1.00", "subject", small[2]]


def test_by_layer_table_and_lines():
    values, uniform = attention(3, 5), np.array([1.0, 2.0, 3.0])
    drawing = figures.by_layer({"distance": values, "entropy": 2 * values}, title="t", baselines={"entropy": uniform})
    header, rows = drawing.table
    assert header == ("measure", "layer", "head", "value", "baseline") and len(rows) == 2 * 3 * 5
    assert all(np.float32(row[3]) == values[row[1], row[2]] and row[4] == "" for row in rows[:15])
    assert [row[:3] + row[4:] for row in rows[15:21:5]] == [("entropy", 0, 0, 1.0), ("entropy", 1, 0, 2.0)]
    (dots,) = drawing.figure.axes[1].get_lines()
    np.testing.assert_array_equal(dots.get_ydata(), 2 * values.ravel())
    bars = [np.stack(bar.get_segments()) for bar in drawing.figure.axes[1].collections]  # [L, ends, (x, y)]
    for bar, height in zip(bars, (2 * values.mean(1), uniform), strict=True):
        np.testing.assert_allclose(bar[:, :, 1], np.stack([height, height], -1))
        np.testing.assert_array_equal(np.rint(bar[:, :, 0]), [[0, 0], [1, 1], [2, 2]])  # each within its layer
    assert len(drawing.figure.axes[0].collections) == 1
    assert "dashed: uniform attention" in drawing.figure.texts[1].get_text()


def test_head_map_keeps_distances_of_a_plane(small, large):
    points = plane(2 * 4)
    header, rows = small["map"].table
    assert header == ("layer", "head", "x", "y")
    assert [row[:2] for row in rows] == [(layer, head) for layer in range(2) for head in range(4)]
    np.testing.assert_allclose(distances(np.array([row[2:] for row in rows])), distances(points), atol=1e-9)
    assert small["map"].figure.texts[1].get_text().startswith("100 % of the variance")
    assert {"1·3", "layer 1"} <= texts(small["map"])
    left_out = re.search(r"\((\d+) of 192 names left out", large["map"].figure.texts[1].get_text())
    named = [text for text in large["map"].figure.axes[0].texts if "·" in text.get_text()]
    assert left_out and len(named) == 192 - int(left_out[1])
    boxes = [text.get_window_extent() for text in named]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def test_head_map_says_what_it_does_not_show():
    """Four heads all equally far apart need three dimensions, each with a third of the variance."""
    drawing = figures.head_map(1.0 - np.eye(4), 2, title="t")
    assert drawing.figure.texts[1].get_text().startswith("67 % of the variance")
    assert drawing.figure.axes[0].get_xlabel() == "first dimension, 33 %"
    same = figures.head_map(np.zeros((3, 3)), 1, title="t")
    assert [row[2:] for row in same.table[1]] == [(0.0, 0.0)] * 3


def test_pruning_curve_table():
    orders = {"important": ([3, 2], [2.5, 1.5], [3.5, 2.5]), "random": ([3, 1], [3, 0], [3, 2])}
    drawing = figures.pruning_curve([0, 4], orders, title="t", ylabel="BLEU")
    assert drawing.table == (
        ("order", "removed", "mean", "low", "high"),
        [("important", 0, 3, 2.5, 3.5), ("important", 4, 2, 1.5, 2.5), ("random", 0, 3, 3, 3), ("random", 4, 1, 0, 2)],
    )
    assert drawing.figure.axes[0].get_xlabel() == "heads removed"
    assert {"important", "random", "BLEU"} <= texts(drawing)


def test_relation_accuracy_with_a_second_baseline():
    relations = {"a": (0.5, 0.4, 0.6, 0.3), "b": (0.9, 0.8, 1.0, 0.3)}
    drawing = figures.relation_accuracy(relations, title="t", label="share", second={"a": 0.7, "b": 0.1})
    assert drawing.table == (
        ("relation", "value", "low", "high", "baseline", "second"),
        [("b", 0.9, 0.8, 1.0, 0.3, 0.1), ("a", 0.5, 0.4, 0.6, 0.3, 0.7)],
    )
    with pytest.raises(ValueError, match="second must have a number for every relation, got none for 'a'"):
        figures.relation_accuracy(relations, title="t", label="share", second={"b": 0.1})


def test_relation_accuracy_is_sorted():
    relations = {"low": (0.2, 0.1, 0.3, 0.25), "high": np.float32([0.9, 0.8, 1.0, 0.4])}
    drawing = figures.relation_accuracy(relations, title="t", label="share", baseline_name="best offset")
    assert drawing.table == (
        ("relation", "value", "low", "high", "baseline"),
        [("high", 0.9, 0.8, 1.0, 0.4), ("low", 0.2, 0.1, 0.3, 0.25)],
    )
    assert [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()] == ["high", "low"]
    marks = [line.get_xdata()[0] for line in drawing.figure.axes[0].get_lines() if line.get_marker() == "|"]
    assert marks == [0.4, 0.25]
    assert "0.90 [0.80, 1.00]" in texts(drawing)


def test_alignment_matrix_frames_the_gold_links():
    weights = attention(3, 5)
    drawing = figures.alignment_matrix(
        weights, TARGET, SOURCE, sure=[(0, 4), (2, 1)], possible=[(0, 4), (1, 3)], title="t"
    )
    header, rows = drawing.table
    assert header == ("target_index", "target_word", "source_index", "source_word", "weight", "gold")
    assert {(row[0], row[2]): row[5] for row in rows if row[5]} == {(0, 4): "sure", (2, 1): "sure", (1, 3): "possible"}
    assert all(np.float32(row[4]) == weights[row[0], row[2]] for row in rows) and rows[7][1::2] == (
        "alte",
        "$bank$",
        "",
    )
    frames = {(round(f.get_y()), round(f.get_x())): f.get_linestyle() for f in drawing.figure.axes[0].patches}
    assert set(frames) == {(0, 4), (2, 1), (1, 3)} and frames[0, 4] == "-" and frames[1, 3] != "-"
    dots = drawing.figure.axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(dots, [(s, t) for t, s in enumerate(weights.argmax(1))])


def test_interaction_matrix_is_coloured_around_zero():
    values = between(6)
    np.fill_diagonal(values, 100.0)
    drawing = figures.interaction_matrix(values, 2, title="t", label="nats")
    header, rows = drawing.table
    assert header == ("layer", "head", "other_layer", "other_head", "value") and len(rows) == 36
    assert all(np.float32(row[4]) == values[3 * row[0] + row[1], 3 * row[2] + row[3]] for row in rows)
    off = np.abs(values[~np.eye(6, dtype=bool)]).max()
    low, high = drawing.figure.axes[0].images[0].get_clim()
    assert (low, high) == pytest.approx((-off, off))
    edges = [line.get_ydata()[0] for line in drawing.figure.axes[0].get_lines()]
    assert 2.5 in edges and {"0·0", "1·2"} <= texts(drawing)


def test_layers_are_named_where_heads_cannot_be(large):
    assert {"layer 0", "layer 11"} <= texts(large["interactions"])
    assert "0·0" not in texts(large["interactions"])


def test_matched_heads_puts_pairs_on_the_diagonal():
    order = np.array([2, 0, 3, 1])
    similarity = np.full((4, 4), 0.125)
    similarity[np.arange(4), order] = 0.75
    drawing = figures.matched_heads(similarity, order, 2, title="t", names=("seed 0", "seed 1"))
    header, rows = drawing.table
    assert header == ("layer", "head", "other_layer", "other_head", "value", "matched")
    pairs = [(2 * row[0] + row[1], 2 * row[2] + row[3], row[4]) for row in rows if row[5]]
    assert pairs == [(i, int(j), 0.75) for i, j in enumerate(order)]
    before, after = drawing.figure.axes[:2]
    np.testing.assert_array_equal(before.images[0].get_array(), similarity)
    np.testing.assert_array_equal(np.diag(after.images[0].get_array()), [0.75] * 4)
    assert [label.get_text() for label in after.get_xticklabels()] == ["1·0", "0·0", "1·1", "0·1"]
    assert {"before: diagonal 0.12", "after: diagonal 0.75", "heads of seed 0", "heads of seed 1"} <= texts(drawing)


def test_token_lines_are_as_strong_as_the_weights():
    weights = np.array([[[1.0, 0.0], [0.25, 0.75]], [[0.01, 0.99], [0.5, 0.5]]])
    drawing = figures.token_lines(weights, ["a", "b"], ["u", "$v$"], title="t", head_names=["0·1", "3·2"])
    header, rows = drawing.table
    assert header == ("head", "query_index", "query_word", "key_index", "key_word", "weight")
    assert rows[2] == ("0·1", 1, "b", 0, "u", 0.25) and len(rows) == 8
    first, second = (axes.collections[0] for axes in drawing.figure.axes)
    ends = [(round(path[0][1]), round(path[1][1])) for path in first.get_segments()]
    assert ends == [(1, 0), (1, 1), (0, 0)]  # the strongest last, on top
    assert list(np.argsort(first.get_linewidths())) == [0, 1, 2] == list(np.argsort(first.get_alpha()))
    assert len(second.get_segments()) == 3  # 0.01 is not drawn
    assert {"0·1", "3·2", "a", "$v$"} <= texts(drawing)


def lines(weights, rows=TARGET, columns=SOURCE, **options):
    return figures.token_lines(weights, rows, columns, title="t", **options)


def table(**options):
    return figures.head_table([[1.0, 2.0]], title="t", label="x", **options)


def aligned(sure):
    return figures.alignment_matrix(attention(3, 5), TARGET, SOURCE, sure=sure, title="t")


def matched(order, matrix=None):
    return figures.matched_heads(between(4) if matrix is None else matrix, order, 2, title="t")


def relation(*numbers):
    return figures.relation_accuracy({"a": numbers}, title="t", label="x")


def by_layer(measures, **options):
    return figures.by_layer(measures, title="t", **options)


def pruning(removed, orders):
    return figures.pruning_curve(removed, orders, title="t", ylabel="y")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: table(words=[["a", "b"], ["c", "d"]]), "words must have L=1 rows, got 2"),
        (lambda: table(words=[["a"]]), "words[0] must have N=2 words, got 1"),
        (
            lambda: table(interval=([[0, 0]], [[1.0]])),
            "interval high must have the shape of values, (1, 2), got (1, 1)",
        ),
        (lambda: table(interval=([[0, 5]], [[1, 1]])), "interval must have low <= high, got 5 and 1 at (0, 1)"),
        (lambda: by_layer({}), "measures must have one entry or more"),
        (lambda: by_layer({"a": [1.0]}), "measures['a'] must be [L, N] with no empty axis, got (1,)"),
        (lambda: by_layer({"a": [[1.0]]}, baselines={"b": [1]}), "baselines['b'] must belong to a measure"),
        (lambda: by_layer({"a": [[1.0]]}, baselines={"a": [1, 2]}), "baselines['a'] must have L=1 numbers, got 2"),
        (lambda: figures.head_map(np.zeros((2, 3)), 1, title="t"), "distances must be square, [L·N, L·N], got (2, 3)"),
        (lambda: figures.head_map(np.eye(4), 2, title="t"), "0 on the diagonal; got a least of 0, a diagonal up to 1"),
        (lambda: figures.head_map(np.triu(1 - np.eye(4)), 2, title="t"), "and 1 between d and its transpose"),
        (lambda: figures.head_map(np.zeros((4, 4)), 3, title="t"), "num_layers must divide the L·N=4 heads"),
        (lambda: pruning([0, 1], {}), "orders must have one entry or more"),
        (lambda: pruning([1, 0], {"a": ([1, 2], [1, 2], [1, 2])}), "removed must increase"),
        (lambda: pruning([0, 1], {"a": ([1], [1], [1])}), "orders['a'] mean must have P=2 values, got 1"),
        (lambda: pruning([0, 1], {"a": ([1, 2], [2, 3], [0, 4])}), "must have low <= high, got 2 and 0 at (0,)"),
        (lambda: figures.relation_accuracy({}, title="t", label="x"), "relations must have one entry or more"),
        (lambda: relation(1, 2, 3), "relations['a'] must be (value, low, high, baseline), got 3"),
        (lambda: relation(np.nan, 0, 1, 0), "relations['a'] value must be finite, got nan; find out"),
        (lambda: relation([1, 2], 0, 1, 0), "relations['a'] value must be a number with no empty axis, got (2,)"),
        (lambda: aligned([(3, 0)]), "sure must hold (t, s) below (T, S)=(3, 5), got (3, 0)"),
        (lambda: aligned([(0, -1)]), "got (0, -1)"),
        (lambda: figures.interaction_matrix(between(4), 0, title="t", label="x"), "num_layers must divide"),
        (lambda: matched([0, 1, 2, 2]), "order must hold each of the heads 0 to 3 once, got int64(4,) [0, 1, 2, 2]"),
        (lambda: matched([0.0, 1, 2, 3]), "got float64(4,)"),
        (lambda: matched([0, 1, 2, 3], np.full((4, 4), np.inf)), "similarity must be finite, got inf at (0, 0)"),
        (lambda: lines(attention(3, 5)), "weights must be [N, T, S] with no empty axis, got (3, 5)"),
        (lambda: lines(attention(1, 3, 5), rows=["a"]), "row_labels must have T=3 words, got 1"),
        (lambda: lines(attention(1, 3, 5), head_names=["a", "b"]), "head_names must have N=1 names, got 2"),
        (lambda: lines(-attention(1, 3, 5)), "pass the attention after the softmax"),
    ],
)
def test_errors(draw, message):
    with pytest.raises(ValueError, match=r"^figures\.\w+: ") as caught:
        draw()
    assert message in str(caught.value)
