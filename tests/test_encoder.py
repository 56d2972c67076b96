"""An encoder against NumPy, with its norms in each place, and all that its vectors and its head can have."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from reference import multi_head_attention, numbers, random_params
from tiers import tiered

from mhajax import PerAttention, embedding, encoder, language_model, masks, transformer
from mhajax.heads import ablation, importance

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, V, L, N, D, E = 2, 5, 11, 2, 3, 6, 4
EPSILON = 0.1
BERT = encoder.Config(
    d_model=D, num_heads=N, num_layers=L, d_ff=7, vocab_size=V, use_bias=True, norm="layer", norm_epsilon=EPSILON,
    placement="post", final_norm=False, activation="gelu", positions="learned", max_positions=T + 2, token_types=2,
    embedding_norm=True, embedding_width=E, scale_embedding=False, pooled=True,
)  # fmt: skip
PLACED = {
    "post": BERT,
    "pre": dataclasses.replace(BERT, placement="pre", final_norm=True, embedding_width=None, embedding_norm=False),
    "parallel": dataclasses.replace(BERT, placement="parallel", final_norm=True, token_types=None),
}
TOKENS: Any = np.random.default_rng(0).integers(0, V, (B, T))
TYPES: Any = np.random.default_rng(1).integers(0, 2, (B, T))
LENGTHS: Any = np.array([5, 3])
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def normalised(params, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON) * params.scale + params.shift


def gelu(x):
    return x * scipy.stats.norm.cdf(x)


def by_hand(params, config):
    """Features and logits in float64 NumPy."""
    params = jax.tree.map(np.float64, params)
    words, seen = params.embedding, np.arange(T) < LENGTHS[:, None]
    x = words.tokens[TOKENS] + words.positions[:T] + (0 if words.types is None else words.types[TYPES])
    x = x if words.norm is None else normalised(words.norm, x)
    x = x if words.projection is None else x @ words.projection + words.projection_bias
    attend = partial(multi_head_attention, mask=seen[:, None, None])
    for i in range(L):
        layer = jax.tree.map(lambda w, i=i: w[i], params.stack.layers)
        one, two = (partial(normalised, p) for p in (layer.attention_norm, layer.mlp_norm))
        feed = lambda x, p: gelu(x @ p.w_in + p.b_in) @ p.w_out + p.b_out  # noqa: E731
        if config.placement == "post":
            x = one(x + attend(layer.attention, x))
            x = two(x + feed(x, layer.mlp))
        elif config.placement == "pre":
            x = x + attend(layer.attention, one(x))
            x = x + feed(two(x), layer.mlp)
        else:
            x = x + attend(layer.attention, one(x)) + feed(two(x), layer.mlp)
    x = x if params.stack.norm is None else normalised(params.stack.norm, x)
    head = params.head
    return x, normalised(head.norm, gelu(x @ head.w + head.b)) @ words.tokens.T + head.output_bias


@pytest.mark.parametrize("placement", tiered(PLACED, "post"))
def test_it_is_what_its_parts_say(placement):
    config = PLACED[placement]
    params = random_params(encoder.init_params, config)
    given = {} if config.token_types is None else {"types": jnp.asarray(TYPES)}

    @jax.jit
    def run(params):
        x = encoder.features(params, TOKENS, config, mask=masks.lengths(LENGTHS), **given)
        return x, encoder.logits(params, x, config), encoder.pooled(params, x)

    (x, logits), found = by_hand(params, config), run(params)
    close(found[0], x)
    close(found[1], logits)
    close(found[2], np.tanh(x[:, 0] @ params.pooler.w + params.pooler.b))


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACED)
def test_heads_removed_one_by_one_are_gates(placement):
    config = PLACED[placement]
    params = random_params(encoder.init_params, config)
    wanted = numbers(3, T, D)
    loss = lambda x: jnp.sum((x - wanted) ** 2, (-2, -1))  # noqa: E731
    mask = masks.lengths(LENGTHS)
    gated = lambda gates: loss(encoder.features(params, TOKENS, config, mask=mask, gates=gates))  # noqa: E731
    expected = jax.jit(lambda: importance.ablations(gated, PerAttention(attention=jnp.ones((L, N)))))()
    found = jax.jit(lambda: ablation.of_stages(encoder.stages(params, TOKENS, config, mask=mask), loss))()
    np.testing.assert_allclose(found.attention, expected.attention, rtol=1e-4)
    assert np.std(expected.attention, axis=(0, 2)).min() > 0.01


@pytest.mark.slow
def test_it_begins_and_stops_at_a_layer():
    params = random_params(encoder.init_params, PLACED["pre"])
    (stage,) = encoder.stages(params, TOKENS, PLACED["pre"])
    halves = [transformer.part(stage.params, stage.config, *ends) for ends in ((0, 1), (1, 2))]
    x = stage.x
    for half, shape in halves:
        x = transformer.apply(half, x, shape, **stage.options)
    close(x, encoder.features(params, TOKENS, PLACED["pre"]))
    with pytest.raises(ValueError, match="0 ≤ start < stop ≤ num_layers=2, got 1 and 1"):
        transformer.part(stage.params, stage.config, 1, 1)


@pytest.mark.slow
def test_a_language_model_with_a_window_another_base_and_another_table():
    """Rotary angles of a base and of its frequencies are the same; the table of the logits is read, the window kept."""
    config = language_model.Config(
        d_model=8, num_heads=2, num_layers=1, vocab_size=V, window=2, tied=False, rotary_base=50.0, mlp_bias=False,
        activation="swiglu",
    )  # fmt: skip
    params = random_params(language_model.init_params, config)
    run = jax.jit(lambda params, config: language_model.apply(params, TOKENS, config), static_argnums=1)
    out = run(params, config)
    frequencies = tuple(float(50.0 ** (-i / 2)) for i in range(2))
    close(run(params, dataclasses.replace(config, rotary_base=10_000.0, rotary_frequencies=frequencies)), out)
    twice = run(params._replace(output=2 * params.output), config)
    close(twice, 2 * out)
    other = TOKENS.copy()
    other[:, 1] = (other[:, 1] + 1) % V
    changed = np.abs(jax.jit(lambda t: language_model.apply(params, t, config))(other) - out).max((0, 2)) > 1e-6
    assert changed.tolist() == [False, True, True, True, False]


WRONG = {
    "no number of positions": (lambda: dataclasses.replace(BERT, max_positions=None), "max_positions must be a number"),
    "positions that are not learned": (lambda: dataclasses.replace(BERT, positions="none"), "only for them, got 7"),
    "epsilon": (lambda: dataclasses.replace(BERT, norm_epsilon=0.0), "norm_epsilon must be above 0 and finite, got 0"),
    "placement": (lambda: dataclasses.replace(BERT, placement="both"), "placement must be one of pre, post, parallel"),
    "narrow and tied": (
        lambda: language_model.Config(d_model=8, num_heads=2, num_layers=1, embedding_width=4),
        "tied must be False for tokens of another width",
    ),
    "no head": (
        lambda: encoder.apply(
            random_params(encoder.init_params, BERT)._replace(head=None), jnp.asarray(TOKENS), BERT
        ),
        "no head for masked tokens",
    ),
    "no such position": (
        lambda: embedding.apply(
            random_params(encoder.init_params, BERT).embedding, jnp.asarray(TOKENS), BERT, positions=jnp.arange(3, 8)
        ),
        "positions must be at least 0 and below 7, the number of learned positions, got 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    do, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        do()
