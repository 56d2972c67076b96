"""What the README and the pages for data of one's own show works as it stands there."""

import gzip
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in
        ("benchmarks", "experiments", "how-to/data")}  # fmt: skip


def test_the_examples_run_and_are_what_they_say():
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(example, names)
    assert names["y"].shape == (2, 10, 64) and names["without"].shape == (8, 2, 10, 64)
    assert names["grads"].w_o.shape == (8, 8, 64)
    assert np.isfinite(names["seen"]["weights"]).all()
    assert names["found"].value.shape == (2, 8) and (names["found"].low < names["found"].high).all()


def test_it_is_one_page_with_two_commands():
    lines = README.splitlines()
    assert len(lines) <= 120 and all(len(line) <= 120 or "python3 -m venv" in line for line in lines)
    assert len([line for line in lines if re.fullmatch(r"python3 -m venv .*pytest.*", line)]) == 1
    assert len([line for line in lines if re.fullmatch(r"python3 -m venv .* configs/grammar.toml", line)]) == 1


def test_every_linked_file_is_there():
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def test_every_config_is_in_the_table():
    for config in (ROOT / "configs").glob("*.toml"):
        assert f"`{config.name}`" in DOCS["experiments"]


def test_its_times_are_those_of_the_benchmarks():
    rows = [line for line in README.splitlines() if re.match(r"\| (core|layer), ", line)]
    assert rows and set(rows) <= set(DOCS["benchmarks"].splitlines())


def test_the_configs_for_data_of_your_own_fit_few_data(tmp_path):
    from experiments import config, run

    for name, start in (("corpus.en.gz", "a house"), ("corpus.de.gz", "ein Haus")):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.writelines(f"{start} {number} .\n" for number in range(500))
    (tmp_path / "book.txt").write_text("It was a dark night.\n" * 200)
    found = re.findall(r"```toml\n(.*?)```", DOCS["how-to/data"], flags=re.S)
    assert len(found) == 2
    for number, text in enumerate(found):
        (tmp_path / f"{number}.toml").write_text(text)
        read = config.read(tmp_path / f"{number}.toml")
        task = run.prepare(read, tmp_path / f"run-{number}")
        assert next(iter(task.batches(0))) is not None
        assert number or task.notes[0].startswith("400 sentence pairs")
