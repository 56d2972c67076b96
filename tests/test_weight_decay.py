"""What is decayed, leaf by leaf: in every model here, stacked or not, and in pytrees of others."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mhajax import language_model, linen, translator
from mhajax.tree import to_dict
from mhajax.variants import differential, gated, qk_norm, sinks, talking_heads
from mhajax.weight_decay import decayed

SHAPE = {"d_model": 4, "num_heads": 2, "d_ff": 3, "vocab_size": 5, "norm": "layer", "use_bias": True}
SHAPE |= {"activation": "swiglu"}
MATRICES = {"attention": "w_q w_k w_v w_o", "mlp": "w_in w_out w_gate"}
SPARED = {"attention": "b_q b_k b_v b_o", "mlp": "b_in b_out b_gate"}


def names(tree, wanted):
    """Of the leaves whose value is this."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, value in flat if value is wanted}


def of_stack(name, cross):
    """Matrices, and what is spared, of a stack of layers, each written out."""
    whole = {"attention": "attention", "mlp": "mlp"} | ({"cross": "attention"} if cross else {})
    under = lambda table: {  # noqa: E731
        f"{name}.layers.{part}.{leaf}" for part, kind in whole.items() for leaf in table[kind].split()
    }
    norms = {f"{name}.layers.{part}_norm" for part in whole} | {f"{name}.norm"}
    return under(MATRICES), under(SPARED) | {f"{norm}.{leaf}" for norm in norms for leaf in ("scale", "shift")}


@pytest.mark.parametrize("layers", [1, 3])
def test_of_a_language_model(layers):
    config = language_model.Config(num_layers=layers, **SHAPE)  # pyright: ignore
    params = jax.eval_shape(lambda: language_model.init_params(jax.random.key(0), config))
    matrices, spared = of_stack("stack", cross=False)
    assert len(spared) == 13
    for tree in (params, to_dict(params)):
        assert names(decayed(tree), True) == matrices | {"embedding.tokens"}
        assert names(decayed(tree), False) == spared


@pytest.mark.slow
def test_of_a_translator_and_of_its_flax_module():
    config = translator.Config(encoder_layers=2, decoder_layers=2, **SHAPE)  # pyright: ignore
    token = jnp.zeros((1, 1), jnp.int32)
    module = jax.eval_shape(lambda: linen.Model(config).init(jax.random.key(0), token, token)["params"])
    params = jax.eval_shape(lambda: translator.init_params(jax.random.key(0), config))
    (encoder, spared), (decoder, also) = of_stack("encoder", cross=False), of_stack("decoder", cross=True)
    for tree in (params, module):
        assert names(decayed(tree), True) == encoder | decoder | {"embedding.tokens"}
        assert names(decayed(tree), False) == spared | also


@pytest.mark.parametrize(
    ("variant", "own"),
    [
        (qk_norm, {"q_scale": False, "k_scale": False}),
        (gated, {"w_g": True}),
        (sinks, {"sinks": False}),
        (differential, {"lambdas": False, "scale": False}),
        (talking_heads, {"before": True, "after": True}),
    ],
)
def test_of_variants_stacked(variant, own):
    config = variant.Config(d_model=4, num_heads=2)
    keys = jax.random.split(jax.random.key(0), 3)
    found = decayed(jax.eval_shape(jax.vmap(lambda key: variant.init_params(key, config)), keys))
    assert {name: getattr(found, name) for name in own} == own
    assert names(found.attention, True) == {"w_q", "w_k", "w_v", "w_o"}


def test_of_a_flax_module_with_heads():
    """Whose biases have two axes, [N, H]."""
    x = jnp.zeros((1, 3, 4))
    params = jax.eval_shape(lambda: nn.MultiHeadDotProductAttention(2).init(jax.random.key(0), x)["params"])
    assert {name.split(".")[-1] for name in names(decayed(params), True)} == {"kernel"}
    assert {name.split(".")[-1] for name in names(decayed(params), False)} == {"bias"}


class Boxed(NamedTuple):
    value: jax.Array


def test_of_plain_pytrees():
    two, three = jnp.ones((2, 3)), jnp.ones((2, 3, 3))
    spared = {
        "LayerNorm_0": {"scale": two, "bias": two}, "ln_1": {"weight": two}, "norm1": {"weight": [two, two]},
        "layers.0.input_layernorm.weight": two, "layers.0.q_proj.bias": two, "mlp/~/linear": {"b": two},
        "gamma": two, "lambda_q1": two, "vector": jnp.ones(3), "dense": {"bias": Boxed(two)}, "number": 1.0,
    }  # fmt: skip
    matrices = {
        "kernel": three, "layers.0.q_proj.weight": two, "Embed_0": {"embedding": two}, "table": two, "scaled": three,
        "list": [two, three], "blocks": {"w": Boxed(three)}, "beta_weights": two, "normal": {"w": two},
    }  # fmt: skip
    assert not any(jax.tree.leaves(decayed(spared)))
    assert all(jax.tree.leaves(decayed(matrices)))
    assert decayed(two) is True and decayed([jnp.ones(3)]) == [False]
