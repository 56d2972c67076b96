"""The view of heads: what it holds is what it was given, whatever the words are; and what a browser makes of it."""

import base64
import json
import re
from html.parser import HTMLParser
from importlib import resources

import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

from mhajax import view
from mhajax.view import page
from tests import browser as browsers

L, N, T, S = 2, 3, 5, 7
QUERIES = ["she", "</script><b>", "&amp;", ' "x" ', "<!--"]
KEYS = ["the", "<img src=x onerror=alert(1)>", "\u2028", "猫", "'", "\\u003c", ""]
GOLD = [(1, 3), (4, 0)]


def weights(seed, *shape):
    raw = np.random.default_rng(seed).random(shape) ** 4
    return raw / raw.sum(-1, keepdims=True)


CROSS, SELF, OTHER = weights(0, L, N, T, S), weights(1, L, 2, T, T), weights(2, L, N, T, S)
SENTENCES = [
    view.Sentence(
        "first <i>",
        {"cross": view.Attention(QUERIES, KEYS, CROSS, GOLD), "self": view.Attention(QUERIES, QUERIES, SELF)},
    ),
    view.Sentence(
        "second",
        {"cross": view.Attention(QUERIES, KEYS, OTHER), "self": view.Attention(QUERIES, QUERIES, SELF)},
    ),
]
NOTES = {("cross", 1, 2): "previous <word> 0.93 [0.91, 0.95], uniform 0.11", ("self", 0, 1): "dead"}


def both():
    return view.heads(SENTENCES, notes=NOTES, title="Heads & words")


class Tags(HTMLParser):
    """Start tags with their attributes, and the texts between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_what_is_given_is_what_is_in_it():
    data = json.loads(Tags(both().markup()).texts[0])
    assert data["title"] == "Heads & words"
    assert [kind["name"] for kind in data["kinds"]] == ["cross", "self"]
    assert [(kind["layers"], kind["heads"]) for kind in data["kinds"]] == [(L, N), (L, 2)]
    assert data["kinds"][0]["notes"] == [[1, 2, NOTES["cross", 1, 2]]]
    assert [sentence["title"] for sentence in data["sentences"]] == ["first <i>", "second"]
    first = data["sentences"][0]["attentions"]
    assert (first[0]["queries"], first[0]["keys"]) == (QUERIES, KEYS)
    assert [tuple(link) for link in first[0]["gold"]] == GOLD
    for packed, given in zip(first, (CROSS, SELF), strict=True):
        read = np.frombuffer(base64.b64decode(packed["weights"]), np.uint8).reshape(given.shape) / 255
        assert np.abs(read - given).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_arrays_of_jax(dtype):
    shown = view.heads(view.Attention(KEYS, KEYS, jnp.broadcast_to(jnp.eye(S, dtype=dtype), (L, N, S, S))))
    (attention,) = shown.data["sentences"][0]["attentions"]
    read = np.frombuffer(base64.b64decode(attention["weights"]), np.uint8).reshape(L, N, S, S)
    np.testing.assert_array_equal(read[1, 2], 255 * np.eye(S))
    assert repr(shown) == "View('Attention heads', 1 sentence, attention 2 × 3)"


def test_words_are_never_html():
    found = Tags(both().html())
    assert [tag for tag, _ in found.tags] == ["div", "script", "noscript", "script"]
    assert "<" not in both().markup().split(">", 2)[2].split("</script>")[0]


def test_nothing_comes_from_outside():
    for text in (both().html(), both()._repr_html_()):
        assert re.findall(r"https?:|@import|url\(|fetch\(|XMLHttp|import\(|\bsrc=(?!x )", text) == []
    assert re.findall("</script|<!--", view.script()) == []


def test_views_on_a_page_share_no_ids_and_no_style():
    found = Tags(both().html() + both().html())
    assert [attributes for _, attributes in found.tags if "id" in attributes] == []
    assert "style" not in [tag for tag, _ in found.tags]


def test_in_a_notebook_it_is_a_frame():
    ((tag, attributes),) = Tags(both()._repr_html_()).tags
    assert tag == "iframe" and attributes["title"] == "Heads & words"
    assert attributes["srcdoc"].count(both().html()) == 1


def test_every_file_of_the_folder_is_used():
    files = {file.name for file in resources.files("mhajax.view").joinpath("assets").iterdir()}
    assert files == {*page._PARTS, "view.css", "frame.js"}


ONE = view.Attention(QUERIES, KEYS, CROSS)
# what is handed in: what the message must hold
ERRORS = {
    "no sentences": (lambda: view.heads([]), ("at least one Sentence", "none")),
    "three axes": (lambda: view.heads(ONE._replace(weights=CROSS[0])), ("[L, N, T, S]", "(3, 5, 7)")),
    "no heads": (lambda: view.heads(ONE._replace(weights=CROSS[:, :0])), ("no empty axis", "(2, 0, 5, 7)")),
    "too few words": (lambda: view.heads(ONE._replace(queries=KEYS)), ("queries must be T=5 words", "got 7")),
    "one text": (lambda: view.heads(ONE._replace(keys="the cat")), ("keys must be S=7 words", "one text of 7")),
    "logits": (lambda: view.heads(ONE._replace(weights=CROSS * 9)), ("between 0 and 1", "after the softmax")),
    "not a number": (lambda: view.heads(ONE._replace(weights=CROSS * np.nan)), ("between 0 and 1", "nan")),
    "gold outside": (lambda: view.heads(ONE._replace(gold=[(0, 6), (5, 0)])), ("query < T=5", "(5, 0)")),
    "not a sentence": (lambda: view.heads([ONE]), ("sentences[0] must be a Sentence", "Attention")),
    "empty sentence": (lambda: view.heads(view.Sentence("", {})), ("at least one Attention",)),
    "another model": (
        lambda: view.heads([*SENTENCES, view.Sentence("", {"cross": ONE})]),
        ("sentences[2]", "cross 2 × 3, self 2 × 2", "got cross 2 × 3;"),
    ),
    "note of no head": (
        lambda: view.heads(ONE, notes={("attention", 1, 3): ""}),
        ("attention 2 × 3", "('attention', 1, 3)"),
    ),
    "note of no kind": (lambda: view.heads(ONE, notes={("cross", 0, 0): ""}), ("('cross', 0, 0)",)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, parts = ERRORS[name]
    with pytest.raises(ValueError, match="view.heads: ") as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


# In a browser: two views on a page; the first is acted on, the second must not notice.

PAGE = (
    '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<style>:root { color-scheme: light dark } body { margin: 16px }</style>"
)
LOOK = """
const root = document.querySelectorAll(".mhajax-view")[arguments[0]].shadowRoot;
const all = (selector) => [...root.querySelectorAll(selector)];
const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const color = (line) => line.style.stroke;
const texts = (selector) => all(selector).map((node) => node.textContent);
return {
  lines: all("path:not(.gold)").map((line) => [line.dataset.link, parseFloat(line.style.strokeWidth), color(line)]),
  gold: all("path.gold").map((line) => line.dataset.link),
  framed: all(".words .word.gold").map((word) => word.textContent),
  queries: texts(".words.query .word"), keys: texts(".words.key .word"),
  query_numbers: texts(".words.query .number"), key_numbers: texts(".words.key .number"),
  chosen: all(".picture[aria-pressed=true]").map((picture) => Number(picture.dataset.head)),
  list: texts(".chosen .name"), notes: texts(".note"), title: texts(".matrix h3")[0],
  cells: all("tbody tr").map((row) => [...row.querySelectorAll("td")].map((cell) => cell.textContent)),
  cells_gold: all("td.gold").map((cell) => `${cell.dataset.query} ${cell.dataset.key}`),
  status: texts(".status")[0], pinned: all(".words [aria-pressed=true] .word").map((word) => word.textContent),
  focus: root.activeElement?.getAttribute("aria-label") ?? root.activeElement?.title,
  pictures: all("canvas").map((canvas) => {
    copy.canvas.width = canvas.width;
    copy.canvas.height = canvas.height;
    copy.drawImage(canvas, 0, 0);
    return [...copy.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 == 3);
  }),
};
"""


PLACES = """
const root = document.querySelector(".mhajax-view").shadowRoot;
const boxes = [...root.querySelectorAll(".picture")].map((picture) => picture.getBoundingClientRect());
return boxes.map(({ left, right }) => [left, right]);
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    browser = browsers.start(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "view.html"
    path.write_text(PAGE + both().html() + both().html(), encoding="utf-8")
    return path


@pytest.fixture
def quiet(window):
    """Whatever the test does, the console stays empty and nothing is asked of a network."""
    yield window
    assert browsers.complaints(window) == ([], [])


@pytest.fixture
def opened(quiet, file):
    browsers.show(quiet, file)
    return quiet


def look(browser, view=0):
    return browser.execute_script(LOOK, view)


def find(browser, selector, text=None, view=0):
    root = browser.find_elements("css selector", ".mhajax-view")[view].shadow_root
    return next(node for node in root.find_elements("css selector", selector) if text in (None, node.text))


def hover(browser, selector, number):
    from selenium.webdriver import ActionChains

    root = browser.find_elements("css selector", ".mhajax-view")[0].shadow_root
    ActionChains(browser).move_to_element(root.find_elements("css selector", selector)[number]).perform()


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def shown(given):
    """Weights as they are after 8 bits."""
    return np.rint(given * 255) / 255


def pictured(given):
    """Weights as a small picture has them: small ones can still be seen."""
    return np.rint(255 * np.sqrt(shown(given)))


def numbers(row):
    return [f"{weight:.2f}" if weight >= 0.005 else "" for weight in row]


@pytest.mark.slow
def test_it_starts_with_the_first_head_that_has_a_note(opened):
    seen = look(opened)
    assert seen["chosen"] == [5] and seen["list"] == ["layer 1 · head 2"] and seen["notes"] == [NOTES["cross", 1, 2]]
    assert seen["title"] == "layer 1 · head 2"
    values = shown(CROSS[1, 2])
    assert {link for link, _, _ in seen["lines"]} == {f"{t} {s}" for t, s in np.argwhere(values >= 0.03)}
    assert seen["gold"] == seen["cells_gold"] == ["1 3", "4 0"]
    assert [len(picture) for picture in seen["pictures"]] == [T * S] * L * N
    np.testing.assert_array_equal(np.array(seen["pictures"]).reshape(CROSS.shape), pictured(CROSS))
    cells = [[re.sub("^0|1.00", lambda m: m[0][1:2] and "1", f"{w:.2f}") for w in row] for row in values]
    assert seen["cells"] == cells


def test_words_are_shown_as_they_are_and_blanks_have_a_sign(opened):
    seen = look(opened)
    assert seen["queries"] == ["she", "</script><b>", "&amp;", '␣"x"␣', "<!--"]
    assert seen["keys"] == [*KEYS[:-1], "∅"]
    assert find(opened, "option").text == "first <i>"


@pytest.mark.parametrize(("side", "number"), [("query", 1), ("key", 3)])
def test_pointing_at_a_word_shows_its_lines_and_numbers(opened, side, number):
    hover(opened, f".words.{side} button", number)
    seen, values = look(opened), shown(CROSS[1, 2])
    row = values[number] if side == "query" else values[:, number]
    places = [f"{number} {i}" if side == "query" else f"{i} {number}" for i in range(len(row))]
    assert {link: width for link, width, _ in seen["lines"]} == {
        place: pytest.approx(0.6 + 5 * weight, abs=1e-3)
        for place, weight in zip(places, row, strict=True)
        if weight >= 0.004
    }
    own, other = ("query", "key") if side == "query" else ("key", "query")
    assert seen[f"{other}_numbers"] == numbers(row)
    assert set(seen[f"{own}_numbers"]) == {""}
    assert seen["gold"] == ["1 3"] and seen["framed"] == ["猫" if side == "query" else "</script><b>"]
    assert f"{max(row):.2f}" in seen["status"]

    hover(opened, ".matrix .caption h3", 0)
    assert set(look(opened)["key_numbers"]) == {""} and len(look(opened)["gold"]) == 2


def test_pointing_at_a_cell_shows_one_line(opened):
    hover(opened, "tbody td", 3 * S + 2)
    seen = look(opened)
    weight = shown(CROSS[1, 2])[3, 2]
    assert [link for link, _, _ in seen["lines"]] == (["3 2"] if weight >= 0.004 else [])
    assert f"{weight:.2f}" in seen["status"]


def test_choosing_heads_layers_kinds_and_sentences(opened):
    find(opened, '[data-head="1"]').click()
    seen = look(opened)
    assert seen["chosen"] == [1] and seen["title"] == "layer 0 · head 1" and seen["notes"] == []
    assert {link for link, _, _ in seen["lines"]} == {f"{t} {s}" for t, s in np.argwhere(shown(CROSS[0, 1]) >= 0.03)}

    find(opened, "button", "Several").click()
    find(opened, '[data-head="4"]').click()
    seen = look(opened)
    assert seen["chosen"] == [1, 4] and seen["list"] == ["layer 0 · head 1", "layer 1 · head 1"]
    assert {color for _, _, color in seen["lines"]} == {"var(--color-0)", "var(--color-1)"}
    find(opened, ".words.query button").click()
    assert look(opened)["key_numbers"] == numbers(shown(CROSS[1, 1])[0])
    find(opened, ".chosen .name").click()
    assert look(opened)["key_numbers"] == numbers(shown(CROSS[0, 1])[0])
    find(opened, ".away").click()
    assert look(opened)["chosen"] == [4]

    find(opened, ".layer", "1").click()
    assert look(opened)["chosen"] == [3, 4, 5]
    for head in (0, 1, 2):
        find(opened, f'[data-head="{head}"]').click()
    seen = look(opened)
    assert seen["chosen"] == [0, 1, 2, 3, 4, 5] and seen["list"] == ["mean of 6 heads"]
    assert seen["key_numbers"] == numbers(shown(CROSS).mean((0, 1))[0])

    find(opened, ".tabs button", "self").click()
    seen = look(opened)
    assert seen["chosen"] == [1] and seen["notes"] == ["dead"] and len(seen["pictures"]) == L * 2
    assert seen["keys"] == seen["queries"] and seen["pinned"] == []
    find(opened, ".tabs button", "cross").click()
    find(opened, "option", "second").click()
    seen = look(opened)
    assert seen["chosen"] == [0, 1, 2, 3, 4, 5] and seen["gold"] == []
    np.testing.assert_array_equal(np.array(seen["pictures"]).reshape(OTHER.shape), pictured(OTHER))


def test_acting_on_one_view_leaves_the_other_alone(opened):
    before = look(opened, 1)
    find(opened, '[data-head="1"]').click()
    find(opened, ".words.query button").click()
    assert look(opened, 1) == before != look(opened)


def test_all_of_it_by_keyboard(opened):
    from selenium.webdriver import Keys

    opened.execute_script("document.querySelector('.mhajax-view').shadowRoot.querySelector('.tabs button').focus()")
    press(opened, Keys.TAB, Keys.TAB, Keys.TAB)
    assert look(opened)["focus"] == "All heads of layer 0"
    press(opened, Keys.TAB)
    for _ in range(3):  # the layers' buttons come before the one stop among the pictures
        if look(opened)["focus"].startswith("All heads"):
            press(opened, Keys.TAB)
    assert look(opened)["focus"].startswith("layer 1 · head 2: previous <word>")
    press(opened, Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert look(opened)["focus"] == "layer 0 · head 1" and look(opened)["chosen"] == [5]
    press(opened, Keys.ENTER)
    assert look(opened)["chosen"] == [1]
    find(opened, ".words.query button").send_keys(Keys.ARROW_DOWN)
    assert look(opened)["focus"] == QUERIES[1]
    assert look(opened)["key_numbers"] == numbers(shown(CROSS[0, 1])[1])
    press(opened, Keys.SPACE, Keys.TAB)
    seen = look(opened)
    assert seen["focus"] == KEYS[0] and seen["pinned"] == [QUERIES[1]]
    press(opened, Keys.ESCAPE)
    assert look(opened)["pinned"] == [] and set(look(opened)["key_numbers"]) == {""}
    outline = "return getComputedStyle(arguments[0].shadowRoot.activeElement).outlineStyle"
    assert opened.execute_script(outline, opened.find_element("css selector", ".mhajax-view")) == "solid"


def test_a_finger_keeps_a_word_chosen(quiet, file):
    browsers.show(quiet, file, 360, 740)
    word = find(quiet, ".words.key button", "猫")
    tap = "const b = arguments[0]; b.focus(); b.click(); b.blur()"
    quiet.execute_script(tap, word)
    assert look(quiet)["pinned"] == ["猫"] and look(quiet)["query_numbers"] == numbers(shown(CROSS[1, 2])[:, 3])
    quiet.execute_script(tap, word)
    assert look(quiet)["pinned"] == [] and set(look(quiet)["query_numbers"]) == {""}


@pytest.mark.parametrize(("layers", "heads"), tiered([(2, 8), (6, 16), (12, 12)], (6, 16)))
def test_it_fits_a_phone_and_a_desk(quiet, tmp_path, layers, heads):
    words = [f"word{i}" for i in range(13)] + ["Donaudampfschifffahrtsgesellschaft"]
    path = tmp_path / "wide.html"
    path.write_text(PAGE + view.heads(view.Attention(words, words, weights(3, layers, heads, 14, 14))).html(), "utf-8")
    for width, height in ((360, 740), (1200, 900)):
        browsers.show(quiet, path, width, height)
        assert browsers.too_wide(quiet) <= 0
        boxes = quiet.execute_script(PLACES)
        assert len(boxes) == layers * heads
        assert min(right - left for left, right in boxes) >= 20
        assert max(right for _, right in boxes) <= width


def test_dark_and_still_if_the_reader_prefers_it(quiet, file):
    style = (
        "const style = getComputedStyle(document.querySelector('.mhajax-view').shadowRoot.querySelector(arguments[0]));"
        "return style[arguments[1]]"
    )

    def bright(dark):
        browsers.show(quiet, file, dark=dark, still=dark)
        picture = look(quiet)["pictures"][0]
        return sum(map(int, re.findall(r"\d+", quiet.execute_script(style, ".view", "color"))[:3])), picture

    (light, picture), (dark, same) = bright(False), bright(True)
    assert light < 200 < 600 < dark and picture == same
    assert quiet.execute_script(style, ".word", "transitionDuration") == "0s"
    browsers.show(quiet, file, still=False)
    assert quiet.execute_script(style, ".word", "transitionDuration") != "0s"


@pytest.mark.slow
def test_in_a_notebook_the_frame_is_as_tall_as_the_view(quiet, tmp_path):
    path = tmp_path / "notebook.html"
    cell = f'<body data-jp-theme-light="false">{both()._repr_html_()}'
    path.write_text(PAGE + cell, encoding="utf-8")
    heights = []
    for width in (900, 360):
        browsers.show(quiet, path, width)
        frame = quiet.find_element("css selector", "iframe")
        quiet.switch_to.frame(frame)
        quiet.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        find(quiet, '[data-head="1"]').click()
        assert look(quiet)["chosen"] == [1]
        height = quiet.execute_script("return document.body.getBoundingClientRect().height")
        scheme = quiet.execute_script("return getComputedStyle(document.documentElement).colorScheme")
        quiet.switch_to.default_content()
        assert abs(frame.rect["height"] - height) <= 1
        assert scheme == "dark"
        heights.append(height)
    assert 300 < heights[0] < heights[1] - 100
