"""Pretrained models against `transformers` itself: every family, made small and random on the spot."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mhajax import decoding, encoder, language_model, masks, pretrained

transformers: Any = pytest.importorskip("transformers", reason="needs the extra oracles: pip install 'mhajax[oracles]'")
torch: Any = pytest.importorskip("torch", reason="needs the extra oracles")

V, T = 40, 9
BERT = {
    "vocab_size": V, "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 20,
    "max_position_embeddings": 16,
}  # fmt: skip
LLAMA = BERT | {"num_attention_heads": 6, "hidden_size": 24, "num_key_value_heads": 3, "max_position_embeddings": 64}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
    },
}  # fmt: skip
# By name: the class, the class of its config, and what its config says.
MADE = {
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert, pooled": ("BertModel", "BertConfig", BERT | {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"type_vocab_size": 1, "max_position_embeddings": 18}),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {
        "vocab_size": V, "dim": 12, "n_heads": 3, "n_layers": 2, "hidden_dim": 20, "max_position_embeddings": 16,
    }),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", BERT | {"embedding_size": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": V, "n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 64,
    }),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT | {"rotary_pct": 0.5, "max_position_embeddings": 64}),
    "gpt_neox, pre": ("GPTNeoXForCausalLM", "GPTNeoXConfig",
        BERT | {"rotary_pct": 1.0, "use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama, biases": ("LlamaForCausalLM", "LlamaConfig",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 6}),
    **{f"llama, {name}": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_parameters": {"rope_theta": 100.0, **rope}})
       for name, rope in ROPES.items()},
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA | {"rms_norm_eps": 1e-3}),
}  # fmt: skip
CAUSAL = {"gpt2", "gpt_neox", "llama", "mistral", "qwen2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a name of MADE to theirs and ours; each is made once."""
    found = {}

    def make(name):
        if name not in found:
            kind, shape, options = MADE[name]
            config = getattr(transformers, shape)(**options, attn_implementation="eager")
            torch.manual_seed(len(name))
            theirs = getattr(transformers, kind)(config).eval()
            with torch.no_grad():
                for parameter in theirs.parameters():
                    spread = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                    parameter.copy_(torch.randn_like(parameter) * spread)
            folder = tmp_path_factory.mktemp("model")
            theirs.save_pretrained(folder)
            found[name] = theirs, pretrained.load(folder), folder
        return found[name]

    return make


def padded(side):
    """Tokens [2, T] and which of them are real."""
    tokens = np.random.default_rng(0).integers(5, V, (2, T))
    real = np.ones((2, T), bool)
    if side != "none":
        real[1, :3] = False
        real[1] = real[1] if side == "left" else real[1, ::-1]
    return tokens, real


@pytest.mark.slow
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MADE)
def test_hidden_states_logits_and_every_head(made, name, side):
    theirs, ours, _ = made(name)
    tokens, real = padded(side)
    places = np.maximum(np.cumsum(real, -1) - 1, 0)
    given = {} if "distilbert" in name else {"position_ids": torch.tensor(places + 2 * (name == "roberta"))}
    with torch.no_grad():
        out = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(real.astype(int)), output_hidden_states=True,
            output_attentions=True, **given,
        )  # fmt: skip
    if name == "distilbert":
        places = np.arange(T)
    options: Any = {"mask": masks.dense(real[:, None, None, :]), "positions": jnp.asarray(places)}
    model, params, config = ours.model, ours.params, ours.config

    @jax.jit
    def run(params):
        _, seen = model.apply_captured(params, jnp.asarray(tokens), config, capture=("weights",), **options)
        x = model.features(params, jnp.asarray(tokens), config, **options)
        return (
            x,
            seen.attention["weights"],
            None if pooled else model.apply(params, jnp.asarray(tokens), config, **options),
        )

    pooled = getattr(config, "pooled", False)
    x, weights, logits = run(params)
    np.testing.assert_allclose(np.asarray(x)[real], out.hidden_states[-1].numpy()[real], rtol=1e-4, atol=1e-4)
    for layer, attention in enumerate(out.attentions):
        shown = np.swapaxes(weights[layer], 1, 2)[real]
        np.testing.assert_allclose(shown, np.swapaxes(attention.numpy(), 1, 2)[real], rtol=1e-4, atol=1e-4)
    if pooled:
        vector = model.pooled(params, x)
        rows = real[:, 0]
        np.testing.assert_allclose(vector[rows], out.pooler_output.numpy()[rows], rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_allclose(np.asarray(logits)[real], out.logits.numpy()[real], rtol=1e-4, atol=1e-4)


def greedy(ours, tokens, length):
    """The likeliest tokens after these, one by one."""
    config, params = ours.config, language_model.unstack(ours.params)
    cache = language_model.init_cache(tokens.shape[:-1], tokens.shape[-1] + length, config)
    logits, cache = language_model.extend(params, tokens, cache, config)

    def step(token, cache):
        logits, cache = language_model.extend(params, token[:, None], cache, config)
        return logits[:, 0], cache

    first = jnp.argmax(logits[:, -1], -1)
    rest = decoding.generate(step, cache, first, decoding.greedy, jax.random.key(0), length=length - 1)
    return jnp.concatenate([first[:, None], rest], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in MADE if name.partition(",")[0] in CAUSAL and name != "llama, dynamic"]
)
def test_fifty_tokens_one_by_one(made, name):
    theirs, ours, _ = made(name)
    tokens = np.random.default_rng(1).integers(5, V, (2, 5))
    limit = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if name == "llama, longrope":  # whose factors change with the length
        limit["max_new_tokens"] = 10
    expected = theirs.generate(torch.tensor(tokens), attention_mask=torch.ones(2, 5, dtype=int), **limit).numpy()[:, 5:]
    found = jax.jit(lambda tokens: greedy(ours, tokens, limit["max_new_tokens"]))(jnp.asarray(tokens))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_what_is_saved_is_bit_for_bit_what_was_loaded(made, name, tmp_path):
    theirs, ours, _ = made(name)
    folder = pretrained.save(tmp_path / "model", ours.params, ours.config, ours)
    again, report = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


# The real ones ---------------------------------------------------------------------------------------------------

TEXTS = [
    "The bank of the river was steep.",
    "She put the money that she had saved for years into the bank on the other side of the street.",
    "Attention!",
]


@pytest.fixture(scope="module")
def real():
    """A function from a name to its files; skips where they were not fetched."""
    from experiments.data.pretrained_files import locate
    from experiments.errors import DataError

    def found(name):
        try:
            return locate(name)
        except DataError as error:
            pytest.skip(str(error))

    return found


@pytest.mark.slow
def test_minilm(real):
    folder = real("minilm")
    ours = pretrained.load(folder)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = [ours.tokenizer.encode(text).ids for text in TEXTS]
    padded = np.zeros((len(TEXTS), max(map(len, tokens))), int)
    for row, some in zip(padded, tokens, strict=True):
        row[: len(some)] = some
    lengths = np.array([len(some) for some in tokens])
    real_ones = np.arange(padded.shape[1]) < lengths[:, None]
    with torch.no_grad():
        out = theirs(torch.tensor(padded), attention_mask=torch.tensor(real_ones.astype(int)), output_attentions=True)
    x, seen = jax.jit(
        lambda params: encoder.apply_captured(params, jnp.asarray(padded), ours.config, mask=masks.lengths(lengths))
    )(ours.params)
    np.testing.assert_allclose(np.asarray(x)[real_ones], out.last_hidden_state.numpy()[real_ones], rtol=1e-4, atol=1e-4)
    for layer, attention in enumerate(out.attentions):
        np.testing.assert_allclose(seen.attention["weights"][layer][0], attention[0].numpy(), rtol=1e-4, atol=1e-4)


def mean_loss(logits, tokens):
    """Of the next token, in nats."""
    surprise = scipy.special.log_softmax(np.float64(logits[:, :-1]), axis=-1)
    return -np.mean(np.take_along_axis(surprise, tokens[:, 1:, None], -1))


@pytest.mark.slow
def test_smollm2(real):
    file = real("smollm2")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    ours = pretrained.load(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.array([ours.tokenizer.encode(" ".join(TEXTS * 3)).ids])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    found = np.asarray(
        jax.jit(lambda params: language_model.apply(params, jnp.asarray(tokens), ours.config))(ours.params)
    )
    assert abs(mean_loss(found, tokens) - mean_loss(logits, tokens)) < 1e-3
    np.testing.assert_allclose(found, logits, rtol=1e-3, atol=5e-3)
    prompt = tokens[:, :8]
    limit = {
        "max_new_tokens": 50,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "repetition_penalty": 1.0,
    }
    expected = theirs.generate(torch.tensor(prompt), attention_mask=torch.ones(1, 8, dtype=int), **limit).numpy()[:, 8:]
    written = jax.jit(lambda params, prompt: greedy(ours._replace(params=params), prompt, 50))(ours.params, prompt)
    np.testing.assert_array_equal(written, expected)
