"""What the README shows works as it stands there."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)
QUICK = [example for example in EXAMPLES if "optax" not in example]  # one trains for half a minute


@pytest.mark.parametrize("examples", [QUICK, pytest.param(EXAMPLES, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_the_examples_run_and_are_what_they_say(examples):
    assert 0 < len(QUICK) < len(EXAMPLES)
    names: dict = {}
    for example in examples:
        exec(example, names)
    assert names["y"].shape == (2, 10, 64) and names["without"].shape == (8, 2, 10, 64)
    assert names["seeds"].w_q.shape == (5, 8, 64, 8)
    assert names["grads"].w_o.shape == (8, 8, 64)
    assert np.isfinite(names["seen"]["weights"]).all()
    assert names["slope"].shape == (8, 33) and np.abs(names["slope"]).max() > 0
    assert names["state"].length == 10 and names["theirs"]["in_proj_weight"].shape == (192, 64)


def test_every_config_is_in_the_table_and_every_linked_file_is_there():
    root = Path(__file__).parent.parent
    for config in (root / "configs").glob("*.toml"):
        assert f"`{config.name}`" in README
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (root / target).exists(), target


def test_the_configs_for_data_of_your_own_fit_few_data(tmp_path):
    from experiments import config, run

    for name, start in (("corpus.en.gz", "a house"), ("corpus.de.gz", "ein Haus")):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.writelines(f"{start} {number} .\n" for number in range(500))
    (tmp_path / "book.txt").write_text("It was a dark night.\n" * 200)
    found = re.findall(r"```toml\n(.*?)```", README, flags=re.S)
    assert len(found) == 2
    for number, text in enumerate(found):
        (tmp_path / f"{number}.toml").write_text(text)
        read = config.read(tmp_path / f"{number}.toml")
        task = run.prepare(read, tmp_path / f"run-{number}")
        assert next(iter(task.batches(0))) is not None
        assert number or task.notes[0].startswith("400 sentence pairs")
