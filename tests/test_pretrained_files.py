"""Folders of safetensors, read and written; what a family may ask of any source; every damage told."""

import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mhajax import pretrained
from mhajax.pretrained import UnreadableFile
from tests import gguf_files

CONFIG = {"model_type": "bert", "hidden_size": 5, "name": "größe"}


def tensors():
    rng = np.random.default_rng(0)
    return {
        "embeddings.weight": rng.standard_normal((7, 5)).astype(np.float32),
        "layer.0.weight": rng.standard_normal((3, 5)).astype(np.float16),
        "layer.1.weight": rng.standard_normal((3, 5)).astype(jnp.bfloat16),
        "position_ids": np.arange(11)[None],
        "scale": np.array(2.0, np.float32),
    }


def tokenizer():
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path):
    size = 100 if request.param == "shards" else 1 << 30
    return pretrained.write_safetensors(tmp_path / "m", iter(tensors().items()), CONFIG, tokenizer(), shard_size=size)


@pytest.fixture
def shards(tmp_path):
    return pretrained.write_safetensors(tmp_path / "s", iter(tensors().items()), CONFIG, tokenizer(), shard_size=100)


@pytest.fixture
def single(tmp_path):
    return pretrained.write_safetensors(tmp_path / "f", tensors().items(), CONFIG, tokenizer()) / "model.safetensors"


def test_what_is_written_is_read_bit_for_bit(folder):
    opened = pretrained.open_files(folder)
    assert opened.config == CONFIG and opened.path == folder
    assert set(opened.names) == set(tensors())
    for name, array in tensors().items():
        got = opened.read(name)
        assert (got.dtype, got.shape, opened.shape(name)) == (array.dtype, array.shape, array.shape)
        assert got.tobytes() == array.tobytes() and got.flags.writeable
    assert opened.tokenizer().encode("b a c").ids == [1, 0, 2]


def test_files_are_those_of_transformers(single, shards):
    assert sorted(os.listdir(single.parent)) == ["config.json", "model.safetensors", "tokenizer.json"]
    parts = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(parts) == 3 and parts[0] == "model-00001-of-00003.safetensors"
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors()) and set(index["weight_map"].values()) == set(parts)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors().values())
    from safetensors import safe_open

    with safe_open(single, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_transposed_and_jax_arrays_are_written_as_they_read(tmp_path):
    """The package writes memory as it lies; a transposed array lies otherwise than it reads."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    written = {"t": array.T, "j": jnp.ones((2, 3), jnp.bfloat16), "big": array.astype(">f4"), "every": array[:, ::2]}
    opened = pretrained.open_files(pretrained.write_safetensors(tmp_path, written.items(), CONFIG))
    for name, expected in written.items():
        np.testing.assert_array_equal(opened.read(name), np.asarray(expected))


def test_one_file_is_opened_beside_its_config(single):
    assert set(pretrained.open_files(single).names) == set(tensors())
    assert pretrained.open_files(str(single)).tokenizer().encode("a").ids == [0]


def test_padding_and_truncation_are_not_of_the_tokenizer(single):
    kept = tokenizer()
    kept.enable_padding(length=128)
    kept.enable_truncation(2)
    kept.save(str(single.parent / "tokenizer.json"))
    assert pretrained.open_files(single).tokenizer().encode("a b a").ids == [0, 1, 0]


def refused(kind, path, message):
    with pytest.raises(kind, match=message) as told:
        opened = pretrained.open_files(path)
        for name in opened.names:
            opened.read(name)
        opened.tokenizer()
    return str(told.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000, b"\xff{}"])
def test_a_config_that_is_none(single, content):
    path = single.parent / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(UnreadableFile, single, "must (be JSON|hold a JSON object)").startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(single, name):
    (single.parent / name).unlink()
    refused(FileNotFoundError, single.parent, f"{name}: there is no such file")


def test_nothing_there(tmp_path):
    refused(FileNotFoundError, tmp_path / "nowhere", "no such file or folder")
    refused(FileNotFoundError, tmp_path, "config.json: there is no such file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    refused(UnreadableFile, tmp_path / "pytorch_model.bin", "others .pickles of torch among them. are not read")


def test_a_folder_of_gguf_files(tmp_path):
    data = gguf_files.file(gguf_files.metadata(), gguf_files.tensors())
    (tmp_path / "a.gguf").write_bytes(data)
    assert pretrained.open_files(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "b").write_bytes(data)
    assert pretrained.open_files(tmp_path / "b").config["model_type"] == "llama"
    (tmp_path / "c.gguf").write_bytes(data)
    refused(UnreadableFile, tmp_path, "must hold one GGUF file, got 2: a.gguf, c.gguf")


def test_a_damaged_tokenizer(single):
    path = single.parent / "tokenizer.json"
    unknown = json.loads(tokenizer().to_str())
    unknown["model"]["vocab"].pop("?")
    for content in (b"{}", b"\xff", b"", json.dumps(unknown).encode()):
        path.write_bytes(content)
        refused(UnreadableFile, single, "tokenizer.json: is no tokenizer")


def header(text, data=b"\0" * 8):
    return struct.pack("<Q", len(text)) + text.encode() + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, damaged"),
        (struct.pack("<Q", 1 << 62) + b"{}", "truncated, damaged"),
        (header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}'), "truncated, damaged"),
        (header('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'), "truncated, damaged"),
        (header('{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}'), "truncated, damaged"),
        (header('{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'), "a is stored as F8_E4M3"),
        (header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [1, 2], '
                '"data_offsets": [0, 8]}}'), "the header has a twice"),
        (header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], '
                '"data_offsets": [4, 8]}}'), "truncated, damaged"),
    ],
)  # fmt: skip
def test_damaged_headers(single, content, message):
    single.write_bytes(content)
    assert refused(UnreadableFile, single, message).startswith(f"{single}: ")


def test_shards_and_index_must_agree(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def changed(**weight_map):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | weight_map}))

    changed(scale="model-00001-of-00003.safetensors")
    refused(UnreadableFile, shards, "model-0000[13].* must have the tensors that .* gives it .*scale")
    changed(extra="model-00001-of-00003.safetensors")
    refused(UnreadableFile, shards, "model-00001.*missing: extra; not in the index: none")
    for wrong in ("../m.safetensors", 3, "", "a/b"):
        changed(scale=wrong)
        refused(UnreadableFile, shards, "scale must be in a file of this folder")
    changed(scale="model-00009-of-00003.safetensors")
    refused(FileNotFoundError, shards, "model-00009-of-00003.safetensors: there is no such file, and .*index.json says")
    for wrong in ({}, {"weight_map": {}}, {"weight_map": [1]}):
        path.write_text(json.dumps(wrong))
        refused(UnreadableFile, shards, 'must have "weight_map"')


def test_200_damaged_files(tmp_path, shards):
    """Our error or a load; of a safetensors file, only a flipped bit of a number or a name passes."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in shards.iterdir())
    whole = {path: path.read_bytes() for path in files}
    refused = 0
    for _ in range(200):
        path = files[rng.integers(len(files))]
        path.write_bytes(gguf_files.damaged(whole[path], rng))
        try:
            opened = pretrained.open_files(shards)
            for name in opened.names:
                assert opened.read(name).shape == opened.shape(name)
            opened.tokenizer()
        except (UnreadableFile, FileNotFoundError) as error:
            assert str(error).startswith(str(shards))
            refused += 1
        path.write_bytes(whole[path])
    assert 100 < refused < 200
    pretrained.open_files(shards)


def test_a_file_that_was_replaced_after_it_was_opened(single):
    opened = pretrained.open_files(single)
    single.write_bytes(b"")
    with pytest.raises(UnreadableFile, match="model.safetensors: is truncated"):
        opened.read("scale")
    single.unlink()
    pretrained.write_safetensors(single.parent, [("scale", np.ones(3))], CONFIG)
    with pytest.raises(UnreadableFile, match="it was replaced"):
        opened.read("scale")
    with pytest.raises(UnreadableFile, match="layer.0.weight cannot be read"):
        opened.read("layer.0.weight")


def test_what_is_not_written(tmp_path):
    write = pretrained.write_safetensors
    ones = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="the tensor a comes twice"):
        write(tmp_path, [("a", ones), ("a", ones)], CONFIG)
    with pytest.raises(ValueError, match="the tensor a comes twice"):
        write(tmp_path, [("a", ones), ("b", ones), ("a", ones)], CONFIG, shard_size=20)
    with pytest.raises(ValueError, match="got no tensors"):
        write(tmp_path, [], CONFIG)
    with pytest.raises(ValueError, match="z has the dtype complex128"):
        write(tmp_path, [("a", ones), ("z", np.ones(3, complex))], CONFIG)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, [("a", ones)], CONFIG)
    with pytest.raises(ValueError, match="holds model.safetensors already"):
        write(tmp_path, [("a", ones)], CONFIG)


def test_a_generator_is_read_shard_by_shard(tmp_path, monkeypatch):
    alive = []

    def made():
        for i in range(6):
            alive.append(len(list(tmp_path.glob("*.part"))))
            yield f"t{i}", np.full(10, i, np.float32)

    pretrained.write_safetensors(tmp_path, made(), CONFIG, shard_size=80)
    assert alive == [0, 0, 0, 1, 1, 2]


def test_take_and_check():
    arrays = pretrained.Arrays({"a": np.ones((2, 3)), "b": np.ones(5), "h.0.bias": np.ones(1)}, CONFIG)
    np.testing.assert_array_equal(pretrained.take(arrays, "a", (2, 3)), np.ones((2, 3)))
    with pytest.raises(UnreadableFile, match=r"arrays: a must be \(3, 2\), got \(2, 3\)"):
        pretrained.take(arrays, "a", (3, 2))
    with pytest.raises(UnreadableFile, match=r"there is no tensor h.1.bias; did you mean h.0.bias\?"):
        pretrained.take(arrays, "h.1.bias", (1,))
    pretrained.check(arrays, {"a": (2, 3), "b": (5,)}, ignored=["h.*.bias"])
    with pytest.raises(UnreadableFile, match="1 of 2 tensors are missing: c"):
        pretrained.check(arrays, {"a": (2, 3), "c": (5,)})
    with pytest.raises(UnreadableFile, match=r"b must be \(4,\)"):
        pretrained.check(arrays, {"a": (2, 3), "b": (4,)})
    with pytest.raises(UnreadableFile, match="1 tensors belong to no part of this model: h.0.bias"):
        pretrained.check_all_read(arrays, ["a", "b"])
    with pytest.raises(FileNotFoundError, match="arrays have no tokenizer"):
        arrays.tokenizer()


@pytest.mark.parametrize("kind", ["shards", "single", "gguf"])
def test_an_unknown_name_in_every_source(kind, tmp_path, request):
    if kind == "gguf":
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_files.file(gguf_files.metadata(), gguf_files.tensors()))
    else:
        path = request.getfixturevalue(kind)
    opened = pretrained.open_files(path)
    for ask in (opened.shape, opened.read):
        with pytest.raises(UnreadableFile, match="there is no tensor model.layers.0.nothing"):
            ask("model.layers.0.nothing")


def test_a_missing_package_names_the_extra(single, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'safetensors; pip install "mhajax\[pretrained\]"'):
        pretrained.open_files(single)


def minilm():
    from experiments.data import pretrained_files
    from experiments.errors import DataError

    try:
        return pretrained_files.locate("minilm")
    except DataError as error:
        pytest.skip(str(error))


def test_minilm(tmp_path):
    path = minilm()
    opened = pretrained.open_files(path)
    assert opened.config["num_hidden_layers"] == 6 and len(opened.names) == 104
    pretrained.take(opened, "encoder.layer.5.attention.self.query.weight", (384, 384))
    assert opened.tokenizer().encode("Hello 2024").tokens == ["[CLS]", "hello", "202", "##4", "[SEP]"]


def test_minilm_through_transformers_and_back(tmp_path):
    path = minilm()
    reason = "the extra oracles (transformers, torch) is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    opened = pretrained.open_files(path)
    theirs = transformers.AutoModel.from_pretrained(path)
    for name, array in theirs.state_dict().items():
        np.testing.assert_array_equal(opened.read(name), array.numpy())
    rounded = [(name, opened.read(name)) for name in theirs.state_dict()]
    for dtype, torch_dtype in ((np.float32, torch.float32), (jnp.bfloat16, torch.bfloat16)):
        written = ((name, array.astype(dtype)) for name, array in rounded)
        folder = tmp_path / str(torch_dtype)
        pretrained.write_safetensors(folder, written, opened.config, opened.tokenizer(), shard_size=30 << 20)
        loaded = transformers.AutoModel.from_pretrained(folder, dtype=torch_dtype).state_dict()
        expected = transformers.AutoModel.from_pretrained(path, dtype=torch_dtype).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text in ("", "Hello, 2024!", "naïve 漢字 😀", "[MASK] a\tb"):
        assert opened.tokenizer().encode(text).ids == tokenizer(text)["input_ids"]
