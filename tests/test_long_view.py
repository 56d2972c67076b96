"""Attention of more words than lines can be drawn for: shaded text and a picture."""

import numpy as np
import pytest

from mhajax import view
from tests import browser as browsers

T = 100  # more than a row of the small pictures has


def weights():
    """Head 0 looks at the token before, head 1 at all before alike."""
    previous = np.eye(T, k=-1)
    previous[0, 0] = 1
    uniform = np.tri(T) / np.arange(1, T + 1)[:, None]
    return np.stack([previous, uniform])[None]


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    browser = browsers.start(tmp_path_factory.mktemp("profile"))
    folder = tmp_path_factory.mktemp("view")
    letters = [chr(97 + i % 26) for i in range(T)]
    text = view.heads(view.Attention(letters, letters, weights()), unit="character").html()
    (folder / "long.html").write_text(f"<!doctype html><meta charset=utf-8>{text}", encoding="utf-8")
    yield browser, folder / "long.html"
    browser.quit()


ROOT = """
const root = document.querySelector(".mhajax-view").shadowRoot;
const all = (selector) => [...root.querySelectorAll(selector)];
"""
LOOK = """
const shades = all(".words.key .word").map((word) => parseFloat(word.style.getPropertyValue("--weight")));
const image = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
const alphas = (canvas) => [...image(canvas).data].filter((_, i) => i % 4 === 3);
return {
  lines: all("path").length, cells: all("td").length, shades, status: all(".status")[0].textContent,
  pinned: all(".words.query button").findIndex((button) => button.getAttribute("aria-pressed") === "true"),
  tall: all(".view")[0].getBoundingClientRect().height, heading: all(".links h3")[0].textContent,
  small: all(".picture canvas").map((canvas) => [canvas.width, canvas.height, alphas(canvas)]),
  map: all(".map canvas").map((canvas) => [canvas.width, canvas.height, alphas(canvas)])[0],
};
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_a_long_text_is_shaded_by_one_query(window, width):
    browser, path = window
    browsers.complaints(browser)  # of the canvas, which the tests read
    browsers.show(browser, path, width, 900)
    assert browsers.complaints(browser) == ([], [])
    seen = browser.execute_script(ROOT + LOOK)
    assert (seen["lines"], seen["cells"], seen["heading"]) == (0, 0, "Characters")
    assert seen["pinned"] == T - 1 and seen["shades"] == [0.0] * (T - 2) + [100.0, 0.0]  # it shows something at once
    assert seen["tall"] < 1600 and browsers.too_wide(browser) <= 0
    browser.execute_script(ROOT + "all('.picture')[1].click(); all('.words.query button')[3].click()")
    seen = browser.execute_script(ROOT + LOOK)
    assert seen["pinned"] == 3 and seen["shades"][:5] == [50.1] * 4 + [0.0]  # √(1/4), of 8 bits
    assert "looks at" in seen["status"] and "0.25" in seen["status"]


@pytest.mark.slow
def test_small_pictures_lose_no_line_and_no_faint_weight(window):
    browser, path = window
    browsers.show(browser, path)
    seen = browser.execute_script(ROOT + LOOK)
    assert [size[:2] for size in seen["small"]] == [[64, 64]] * 2
    previous, uniform = (np.array(small[2]).reshape(64, 64) for small in seen["small"])
    assert (previous.max(1) == 255).all()  # each row of the picture has its line, however many rows it stands for
    assert uniform[-1].min() >= 20  # 1/100
    columns, rows, alphas = seen["map"]
    assert (columns, rows) == (T, T)
    np.testing.assert_array_equal(np.array(alphas).reshape(T, T), 255 * weights()[0, 0])
