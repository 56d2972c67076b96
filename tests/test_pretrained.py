"""Families of pretrained models: what is loaded is computed, written and pruned; what is not known is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from mhajax import PerAttention, encoder, language_model, pretrained
from mhajax.heads import surgery
from mhajax.pretrained.families import FAMILIES
from mhajax.pretrained.models import to_tensors
from mhajax.pretrained.source import Arrays

V = 13
BERT = {
    "model_type": "bert", "vocab_size": V, "hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 6, "max_position_embeddings": 9, "type_vocab_size": 2, "hidden_act": "gelu",
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": V, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 6, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": V, "n_embd": 8, "n_head": 4, "n_layer": 2, "n_positions": 9}
NEOX = BERT | {"model_type": "gpt_neox", "rotary_pct": 1.0}
NEOX = {name: value for name, value in NEOX.items() if name != "type_vocab_size"}
DISTILBERT = {
    "model_type": "distilbert", "vocab_size": V, "dim": 8, "n_heads": 4, "n_layers": 2, "hidden_dim": 6,
    "max_position_embeddings": 9, "activation": "gelu",
}  # fmt: skip
CONFIGS = {
    "bert": BERT, "roberta": BERT | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": DISTILBERT, "albert": BERT | {"model_type": "albert", "embedding_size": 4}, "gpt2": GPT2,
    "gpt_neox": NEOX, "llama": LLAMA, "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 4},
    "qwen2": LLAMA | {"model_type": "qwen2"},
}  # fmt: skip


def arrays_of(config, seed=0):
    """Random arrays with the names and shapes that the family wants."""
    family = FAMILIES[config["model_type"]]
    empty = Arrays({}, config)
    ours = family.read_config(empty)
    leaves = family.leaves(empty, ours)
    random = np.random.default_rng(seed)
    return {name: random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves for name in leaf.names}


def test_every_family_is_here():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_back_come_the_arrays_that_went_in(name):
    arrays = arrays_of(CONFIGS[name])
    model = pretrained.from_arrays(arrays, CONFIGS[name])
    assert model.model is (encoder if name in ("bert", "roberta", "distilbert", "albert") else language_model)
    shapes = jax.eval_shape(partial(model.model.init_params, config=model.config), jax.random.key(0))
    assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(jnp.shape, shapes)
    back = dict(to_tensors(model.params, model.config, model.source))
    assert set(back) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pruned_model_is_written_and_opened(name, tmp_path):
    pytest.importorskip("safetensors")
    model = pretrained.from_arrays(arrays_of(CONFIGS[name]), CONFIGS[name])
    keep = PerAttention(attention=np.array([[True, False, True, False], [False, False, True, True]]))
    small, config = surgery.prune(model.params, model.config, keep)
    again = pretrained.load(pretrained.save(tmp_path / "small", small, config, model))
    kept = lambda config: (config.num_heads, config.kv_heads, config.width, config.value_width)  # noqa: E731
    assert kept(again.config) == kept(config) and again.config.num_heads < 4 and again.tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, again.params, small)


def test_scalings_by_length_go_by_the_longest_text():
    rope = {"rope_type": "dynamic", "factor": 2.0}
    config = LLAMA | {"rope_scaling": rope, "max_position_embeddings": 16, "head_dim": 4}
    plain, long = (pretrained.from_arrays(arrays_of(config), config, length=n).config for n in (None, 64))
    assert plain.rotary_frequencies[0] == long.rotary_frequencies[0] == 1.0
    assert plain.rotary_frequencies[1] == pytest.approx(0.01) and long.rotary_frequencies[1] == pytest.approx(0.01 / 7)


def test_what_a_config_leaves_out_is_what_it_is_there():
    """The defaults of the models' own classes, where they differ from those of their relatives."""
    read = lambda config: pretrained.from_arrays(arrays_of(config), config).config  # noqa: E731
    left_out = {name: value for name, value in CONFIGS["albert"].items() if name != "hidden_act"}
    assert read(left_out).activation == "gelu_tanh" and read(CONFIGS["albert"]).activation == "gelu"
    assert read(LLAMA | {"model_type": "mistral"}).window == 4095 and read(CONFIGS["mistral"]).window == 3
    assert read(LLAMA | {"model_type": "mistral", "sliding_window": None}).window is None
    assert read(LLAMA).window is None and read(CONFIGS["qwen2"]).window is None


def changed(config, **keys):
    return lambda: pretrained.from_arrays(arrays_of(config), config | keys)


def without(config, key):
    return lambda: pretrained.from_arrays(arrays_of(config), {k: v for k, v in config.items() if k != key})


WRONG = {
    "kind": (changed(BERT, model_type="t5"), "asks for model_type='t5'; what is read here is albert, bert,"),
    "activation": (changed(BERT, hidden_act="mish"), "asks for hidden_act='mish'; what is done here is 'gelu',"),
    "positions": (changed(BERT, position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
    "decoder": (changed(BERT, is_decoder=True), "asks for is_decoder=True, which is not known here"),
    "unknown key": (changed(LLAMA, logit_softcapping=30.0), "logit_softcapping=30.0, which is not known here"),
    "scaling": (changed(LLAMA, rope_scaling={"rope_type": "ntk", "factor": 2}), "rope_scaling.rope_type='ntk'"),
    "scaling, more": (
        changed(LLAMA, rope_scaling={"rope_type": "linear", "factor": 2.0, "beta": 1}), "rope_scaling={'beta': 1}"
    ),
    "mixed layers": (
        changed(CONFIGS["mistral"], layer_types=["full_attention", "sliding_attention"]), "sliding_attention in every"
    ),
    "mixed layers of Qwen2": (
        changed(CONFIGS["qwen2"], use_sliding_window=True, sliding_window=4), "max_window_layers=28; what is done"
    ),
    "no number": (changed(GPT2, n_head="4"), "n_head as a number of at least 1, got '4'"),
    "no flag": (changed(LLAMA, mlp_bias="yes"), "mlp_bias as true or false, got 'yes'"),
    "missing": (without(LLAMA, "vocab_size"), "must say vocab_size, which it does not"),
    "another size": (changed(LLAMA, intermediate_size=7), r"gate_proj.weight must be \(7, 8\), got \(6, 8\)"),
    "fewer layers": (changed(GPT2, n_layer=1), "tensors belong to no part of this model: h.1.attn"),
    "more layers": (changed(GPT2, n_layer=3), "tensors are missing: h.2.attn"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_done_here_is_refused(name):
    do, said = WRONG[name]
    with pytest.raises(pretrained.UnreadableFile, match=said):
        do()


JUNK = [None, True, "x", [], {}, [1], -1, 0, 1.5, float("nan"), 10**12, 2**70, {"rope_type": "yarn"}, {"factor": "x"}]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_with_one_value_of_another_kind_is_refused_or_read(name):
    """Never an error from inside: 25 changes of every family, and a parameter that only some files have."""
    random, arrays = np.random.default_rng(7), arrays_of(CONFIGS[name])
    keys = [*CONFIGS[name], "rope_scaling", "rope_theta", "sliding_window", "layer_types", "pad_token_id", "head_dim"]
    for _ in range(25):
        key, junk = keys[random.integers(len(keys))], JUNK[random.integers(len(JUNK))]
        try:
            pretrained.from_arrays(arrays, CONFIGS[name] | {key: junk})
        except pretrained.UnreadableFile as error:
            assert str(error).startswith("arrays: ") and len(str(error)) < 400, (key, junk)


def test_what_a_file_has_no_place_for_is_not_written(tmp_path):
    model = pretrained.from_arrays(arrays_of(GPT2), GPT2)
    grouped, config = surgery.group_kv(model.params, model.config, 2)
    with pytest.raises(ValueError, match="kv_heads=4 for the files of a gpt2, got 2"):
        pretrained.save(tmp_path / "grouped", grouped, config, model)
    assert not (tmp_path / "grouped").exists()
    model = pretrained.from_arrays(arrays_of(CONFIGS["qwen2"]), CONFIGS["qwen2"])
    params = random_params(lambda key, config: model.params, None)  # with a bias where Qwen2 has none
    with pytest.raises(ValueError, match=r"params.stack.layers.attention.b_o must be 0.0: .* qwen2 have no place"):
        dict(to_tensors(params, model.config, model.source))
