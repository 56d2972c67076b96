"""What is installed: the wheel, what it says of itself, and what importing it does."""

import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mhajax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NO_INDEX = ("No matching distribution", "Could not find a version", "Connection", "Temporary failure")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `python -m build --wheel` does, from a copy without what is not part of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("mhajax", "experiments", "tests", "recipes", "docs", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(copy)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode and any(words in done.stderr for words in NO_INDEX):
        pytest.skip(f"no index to get setuptools from: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_is_the_library_whole_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"mhajax", f"mhajax-{mhajax.__version__}.dist-info"}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "mhajax").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert here == {name for name in names if name.startswith("mhajax/")}  # py.typed, assets and styles too


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    told = email.message_from_bytes(archive.read(f"mhajax-{mhajax.__version__}.dist-info/METADATA"))
    assert (told["Version"], told["License-Expression"]) == (mhajax.__version__, "Apache-2.0")
    assert set(told.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert told["Requires-Python"] == PROJECT["requires-python"]
    assert str(told.get_payload()).startswith("# mhajax")


@pytest.mark.slow
def test_the_wheel_is_imported_without_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import mhajax; mhajax.report, mhajax.view, mhajax.pretrained; print(mhajax.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_classifiers_and_python_agree():
    versions = [tuple(map(int, one.split(" :: ")[-1].split("."))) for one in PROJECT["classifiers"]
                if one.startswith("Programming Language :: Python :: 3.")]  # fmt: skip
    assert min(versions) == tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))


def test_importing_it_touches_no_device_and_takes_less_time_than_jax():
    code = """
import time; start = time.process_time()
import jax, jax.numpy; jax_done = time.process_time()
import mhajax; done = time.process_time()
from jax._src import xla_bridge
print(jax_done - start, done - jax_done, xla_bridge.backends_are_initialized())
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    of_jax, ours, touched = ran.stdout.split()
    assert touched == "False"
    assert float(ours) < float(of_jax)
