"""The report page: one file, whole and escaped; which measures beat their baseline; no word to any network."""

import base64
import csv
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mhajax import figures, view
from mhajax.report import page
from mhajax.statistics import Measure
from tests import browser as browsers

pytest.importorskip("matplotlib")
NAN = float("nan")
GOOD, SMALL, WORSE = Measure(0.9, 0.8, 0.95, 0.4), Measure(0.5, 0.35, 0.6, 0.4), Measure(0.2, 0.1, 0.3, 0.4)
EVIL = '<script>alert(1)</script> & "it\'s"'


class Tree(HTMLParser):
    """Start tags with their attributes and text inside; tags that are left open or closed twice are found."""

    EMPTY = {"meta", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in self.EMPTY:
            self.open.append((tag, self.found[-1][2]))

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, text in self.open:
            text.append(data)

    def all(self, tag, **attributes):
        """(attributes, text) of every such tag."""
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.found
            if name == tag and attributes.items() <= {key: value for key, value in attrs.items()}.items()
        ]


def build():
    """A page with everything: nested sections, the same heading and the same drawing twice, two views."""
    report = page.Page(f"Title {EVIL}", "Lead & more.", page.element("em", "Second <lead>."))
    first = report.section("Results")
    first.text(f"Text {EVIL}", page.element("a", "down", href="#results-2"))
    first.table(
        ["head", page.Column("right", ".0%"), page.Column("error", ".2f", "lower"), page.Column("far", ".1f", ""), "n"],
        [["0·1", GOOD, GOOD, WORSE, 12345], [f"1·0 {EVIL}", SMALL, WORSE, Measure(-1.5, NAN, NAN, NAN), None]],
        caption="Heads.",
    )
    inner = first.section("Inner")
    drawing = figures.head_table(np.arange(6).reshape(2, 3), title=f"a {EVIL}", label="b")
    inner.figure(drawing, "Drawn once.", name="numbers")
    inner.section("Innermost").figure(drawing, "Drawn twice.")
    second = report.section("Results")
    second.items(["one <i>", "two"])
    words = ["a", EVIL, "c"]
    for _ in range(2):
        second.view(view.heads(view.Attention(words, words, np.full((2, 5, 3, 3), 1 / 3))), "Every <head>.")
    return report


@pytest.fixture(scope="module")
def text():
    return build().html()


@pytest.fixture(scope="module")
def tree(text):
    return Tree(text)


def test_it_is_a_whole_document_in_a_language(text, tree):
    assert text.startswith("<!doctype html>\n<html lang=")
    assert tree.all("html")[0][0]["lang"] == "en"
    assert page.Page("t", language="de").html().count('lang="de"') == 1
    assert tree.all("title")[0][1] == f"Title {EVIL}"
    assert tree.all("meta", charset="utf-8") and tree.all("meta", name="viewport")


def test_nothing_comes_from_outside(text, tree):
    assert re.findall(r"https?://|//[a-z]+\.", text) == []
    links = [attrs[name] for _, attrs, _ in tree.found for name in ("href", "src", "xlink:href") if name in attrs]
    assert [link for link in links if not re.match("#|data:", link)] == []


def test_the_policy_allows_this_script_and_no_other(tree):
    policy = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    running = [text for attrs, text in tree.all("script") if attrs.get("type") != "application/json"]
    assert running == [view.script()]
    digest = base64.b64encode(hashlib.sha256(running[0].encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'", "script-src": f"'sha256-{digest}'", "style-src": "'unsafe-inline'",
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    without = Tree(page.Page("without views").html())
    assert "script-src 'none'" in without.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert without.all("script") == []


def test_text_is_escaped_unless_it_was_made_here(text, tree):
    assert "<script>alert" not in text and "<script> alert" not in text
    assert f"Text {EVIL}" in [text for _, text in tree.all("p")]
    assert tree.all("em")[0][1] == "Second <lead>."
    assert page.element("p", "<", class_='"', hidden=True, id=None) == '<p class="&quot;" hidden>&lt;</p>'


def test_headings_in_order_and_contents_that_lead_to_them(tree):
    headings = [(tag, attrs.get("id"), "".join(text)) for tag, attrs, text in tree.found if re.match(r"h\d", tag)]
    assert [heading[:2] for heading in headings] == [
        ("h1", None), ("h2", "results"), ("h3", "inner"), ("h4", "innermost"), ("h2", "results-2")
    ]  # fmt: skip
    contents = [attrs["href"] for attrs, _ in tree.all("a") if attrs["href"].startswith("#")]
    assert contents == ["#results", "#inner", "#results-2", "#results-2"]  # and the link in the text


def test_ids_are_unique_and_references_lead_somewhere(text, tree):
    ids = [attrs["id"] for _, attrs, _ in tree.found if "id" in attrs]
    assert len(ids) == len(set(ids)) and len(tree.all("svg")) == 2
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_a_cell_says_whether_it_beats_its_baseline(tree):
    cells = [(attrs["class"], text) for attrs, text in tree.all("td") if "class" in attrs]
    assert cells == [
        ("number", "90%80%–95% vs 40%"),
        ("number unproven", "∘ 0.900.80–0.95 vs 0.40"),
        ("number", "0.20.1–0.3 vs 0.4"),
        ("number", "12,345"),
        ("number unproven", "∘ 50%35%–60% vs 40%"),
        ("number", "0.200.10–0.30 vs 0.40"),
        ("number", "−1.5"),
    ]
    assert [text for _, text in tree.all("strong")] == ["90%", "0.20"]
    assert [attrs["aria-label"] for attrs, _ in tree.all("span", **{"class": "mark"})] == [
        "not better than its baseline:"
    ] * 2
    assert "∘ marks what does not beat its baseline" in tree.all("figcaption")[0][1]


@pytest.mark.parametrize(
    ("measure", "better", "answer"),
    [
        (GOOD, "higher", True), (SMALL, "higher", False), (WORSE, "higher", False),
        (GOOD, "lower", False), (WORSE, "lower", True), (GOOD, "", None),
        (GOOD._replace(baseline=NAN), "higher", None), (Measure(0.4, 0.4, 0.4, 0.4), "higher", False),
    ],
)  # fmt: skip
def test_beats_baseline(measure, better, answer):
    assert page.beats_baseline(measure, better) is answer


def test_tables_and_figures_bring_their_numbers(tree):
    files = {attrs["download"]: attrs["href"] for attrs, _ in tree.all("a") if "download" in attrs}
    assert list(files) == ["heads.csv", "numbers.csv", "drawn-twice.csv"]
    read = {
        name: list(csv.reader(io.StringIO(base64.b64decode(link.split("base64,")[1]).decode())))
        for name, link in files.items()
    }
    assert read["heads.csv"][0][:6] == ["head", "right", "right, low", "right, high", "right, baseline", "error"]
    assert read["heads.csv"][1] == ["0·1", *"0.9 0.8 0.95 0.4 0.9 0.8 0.95 0.4 0.2 0.1 0.3 0.4 12345".split()]
    assert len(read["heads.csv"][2]) == len(read["heads.csv"][0])
    assert read["numbers.csv"][2] == ["0", "1", "1.0"]


# what is done to a section: what the message must hold
ERRORS = {
    "short row": (lambda part: part.table(["a", "b"], [["x", 1], ["y"]], caption=""), ("rows[1]", "2 cells", "got 1")),
    "array": (
        lambda part: part.table(["a", "b"], [["x", Measure(*np.ones((4, 3)))]], caption=""),
        ("rows[0], 'b'", "Measure of scalars", "(3,)"),
    ),
    "too deep": (lambda part: part.section("b").section("c").section("d"), ("three deep", "'d'")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, parts = ERRORS[name]
    with pytest.raises(ValueError, match="page") as caught:
        do(page.Page("t").section("a"))
    assert [part for part in parts if part not in str(caught.value)] == []


def test_the_same_page_has_the_same_bytes(tmp_path, text):
    assert build().save(tmp_path / "new" / "report.html").read_bytes() == text.encode()


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    browser = browsers.start(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(360, 740), (1200, 900)])
def test_it_opens_quietly_on_a_phone_and_a_desk(window, file, size, dark):
    browsers.show(window, file, *size, dark=dark)
    assert browsers.too_wide(window) <= 0
    lines = "host => host.shadowRoot.querySelectorAll('path').length"
    alive = f"return [...document.querySelectorAll('.mhajax-view')].map({lines})"
    assert window.execute_script(alive) == [9, 9]
    scroll = "const box = document.querySelector('.scroll'); return [box.scrollWidth > box.clientWidth, box.tabIndex]"
    assert window.execute_script(scroll) == [size[0] < 500, 0]
    ink, paper = (
        sum(map(int, re.findall(r"\d+", window.execute_script(f"return getComputedStyle(document.body).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) == dark and abs(ink - paper) > 500
    assert browsers.complaints(window) == ([], [])


def test_it_cannot_ask_the_network_even_if_it_wanted_to(window, file):
    browsers.show(window, file)
    refused = window.execute_async_script("""
        const done = arguments[0], seen = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          seen.push(event.effectiveDirective);
          if (seen.length === 3) done(seen.sort());
        });
        new Image().src = "http://127.0.0.1:9/x.png";
        fetch("http://127.0.0.1:9/").catch(() => {});
        const script = document.createElement("script");
        script.textContent = "document.title = 'changed'";
        document.body.append(script);
    """)
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert window.title == f"Title {EVIL}"
    browsers.complaints(window)  # it did complain


def test_it_prints(window, file):
    browsers.show(window, file)
    assert base64.b64decode(window.print_page()).startswith(b"%PDF")


def test_drawings_are_dark_on_a_dark_page_and_readable_on_a_phone(window, file):
    drawn = "const svg = document.querySelector('.paper svg'), box = svg.parentElement.getBoundingClientRect();"
    drawn += "return [getComputedStyle(svg).filter, svg.getBoundingClientRect().width, box.width]"
    browsers.show(window, file, 1200, 900)
    filter_, natural, _ = window.execute_script(drawn)
    assert filter_ == "none"
    browsers.show(window, file, 400, 740, dark=True)
    filter_, width, room = window.execute_script(drawn)
    assert filter_.startswith("invert(0.92)")
    assert width == min(natural, 46 * 16) and room <= 400 and browsers.too_wide(window) <= 0


def test_a_wide_page_has_its_contents_at_the_right(window, file):
    places = "return ['nav', 'main'].map(name => document.querySelector(name).getBoundingClientRect()).map(b => b.left)"
    for width, beside in ((1200, True), (1000, False)):
        browsers.show(window, file, width, 900)
        nav, main = window.execute_script(places)
        assert (nav > main + 600) == beside and (nav == main) != beside
