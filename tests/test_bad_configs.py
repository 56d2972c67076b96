"""Configs, texts and commands that cannot be meant: what they are told; every shipped config reads."""

import pytest
from experiment_runs import REPOSITORY, TINY, call

pytestmark = pytest.mark.usefixtures("quick_compiles", "compiled_once")

BAD = {
    # name: (change to the config as overrides, what the message must say)
    "no such file": (["CONFIG=missing.toml"], ["missing.toml"]),
    "unknown key": (["model.num_head=2"], ["model.num_head", "num_heads"]),
    "unknown table": (["modle.d_model=2"], ["modle", "model"]),
    "key of another table": (["model.learning_rate=0.1"], ["model.learning_rate", "training"]),
    "text for a number": (['model.d_model="wide"'], ["model.d_model", "whole number", "wide"]),
    "fraction for a whole number": (["model.d_model=16.5"], ["model.d_model", "16.5"]),
    "number for text": (["vocabulary.kind=3"], ["vocabulary.kind", "3", "bpe"]),
    "not a choice": (['vocabulary.kind="word"'], ["vocabulary.kind", "word", "words"]),
    "unknown optimizer": (['training.optimizer="adamv"'], ["training.optimizer", "adamv", "adamw"]),
    "unknown experiment": (['kind="translate"'], ["kind", "translate", "translation"]),
    "unknown data": (['data.kind="gramar"'], ["data.kind", "gramar", "grammar"]),
    "heads do not divide": (["model.num_heads=3"], ["[model]", "d_model=16", "num_heads=3"]),
    "kv heads do not divide": (["model.num_kv_heads=3"], ["num_heads=2", "num_kv_heads=3"]),
    "warm-up too long": (["training.warmup_steps=12"], ["[training]", "warmup_steps=12", "steps=12"]),
    "zero steps": (["training.steps=0"], ["training", "steps", "at least 1"]),
    "negative rate": (["training.learning_rate=-1"], ["learning_rate", "above 0"]),
    "dropout of one": (["model.dropout=1.0"], ["dropout", "[0, 1)", "1.0"]),
    "smoothing of two": (["training.label_smoothing=2.0"], ["label_smoothing", "2.0"]),
    "boundaries fall": (["batches.boundaries=[32,16]"], ["boundaries", "ascending"]),
    "batch below a sentence": (["batches.tokens=16"], ["tokens=16", "boundaries=[32]"]),
    "no beams": (["decoding.beams=0"], ["beams", "at least 1"]),
    "no layers": (["model.encoder_layers=0"], ["encoder_layers", "at least 1"]),
    "negative sentences": (["data.train=-5"], ["train", "-5"]),
    "no training data": (["data.train=0"], ["data.train", "at least 1"]),
    "boundaries too short": (["batches.boundaries=[2]"], ["boundar", "2"]),
    "infinite": (["training.learning_rate=inf"], ["learning_rate", "finite"]),
    "not an override": (["model"], ["model", "key"]),
    "missing multi30k": (['data={kind="multi30k", root="nowhere"}'], ["multi30k", "nowhere", "fetch"]),
    "same languages": (['data={kind="multi30k", source="de"}'], ["source", "target", "differ"]),
    "half a pair": (
        ['data={kind="files", train_source="a", train_target="b", test_source="c"}'],
        ["test_source", "test_target", "together"],
    ),
    "missing files": (['data={kind="files", train_source="a.txt", train_target="b.txt"}'], ["a.txt"]),
    "seed beyond int32": (["training.seed=3000000000"], ["[training]", "2,147,483,647", "3000000000"]),
    "seeds beyond int32": (["training.seed=2147483647", "training.seeds=2"], ["[training]", "seed + seeds"]),
    "steps beyond int32": (["training.steps=4000000000"], ["steps", "4000000000"]),
    "accumulate beyond int32": (["training.accumulate=2147483648"], ["accumulate", "2147483648"]),
    "odd heads that rotate": (["model.head_dim=5"], ["[model]", "head_dim", "even", "5", "rotary"]),
    "a path with NUL": (
        [r'data={kind="files", train_source="a\u0000", train_target="b"}'],
        ["data.train_source", "NUL"],
    ),
    "a path too long": (
        [f'data={{kind="files", train_source="{"a" * 300}", train_target="b"}}'],
        ["data.train_source", "255"],
    ),
    "a batch beyond the data": (["batches.tokens=2000000000"], ["batches.tokens", "4,800", "2,000,000,000"]),
    "more sentences than memory holds": (["data.train=2000000000"], ["train", "at most 1,000,000", "2000000000"]),
    "a model beyond memory": (["model.d_model=1000000"], ["model.d_model", "memory", "GiB here", "would take"]),
    "seeds beyond memory": (["training.seeds=2000000000"], ["training.seeds", "GiB here"]),
    "incomplete files": (['data={kind="files", train_source="a.txt"}'], ["train_target"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_get_a_message_and_lose_nothing(name, tmp_path):
    overrides, parts = BAD[name]
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    if overrides[0].startswith("CONFIG="):
        config, overrides = tmp_path / overrides[0].removeprefix("CONFIG="), overrides[1:]
    status, out, err = call(config, *overrides, "--runs", tmp_path / "runs")
    assert status == 2, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    assert not list(tmp_path.glob("runs"))  # a trial that fails before the first batch leaves no folder


BAD_PAIRS = {
    "unequal": (b"a\nb\n", b"x\n", ["2", "1", "a.txt", "b.txt"]),
    "empty line": (b"a\n\nc\n", b"x\ny\nz\n", ["a.txt", "line 2"]),
    "not UTF-8": (b"a\nb\n", b"x\n\xff\xfe\n", ["b.txt", "line 2", "UTF-8"]),
    "empty file": (b"", b"x\n", ["a.txt", "empty"]),
    "too few": (b"a\nb\n", b"x\ny\n", ["hold_out"]),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_text_gets_a_message_with_file_and_line(name, tmp_path):
    source, target, parts = BAD_PAIRS[name]
    (tmp_path / "a.txt").write_bytes(source)
    (tmp_path / "b.txt").write_bytes(target)
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    data = f'data={{kind="files", train_source="{tmp_path}/a.txt", train_target="{tmp_path}/b.txt"}}'
    status, _, err = call(config, data, 'vocabulary.kind="bpe"', "--runs", tmp_path)
    assert status == 2 and "Traceback" not in err, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["translate", "nowhere"], ["nowhere", "no such folder"]),
        (["sample", "nowhere"], ["nowhere"]),
        (["fetch", "multi31k"], ["multi31k", "multi30k"]),
        (["."], ["config.toml"]),
        (["a" * 5000], ["cannot be read"]),
        (["a\0b"], ["NUL"]),
    ],
)
def test_bad_commands_get_a_message(arguments, parts):
    status, _, err = call(*arguments)
    assert status == 2 and "Traceback" not in err
    for part in parts:
        assert part in err


CONFIGS = sorted(str(path.relative_to(REPOSITORY / "configs")) for path in (REPOSITORY / "configs").rglob("*.toml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_reads(name):
    from experiments import config, schema

    assert schema.to_toml(config.read(REPOSITORY / "configs" / name))
