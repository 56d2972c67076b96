"""The report about the heads of a pretrained model: `experiments heads MODEL --text FILE`, from end to end."""

import json

import numpy as np
import pytest
from test_pretrained import BERT, LLAMA

from experiments.__main__ import main
from mhajax import pretrained
from mhajax.pretrained.families import FAMILIES
from mhajax.pretrained.source import Arrays

tokenizers = pytest.importorskip("tokenizers")
WORDS = "[UNK] [MASK] to be or not that is the question of".split()
CONFIGS = {"llama": LLAMA | {"vocab_size": len(WORDS)}, "bert": BERT | {"vocab_size": len(WORDS), "hidden_size": 12}}


def saved(folder, name):
    """A tiny random model as a folder of files."""
    config = CONFIGS[name]
    family = FAMILIES[config["model_type"]]
    known = Arrays({"cls.predictions.transform.dense.weight": np.zeros(0)}, config)  # BERT with its head
    leaves = family.leaves(known, family.read_config(known))
    random = np.random.default_rng(0)
    tensors = {one: random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves for one in leaf.names}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return pretrained.write_safetensors(folder, tensors.items(), config, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_head_of_a_model_on_a_text(name, tmp_path, capsys):
    model = saved(tmp_path / name, name)
    (tmp_path / "text.txt").write_text("to be or not to be that is the question " * 20)
    options = ["--sentences", "4", "--length", "8", "--shown", "1", "--runs", str(tmp_path / "runs"), "--json"]
    assert main(["heads", str(model), "--text", str(tmp_path / "text.txt"), *options]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").is_file() and json.loads((folder / "heads.json").read_text()) == numbers
    assert len(numbers["heads"]) == 8  # 2 layers of 4
    page = (folder / "report.html").read_text()
    assert "4 held-out windows" in page and "to be or not to be that is" in page


def test_what_has_no_report(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be")
    assert main(["heads", str(tmp_path / "none"), "--text", str(tmp_path / "text.txt")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    assert main(["heads", "RUN", "--length", "3"]) == 2
    assert "--length is for a text" in capsys.readouterr().err
    assert main(["heads", "RUN", "--text", "x", "--length", "1"]) == 2
    assert "length is too small, got 1" in capsys.readouterr().err
