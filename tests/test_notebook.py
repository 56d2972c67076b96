"""The Colab notebook runs from top to bottom, in a small form."""

import os
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).parent.parent / "experiments" / "colab.ipynb"
SMALL = "data.train=200 data.validation=10 data.test=10 data.generalisation=10 training.steps=6 training.warmup_steps=2"


def test_outputs_are_stripped():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    copy = tmp_path / "mhajax"
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(NOTEBOOK.parent.parent, copy, ignore=ignored)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The packages are those of the environment that is tested; installing again would move them.
    notebook.cells[1].source = "import os\nimport sys\nsys.path.insert(0, os.getcwd())"
    monkeypatch.setenv("MHAJAX_NOTEBOOK_OVERRIDES", SMALL)
    monkeypatch.setenv("PYTHONPATH", os.fspath(copy))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": copy}}).execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
