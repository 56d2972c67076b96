"""GGUF files: every number, name and token against loops and the packages of others; every damage told."""

import os
import re
import struct
import tracemalloc
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

from mhajax import pretrained
from mhajax.pretrained import UnreadableFile
from mhajax.pretrained.gguf import quantised
from mhajax.pretrained.gguf.names import half_split
from tests import gguf_files

TEXTS = ["", "the 12 the", " the  12\n", "a12 b", "naïve 漢字 😀", "<|end|>the<think>", "  7", "\t\n x's don't 3.14"]


@pytest.fixture
def write(tmp_path):
    def written(data, name="model.gguf"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return written


@pytest.fixture
def model(write):
    return write(gguf_files.file(gguf_files.metadata(), gguf_files.tensors()))


def half(raw):
    return np.float32(np.frombuffer(raw, "<f2")[0])


def by_a_loop(raw, kind):
    """Weights one at a time, as the format's description has it."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    weights = []
    for block in (raw[i : i + size] for i in range(0, len(raw), size)):
        d = half(block[:2])
        if kind == "Q8_0":
            weights += [d * np.float32(q) for q in struct.unpack("32b", block[2:])]
            continue
        codes = block[-16:]
        for q in [c % 16 for c in codes] + [c // 16 for c in codes]:
            weights.append(d * np.float32(q - 8) if kind == "Q4_0" else d * np.float32(q) + half(block[2:4]))
    return np.array(weights, np.float32)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_weights_are_those_of_a_loop_and_of_gguf(kind):
    _, _, raw = gguf_files.tensors(1, kind)["blk.0.ffn_up.weight"]
    ours = quantised.numbers(np.frombuffer(raw, np.uint8), kind)
    np.testing.assert_array_equal(ours, by_a_loop(raw, kind))
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    theirs = gguf.dequantize(np.frombuffer(raw, np.uint8), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(ours, theirs.reshape(-1))


def test_more_blocks_than_a_chunk(monkeypatch):
    raw = np.frombuffer(gguf_files.tensors(2)["token_embd.weight"][2], np.uint8)
    whole = quantised.numbers(raw, "Q4_1")
    monkeypatch.setattr(quantised, "_CHUNK", 5)
    np.testing.assert_array_equal(quantised.numbers(raw, "Q4_1"), whole)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "<f4"), ("F16", "<f2"), ("BF16", jnp.bfloat16)])
def test_floats_keep_their_dtype(write, kind, dtype):
    array = np.arange(262 * gguf_files.D).reshape(262, gguf_files.D).astype(dtype)
    tensors = gguf_files.tensors() | {"token_embd.weight": (array.shape, kind, array.tobytes())}
    source = pretrained.open_files(write(gguf_files.file(gguf_files.metadata(), tensors)))
    got = source.read("model.embed_tokens.weight")
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got.astype(np.float32), array.astype(np.float32))


def test_config_and_names(model):
    source = pretrained.open_files(model)
    assert source.config == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32,
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "vocab_size": 262, "hidden_act": "silu",
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "eos_token_id": 260,
    }  # fmt: skip
    assert len(source.names) == len(set(source.names)) == 2 + 9 * gguf_files.LAYERS
    assert source.shape("model.layers.1.mlp.down_proj.weight") == (gguf_files.D, gguf_files.F)
    for name in source.names:
        array = source.read(name)
        assert (array.shape, array.dtype) == (source.shape(name), np.float32)
        assert array.flags.writeable


def test_scaled_rotation(write):
    scaled = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    length = {"llama.rope.scaling.original_context_length": 16}
    tensors = gguf_files.tensors()
    source = pretrained.open_files(write(gguf_files.file(gguf_files.metadata() | scaled | length, tensors)))
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert source.config["rope_scaling"] == expected
    for wrong in (scaled, scaled | {"llama.rope.scaling.type": "longrope"}):
        with pytest.raises(UnreadableFile, match="rope.scaling"):
            pretrained.open_files(write(gguf_files.file(gguf_files.metadata() | wrong, tensors)))


def test_frequencies_of_llama_3(write):
    factors = np.linspace(1, 8, gguf_files.H // 2).astype(np.float32)
    tensors = gguf_files.tensors() | {"rope_freqs.weight": (factors.shape, "F32", factors.tobytes())}
    source = pretrained.open_files(write(gguf_files.file(gguf_files.metadata(), tensors)))
    scaling = source.config["rope_scaling"]
    assert scaling["rope_type"] == "longrope" and scaling["attention_factor"] == 1
    assert scaling["short_factor"] == scaling["long_factor"] == factors.tolist()
    assert len(source.names) == len(tensors) - 1
    for wrong in (factors[:-1], -factors):
        tensors["rope_freqs.weight"] = (wrong.shape, "F32", wrong.tobytes())
        with pytest.raises(UnreadableFile, match="rope_freqs.weight must be"):
            pretrained.open_files(write(gguf_files.file(gguf_files.metadata(), tensors)))


def interleaved(x, angles):
    """Rotation of neighbours, as llama.cpp does it: x [..., H], angles [H/2]."""
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = [even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles)]
    return np.stack(pairs, axis=-1).reshape(x.shape)


def by_halves(x, angles):
    """Rotation of halves, as transformers does it."""
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), low * np.sin(angles) + high * np.cos(angles)], -1
    )


def test_half_split_rows_make_the_logits_of_interleaved_rows():
    rng = np.random.default_rng(0)
    heads, width, d = 3, 10, 7
    w_q, w_k = rng.standard_normal((2, heads * width, d))
    x, y = rng.standard_normal((2, d))
    angles = [rng.uniform(0, 6, width // 2) for _ in range(2)]

    def logits(w_q, w_k, rotate):
        q, k = ((w @ z).reshape(heads, width) for w, z in ((w_q, x), (w_k, y)))
        return (rotate(q, angles[0]) * rotate(k, angles[1])).sum(-1)

    stored = logits(w_q, w_k, interleaved)
    np.testing.assert_allclose(logits(half_split(w_q, heads), half_split(w_k, heads), by_halves), stored, atol=1e-12)
    assert np.abs(logits(w_q, w_k, by_halves) - stored).max() > 0.1


def test_only_what_is_permuted_is_brought_in_order(write):
    tensors = gguf_files.tensors()
    tensors["output.weight"] = tensors["token_embd.weight"]
    llama = pretrained.open_files(write(gguf_files.file(gguf_files.metadata(), tensors)))
    qwen = pretrained.open_files(write(gguf_files.file(gguf_files.metadata("qwen2", "qwen2"), tensors), "qwen.gguf"))
    assert qwen.config["model_type"] == "qwen2" and not qwen.config["tie_word_embeddings"]
    for name in llama.names:
        stored = qwen.read(name)
        heads = {"q_proj": gguf_files.N, "k_proj": gguf_files.K}.get(name.split(".")[-2])
        np.testing.assert_array_equal(llama.read(name), half_split(stored, heads) if heads else stored)


def test_tokens(model):
    tokenizer = pretrained.open_files(model).tokenizer()
    assert tokenizer.encode("the the12 <|end|><think>").tokens == [
        "t", "he", "Ġthe", "1", "2", "Ġ", "<|end|>", "<think>"
    ]  # fmt: skip
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_pre_tokenizers(write):
    def tokens(text, pre, **changes):
        metadata = gguf_files.metadata(pre=pre, **changes)
        return (
            pretrained.open_files(write(gguf_files.file(metadata, gguf_files.tensors())))
            .tokenizer()
            .encode(text)
            .tokens
        )

    assert tokens("  12", "gpt-2") == ["Ġ", "Ġ", "12"]
    assert tokens("  12", "smollm") == ["Ġ", "Ġ", "1", "2"]
    assert tokens("1212", "qwen2") == ["1", "2", "1", "2"]
    assert tokens("e\u0301", "qwen2") == tokens("\u00e9", "qwen2") != tokens("e\u0301", "gpt-2")
    ends = {"tokenizer__ggml__bos_token_id": 260, "tokenizer__ggml__add_eos_token": True}
    assert tokens("1212", "llama-bpe", **ends) == ["<|end|>", "12", "1", "2", "<|end|>"]


def without(metadata, key):
    return {other: thing for other, thing in metadata.items() if other != key}


ERRORS = {
    "an empty file": (lambda m, t: b"", "magic number needs 4 bytes"),
    "another format": (partial(gguf_files.file, magic=b"GGML"), "begins with b'GGUF', got b'GGML'"),
    "another version": (partial(gguf_files.file, version=2), "version 3 is read here, got 2"),
    "big-endian": (partial(gguf_files.file, version=3 << 24), "it is big-endian"),
    "absurd tensors": (lambda m, t: b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), f"{1 << 60} tensors need more"),
    "absurd keys": (lambda m, t: b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), f"{1 << 60} keys need more"),
    "a key twice": (lambda m, t: gguf_files.file({}, t, pairs=[*m.items(), ("llama.block_count", 2)]), "key .* twice"),
    "bad UTF-8": (lambda m, t: gguf_files.file(m | {"x": b"\xff"}, t), "x must be UTF-8"),
    "truncated": (lambda m, t: gguf_files.file(m, t)[:-32], r"output_norm.weight \(32,\) is at bytes"),
    "an offset beyond": (partial(gguf_files.file, offsets={"output_norm.weight": 1 << 40}), "output_norm.weight .* at"),
    "an overlap": (partial(gguf_files.file, offsets={"blk.1.attn_norm.weight": 32}), "token_embd.weight .* overlap"),
    "no alignment": (partial(gguf_files.file, offsets={"output_norm.weight": 8}), "no multiple of the alignment 32"),
    "an unread type": (
        lambda m, t: gguf_files.file(m, t | {"blk.0.attn_q.weight": ((32, 32), "Q4_K", b"")}),
        "attn_q.weight is stored as Q4_K",
    ),
    "an unknown type": (
        lambda m, t: gguf_files.file(m, t | {"blk.0.attn_q.weight": ((32, 32), 99, b"")}),
        "stored as number 99",
    ),
    "half a block": (
        lambda m, t: gguf_files.file(m, t | {"blk.0.attn_q.weight": ((2, 48), "Q4_1", b"")}),
        "blocks of 32, which do not divide",
    ),
    "an absurd shape": (
        lambda m, t: gguf_files.file(m, t | {"blk.0.attn_q.weight": ((1 << 62, 1 << 62), "F32", b"")}),
        "attn_q.weight .* is at bytes",
    ),
    "an alignment": (lambda m, t: gguf_files.file(m | {"general.alignment": 24}, t), "must be a power of two, got 24"),
    "an architecture": (lambda m, t: gguf_files.file(m | {"general.architecture": "mamba"}, t), "got 'mamba'"),
    "a missing key": (lambda m, t: gguf_files.file(without(m, "llama.block_count"), t), "llama.block_count is missing"),
    "a list": (lambda m, t: gguf_files.file(m | {"llama.attention.head_count": [2, 2]}, t), r"integer .* got \[2, 2\]"),
    "an unread key": (lambda m, t: gguf_files.file(m | {"llama.logit_scale": 2.0}, t), "llama.logit_scale is not read"),
    "experts": (lambda m, t: gguf_files.file(m | {"llama.expert_count": 8}, t), "llama.expert_count is not read"),
    "half rotated": (lambda m, t: gguf_files.file(m | {"llama.rope.dimension_count": 8}, t), "attn_q.weight must have"),
    "an unread tensor": (
        lambda m, t: gguf_files.file(m, t | {"blk.0.ffn_gate_exps.weight": t["output_norm.weight"]}),
        "blk.0.ffn_gate_exps.weight is a tensor that",
    ),
    "a name without a part": (
        lambda m, t: gguf_files.file(m, t | {"nothing": t["output_norm.weight"]}),
        "nothing is a tensor that",
    ),
    "other rows": (
        lambda m, t: gguf_files.file(m, t | {"blk.0.attn_k.weight": t["blk.0.attn_q.weight"]}),
        "attn_k.weight must have 1 heads × 16 rows.* got 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_file_and_tensor(write, case):
    make, message = ERRORS[case]
    path = write(make(gguf_files.metadata(), gguf_files.tensors()))
    with pytest.raises(UnreadableFile, match=message) as told:
        pretrained.open_files(path)
    assert str(told.value).startswith(f"{path}: ")


def test_a_name_twice(write):
    tensors = gguf_files.tensors()
    data = gguf_files.file(gguf_files.metadata(), tensors)
    with pytest.raises(UnreadableFile, match="tensor blk.0.attn_norm.weight is there twice"):
        pretrained.open_files(write(data.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight")))


TOKENIZERS = {
    "tokenizer__ggml__model": ("bert", "must be one of gpt2, got 'bert'"),
    "tokenizer__ggml__pre": ("falcon", "must be one of gpt-2, smollm.* got 'falcon'"),
    "tokenizer__ggml__merges": (["t h"], "two tokens that make a third, got 't h'"),
    "tokenizer__ggml__token_type": ([1, 2], "must be 262 integers, one per token, got 2"),
    "tokenizer__ggml__tokens": (["a", "a"], "must be different from each other, got 'a' twice"),
    "tokenizer__ggml__add_bos_token": (True, "bos_token_id must be one of 262 tokens, got None"),
}


@pytest.mark.parametrize("key", TOKENIZERS)
def test_tokenizers_that_are_not_read(write, key):
    thing, message = TOKENIZERS[key]
    changes = {"tokenizer__ggml__token_type": None} if key.endswith("tokens") else {}
    metadata = gguf_files.metadata(**changes | {key: thing})
    source = pretrained.open_files(write(gguf_files.file(metadata, gguf_files.tensors())))
    with pytest.raises(UnreadableFile, match=message):
        source.tokenizer()


def test_no_tokenizer(write):
    metadata = {key: thing for key, thing in gguf_files.metadata().items() if not key.startswith("tokenizer")}
    source = pretrained.open_files(write(gguf_files.file(metadata, gguf_files.tensors())))
    with pytest.raises(FileNotFoundError, match="no tokenizer in this file"):
        source.tokenizer()


def test_a_file_that_shrinks_after_it_was_opened(model):
    source = pretrained.open_files(model)
    os.truncate(model, 2000)
    with pytest.raises(UnreadableFile, match="embed_tokens|token_embd.weight must have"):
        source.read("model.embed_tokens.weight")


@pytest.mark.parametrize("count", tiered([40, 160], 40))
def test_damaged_files(write, count):
    """Our error or a load, and no memory for what a damaged count promises."""
    rng = np.random.default_rng(count)
    whole = gguf_files.file(gguf_files.metadata(), gguf_files.tensors())
    refused = 0
    tracemalloc.start()
    for _ in range(count):
        path = write(gguf_files.damaged(whole, rng))
        try:
            source = pretrained.open_files(path)
            for name in source.names:
                assert source.read(name).shape == source.shape(name)
            source.tokenizer().encode("the 12")
        except UnreadableFile as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
        except FileNotFoundError as error:
            assert "no tokenizer" in str(error)
    assert count / 2 < refused < count
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def smollm2():
    from experiments.data import pretrained_files
    from experiments.errors import DataError

    try:
        return pretrained_files.locate("smollm2")
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_smollm2_is_what_gguf_reads():
    path = smollm2()
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    source = pretrained.open_gguf(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(theirs) == len(source.names) == 272
    for name in ("blk.0.attn_q.weight", "blk.29.ffn_down.weight", "blk.7.attn_norm.weight"):
        tensor = theirs[name]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(source.contents.read(name), expected)


def test_smollm2_in_transformers():
    """Every weight and the tokenizer, bit for bit; `transformers` does not know the pre-tokenizer "smollm"."""
    path: Path = smollm2()
    reason = "the extra oracles (transformers, torch) is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    source = pretrained.open_files(path)
    state = {name: array.numpy() for name, array in theirs.state_dict().items() if name != "lm_head.weight"}
    assert set(state) == set(source.names)
    for name, array in state.items():
        np.testing.assert_array_equal(source.read(name), array)
    config = transformers.LlamaConfig(**source.config)
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, key) == getattr(theirs.config, key)
    ours, tokenizer = source.tokenizer(), transformers.AutoTokenizer.from_pretrained(**where)
    for text in TEXTS:
        if not re.search(r"\s\s\d", text):  # the digit is set apart after the white space, or before it
            assert ours.encode(text).ids == tokenizer(text)["input_ids"]
