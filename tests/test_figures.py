"""Figures: the numbers beside the picture are exact, the files are the same every time, mistakes are named."""

import ast
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiers import tiered

from mhajax import figures

pytest.importorskip("matplotlib")

ROWS, COLUMNS = ["a", "$b$", "c"], ["u", "v,w", "x", 'y"', "z"]


def weights(*shape):
    raw = np.random.default_rng(0).random(shape).astype(np.float32)
    return raw / raw.sum(-1, keepdims=True)


def drawings():
    steps, few = np.arange(1, 200), np.array([50, 100, 150])
    return {
        "patterns": figures.attention_patterns(weights(2, 2, 3, 5), ROWS, COLUMNS, title="patterns"),
        "curve": figures.training_curve(
            {"training": (steps, 1 / steps), "validation": (few, 1.5 / few)},
            title="curve",
            ylabel="loss (nats)",
            spread={"validation": (1.2 / few, 1.9 / few)},
        ),
        "table": figures.head_table(weights(2, 3), title="table", label="share", baseline=0.3),
    }


@pytest.mark.slow
def test_files_are_the_same_every_time(tmp_path):
    for run in ("first", "second"):
        for name, drawing in drawings().items():
            paths = figures.save(drawing, tmp_path / run / f"{name}.v1")
            assert [path.name for path in paths] == [f"{name}.v1.{ending}" for ending in ("svg", "pdf", "png", "csv")]
    for first in sorted((tmp_path / "first").iterdir()):
        assert first.read_bytes() == (tmp_path / "second" / first.name).read_bytes(), first.name
    assert len(list((tmp_path / "first").iterdir())) == 12


@pytest.mark.slow
def test_saving_twice_changes_nothing(tmp_path):
    drawing = drawings()["patterns"]
    first = [path.read_bytes() for path in figures.save(drawing, tmp_path / "a")]
    assert first == [path.read_bytes() for path in figures.save(drawing, tmp_path / "b")]


def test_nothing_global_changes():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawings()
    assert dict(matplotlib.rcParams) == before


def test_attention_patterns_table(tmp_path):
    values = weights(2, 1, 3, 5)
    header, rows = figures.attention_patterns(values, ROWS, COLUMNS, title="t").table
    assert header == ("layer", "head", "query_index", "query_word", "key_index", "key_word", "weight")
    assert len(rows) == 2 * 1 * 3 * 5
    assert rows[0] == (0, 0, 0, "a", 0, "u", float(str(values[0, 0, 0, 0])))
    assert rows[15 + 5 + 3] == (1, 0, 1, "$b$", 3, 'y"', float(str(values[1, 0, 1, 3])))
    assert all(np.float32(row[-1]) == values[row[0], row[1], row[2], row[4]] for row in rows)

    named = figures.attention_patterns(values, ROWS, COLUMNS, title="t", layer_names=["low", "high"])
    assert named.table[1][-1][:2] == ("high", 0)
    with figures.save(named, tmp_path / "named")[3].open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1:] == [[str(cell) for cell in row] for row in named.table[1]]


def test_training_curve_table(tmp_path):
    series = {"training": ([1, 2], [0.5, 0.25]), "validation": ([2], [np.float32(0.1)])}
    plain = figures.training_curve(series, title="t", ylabel="loss")
    path = figures.save(plain, tmp_path / "plain")[3]
    assert path.read_text() == "series,step,value\ntraining,1,0.5\ntraining,2,0.25\nvalidation,2,0.1\n"
    banded = figures.training_curve(series, title="t", ylabel="loss", spread={"training": ([0.4, 0.2], [0.6, 0.3])})
    path = figures.save(banded, tmp_path / "banded")[3]
    assert path.read_text() == (
        "series,step,value,low,high\ntraining,1,0.5,0.4,0.6\ntraining,2,0.25,0.2,0.3\nvalidation,2,0.1,,\n"
    )


def test_a_curve_over_any_setting(tmp_path):
    drawing = figures.curve({"8 words": ([1, 4], [0.5, 0.25])}, title="t", xlabel="heads", ylabel="error")
    assert figures.save(drawing, tmp_path / "c")[3].read_text() == "series,heads,value\n8 words,1,0.5\n8 words,4,0.25\n"
    assert drawing.figure.axes[0].get_xlabel() == "heads"
    with pytest.raises(ValueError, match=r"figures.curve: series\['a'\] settings must increase"):
        figures.curve({"a": ([2, 1], [0, 0])}, title="t", xlabel="heads", ylabel="error")


def test_head_table_table(tmp_path):
    drawing = figures.head_table([[0.5, -0.001], [1.0, 0.25]], title="t", label="share", baseline=0.0)
    path = figures.save(drawing, tmp_path / "heads")[3]
    assert path.read_text() == "layer,head,value\n0,0,0.5\n0,1,-0.001\n1,0,1.0\n1,1,0.25\n"
    assert [text.get_text() for text in drawing.figure.axes[0].texts] == ["0.50", "0.00", "1.00", "0.25"]
    low, high = drawing.figure.axes[0].images[0].get_clim()
    assert (low, high) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("layers", "heads", "queries", "keys"),
    tiered([(1, 1, 1, 1), (2, 4, 12, 14), (3, 8, 5, 3), (1, 1, 40, 90)], (2, 4, 12, 14)),
)
def test_no_text_overlaps_or_leaves_the_page(layers, heads, queries, keys):
    drawing = figures.attention_patterns(
        weights(layers, heads, queries, keys),
        [f"query{i}" for i in range(queries)],
        [f"key{i}" for i in range(keys)],
        title="A rather long title above a picture that may be small",
    )
    drawing.figure.draw_without_rendering()
    page = drawing.figure.bbox
    boxes = []
    for axes in drawing.figure.axes:
        texts = [axes._left_title, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.yaxis.label]  # type: ignore
        boxes += [text.get_window_extent() for text in texts if text.get_text()]
    boxes += [text.get_window_extent() for text in drawing.figure.texts]
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_many_series_get_a_legend_that_fits():
    series = {f"a long name of seed {i}": ([1, 2, 3], [i, i, i]) for i in range(9)}
    figure = figures.training_curve(series, title="t", ylabel="loss").figure
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend()
    assert legend is not None and legend.get_window_extent().x1 <= figure.bbox.x1


def patterns(values, rows=ROWS, columns=COLUMNS, **options):
    return figures.attention_patterns(values, rows, columns, title="t", **options)


def curve(series, **options):
    return figures.training_curve(series, title="t", ylabel="loss", **options)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: patterns(weights(2, 3, 5)), "weights must be [L, N, T, S] with no empty axis, got (2, 3, 5)"),
        (lambda: patterns(weights(0, 1, 3, 5)), "with no empty axis, got (0, 1, 3, 5)"),
        (lambda: patterns(weights(1, 1, 3, 5), rows=["a"]), "row_labels must have T=3 words, got 1"),
        (lambda: patterns(weights(1, 1, 3, 5), columns=["a"] * 4), "column_labels must have S=5 words, got 4"),
        (lambda: patterns(weights(2, 1, 3, 5), layer_names=["a"]), "layer_names must have L=2 names, got 1"),
        (lambda: patterns(np.full((1, 1, 3, 5), np.nan)), "weights must be finite, got nan at (0, 0, 0, 0)"),
        (lambda: patterns(np.full((1, 1, 3, 5), np.inf)), "weights must be finite, got inf"),
        (lambda: patterns(np.full((1, 1, 3, 5), 3.0)), "between 0 and 1, got 3 to 3; pass the attention after"),
        (lambda: curve({}), "series must have one entry or more"),
        (lambda: curve({"a": ([1, 2], [1.0])}), "series['a'] must have P=2 values, got 1"),
        (lambda: curve({"a": ([2, 1], [1.0, 2.0])}), "series['a'] steps must increase"),
        (lambda: curve({"a": ([1], [np.nan])}), "series['a'] must be finite, got nan at (0,)"),
        (lambda: curve({"a": ([1], [1.0])}, spread={"b": ([1], [1])}), "spread['b'] must belong to a series"),
        (lambda: curve({"a": ([1], [1.0])}, spread={"a": ([1, 2], [1, 2])}), "spread['a'] must have P=1 values"),
        (lambda: figures.head_table([1.0], title="t", label="x"), "values must be [L, N] with no empty axis, got (1,)"),
        (lambda: figures.head_table([[np.nan]], title="t", label="x"), "values must be finite, got nan at (0, 0)"),
        (lambda: figures.head_table([[1]], title="t", label="x", baseline=np.nan), "baseline must be a finite number"),
    ],
)
def test_errors(draw, message):
    with pytest.raises(ValueError, match=r"^figures\.\w+: ") as caught:
        draw()
    assert message in str(caught.value)


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "mhajax\[experiments\]"'):
        figures.head_table([[1.0]], title="t", label="x")


def test_the_module_imports_without_matplotlib():
    code = "import sys, mhajax.figures; assert 'matplotlib' not in sys.modules"
    root = Path(figures.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_pyplot_is_never_imported():
    for path in Path(figures.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [name.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for name in node.names]
        assert not any("pyplot" in name for name in names), path
