"""The pages of the site: their examples run, what they name is there, and the site builds."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiers import tiered

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
NAV = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.M | re.S)


RUN = [page for page in PAGES if blocks(page, "python") and page != "how-to/devices.md"]
COMMANDS = [
    (page, line.split("  #")[0]) for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()
]


# Examples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", tiered(RUN, "index.md", "how-to/gpu.md"))
def test_the_examples_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """What they say of themselves they assert."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, example in enumerate(blocks(page, "python"), 1):
        exec(compile(example, f"{page}, example {number}", "exec"), names)
    if page == "tutorials/attention.md":
        assert names["seeds"].w_q.shape == (5, 8, 64, 8) and names["without"].shape == (8, 2, 10, 64)
        assert names["slope"].shape == (8, 33) and abs(names["slope"]).max() > 0
        assert names["state"].length == 11 and names["theirs"]["in_proj_weight"].shape == (192, 64)


@pytest.mark.slow
def test_the_examples_for_many_devices_run_on_eight(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(blocks("how-to/devices.md", "python")), encoding="utf-8")
    eight = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=eight, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_tutorial_has_examples_that_run():
    assert {page for page in PAGES if page.startswith("tutorials/")} <= set(RUN)


def test_examples_that_are_not_run_are_python():
    for page in PAGES:
        for example in blocks(page, "py"):
            compile(example, page, "exec")


# Commands and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted({page for page, line in COMMANDS if "-m experiments" in line}))
def test_the_commands_of_a_page_are_there(page, monkeypatch):
    from experiments import bench, config, kinds
    from experiments.__main__ import _COMMANDS
    from experiments.data import fetch

    monkeypatch.chdir(ROOT)
    known = {
        "keys": {*kinds.TRAININGS, *kinds.STUDIES},
        "fetch": set(fetch.DATA_SETS),
        "bench": {path.stem for path in Path(bench.__file__).parent.glob("*.py")},
    }
    for line in [line for of, line in COMMANDS if of == page and "-m experiments" in line]:
        words = shlex.split(line.split(" && ")[-1].split(" < ")[0])
        what, *rest = words[words.index("experiments") + 1 :]
        if what.startswith("runs/") or what == "--help":
            continue
        if what in _COMMANDS:
            named = rest if what == "fetch" else rest[:1]
            assert set(named) <= known.get(what, set(named)), line
        else:  # a config, with overrides
            config.read(Path(what), [word for word in rest if "=" in word])


def test_the_extras_that_pages_name_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    texts = [*PAGES.values(), (ROOT / "README.md").read_text(encoding="utf-8")]
    named = {name for text in texts for found in re.findall(r'"(?:\.|FOLDER)\[([a-z,]+)\]"', text)
             for name in found.split(",")}  # fmt: skip
    assert {"docs", "experiments", "pretrained"} <= named <= set(extras)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml") and page != "how-to/data.md"])
def test_the_configs_of_a_page_are_configs(page, tmp_path, monkeypatch):
    from experiments import config

    monkeypatch.chdir(ROOT)
    for number, text in enumerate(blocks(page, "toml")):
        (tmp_path / f"{number}.toml").write_text(text, encoding="utf-8")
        config.read(tmp_path / f"{number}.toml")


# Pages --------------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    assert sorted(NAV) == sorted(PAGES)
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
            assert not target.startswith(("/", "http")), f"{page}: {target} is outside of the site"
            assert (DOCS / page).parent.joinpath(target.split("#")[0]).is_file(), f"{page}: {target}"


def test_every_public_module_has_a_place_in_the_reference():
    import mhajax

    shown = set(re.findall(r"^::: mhajax\.(\S+)$", "\n".join(PAGES.values()), flags=re.M))
    modules = {name for name in mhajax.__all__ if importlib.util.find_spec(f"mhajax.{name}")}
    assert modules - shown == set()
    for package in ("heads", "variants"):
        assert {f"{package}.{name}" for name in getattr(mhajax, package).__all__} <= shown
    assert [name for name in shown if importlib.util.find_spec(f"mhajax.{name}") is None] == []


def test_lines_are_short():
    """But for tables, and for pages that programs write."""
    for page in set(PAGES) - {"parity.md", "claims/claims.md"}:
        for line in PAGES[page].splitlines():
            assert len(line) <= 120 or line.startswith("|"), f"{page}: {line}"


@pytest.mark.slow
def test_the_site_builds_and_asks_the_network_for_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason='the site needs mkdocs: pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)"',
                             page.read_text(encoding="utf-8"))  # fmt: skip
        assert fetched == [], page
