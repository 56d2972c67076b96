"""What a stranger writes to add one more of something, and that the library does for it what it does for its own."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params
from tiers import tiered

from mhajax import attention, interventions, kernels, language_model, masks, norm, scores, transformer
from mhajax.attentions import PerAttention
from mhajax.heads import ablation, surgery

NORM = norm.Config(d_model=6, norm="layer")

# A mask: every third position backwards, by the one method that a mask must define ----------------------------------


class EveryThird(masks.Mask):
    def block(self, queries, keys):
        q, k = masks.positions(queries, keys)
        return (k <= q) & ((q - k) % 3 == 0)


def test_a_mask_of_ones_own_is_one_method():
    config = attention.Config(d_model=6, num_heads=3)
    params, x = random_params(attention.init_params, config), jax.random.normal(jax.random.key(0), (2, 13, 6))
    run = jax.jit(lambda mask, kernel: attention.apply(params, x, config, mask=mask, kernel=kernel), static_argnums=1)
    gaps = np.arange(13)[:, None] - np.arange(13)
    pairs = (gaps >= 0) & (gaps % 3 == 0)
    for mask, allowed in {
        EveryThird(): pairs,
        masks.causal() & ~EveryThird(): (gaps >= 0) & ~pairs,
        EveryThird() & masks.window(6) | masks.prefix(1): pairs & (gaps <= 6) | (np.arange(13) < 1),
    }.items():
        expected = run(allowed, "dense")
        for kernel in ("dense", "blockwise"):
            np.testing.assert_allclose(run(mask, kernel), expected, atol=2e-6)


def test_a_mask_of_ones_own_is_drawn():
    assert (EveryThird() & masks.window(3)).show(5).splitlines() == [
        "EveryThird() & window(before=3): 5 queries (down) × 5 keys", "█····", "·█···", "··█··", "█··█·", "·█··█"
    ]  # fmt: skip


@pytest.mark.parametrize("rolling", tiered([False, True], True))
def test_a_mask_of_ones_own_in_a_language_model_and_its_cache(rolling):
    config = language_model.Config(vocab_size=11, d_model=6, num_heads=3, num_layers=2)
    params = random_params(language_model.init_params, config)
    tokens = np.random.default_rng(0).integers(11, size=(2, 9))
    window = masks.window(4) if rolling else masks.causal()
    expected = jax.jit(lambda mask: language_model.apply(params, tokens, config, mask=mask))(EveryThird() & window)
    extend = jax.jit(lambda part, state: language_model.extend(params, part, state, config, mask=EveryThird()))
    state, found = language_model.init_cache((2,), 5 if rolling else 9, config, rolling=rolling), []
    for part in np.split(tokens, range(4, 9), axis=1):
        logits, state = extend(part, state)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5)


# A score function: heads that forget, each at its own rate ----------------------------------------------------------


def forgetting(rates):
    def score(score, head, q_position, k_position):
        return score - scores.at_head(rates, head, "forgetting") * jnp.log1p(jnp.abs(q_position - k_position))

    return score


RATES = np.array([0.1, 2.0, 0.5], np.float32)


def test_a_score_function_of_ones_own_works_on_every_path_and_has_a_gradient():
    config = attention.Config(d_model=6, num_heads=3)
    params, x = random_params(attention.init_params, config), jax.random.normal(jax.random.key(0), (2, 13, 6))

    @partial(jax.jit, static_argnames="kernel")
    def run(rates, kernel):
        def loss(rates):
            out, seen = attention.apply_captured(
                params, x, config, score=forgetting(rates), mask=masks.causal(), kernel=kernel, capture=("weights",)
            )
            return jnp.sum(out**2), (out, seen["weights"])

        return jax.grad(loss, has_aux=True)(rates)

    dense, tiled = run(RATES, "dense"), run(RATES, "blockwise")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), dense, tiled)
    gaps = np.abs(np.arange(13)[:, None] - np.arange(13))
    _, logits = attention.apply_captured(params, x, config, mask=masks.causal(), capture=("logits",))
    expected = jax.nn.softmax(logits["logits"] - RATES[:, None, None] * np.log1p(gaps), axis=-1)
    np.testing.assert_allclose(dense[1][1], expected, atol=1e-6)
    assert np.all(dense[0] != 0)


@pytest.mark.parametrize("kernel", ["dense", "blockwise"])
def test_a_score_function_of_ones_own_for_another_number_of_heads_is_refused(kernel):
    config = attention.Config(d_model=8, num_heads=4)
    params, x = random_params(attention.init_params, config), jnp.ones((2, 13, 8))
    with pytest.raises(ValueError, match="forgetting: must be made for N=4 heads, .* got 3"):
        attention.apply(params, x, config, score=forgetting(RATES), kernel=kernel)


# A model: two attentions one after the other, each normalised after it is added (Vaswani et al. 2017) --------------


class Params(NamedTuple):
    near: attention.Params
    far: attention.Params
    norms: norm.Params


def init_params(key, config):
    near, far = jax.random.split(key)
    return Params(attention.init_params(near, config), attention.init_params(far, config), norm.init_params(None, NORM))


def apply(params, x, config, gates=(None, None)):
    for one, gate in zip((params.near, params.far), gates, strict=True):
        x = norm.apply(params.norms, x + attention.apply(one, x, config, gates=gate), NORM)
    return x


def attentions(params):
    return {"near": params.near, "far": params.far}


def with_attentions(params, changed):
    return params._replace(**changed)


CONFIG = attention.Config(d_model=6, num_heads=3)


def test_a_model_of_ones_own_has_surgery():
    params, x = random_params(init_params, CONFIG), jnp.ones((2, 5, 6)) + jnp.arange(5)[:, None]
    keep = PerAttention(near=np.array([True, False, True]), far=np.array([False, True, True]))
    small, config = surgery.prune(params, CONFIG, keep)
    assert config.num_heads == 2 and small.far.w_q.shape == (2, 6, 2)
    gates = [jnp.asarray(keep[name], jnp.float32) for name in ("near", "far")]
    np.testing.assert_allclose(apply(small, x, config), apply(params, x, CONFIG, gates), rtol=0, atol=1e-6)
    turned = surgery.permute(params, PerAttention(near=np.array([2, 0, 1])))
    np.testing.assert_allclose(apply(turned, x, CONFIG), apply(params, x, CONFIG), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="any of the attentions near, far, got attention"):
        surgery.prune(params, CONFIG, PerAttention(attention=np.ones(3, bool)))


class Other(NamedTuple):
    near: object


def test_a_model_of_ones_own_has_its_heads_removed_one_by_one():
    """A stack of ours inside a model of one's own: it says its stages, by its own names."""
    config = transformer.Config(d_model=6, num_heads=3, num_layers=2, d_ff=5)
    params, x = random_params(transformer.init_params, config), jnp.ones((2, 5, 6)) + jnp.arange(5)[:, None]
    stage = transformer.Stage(params, config, x, {"mask": masks.causal()}, {"attention": "mine"})
    loss = lambda features: jnp.sum(features**3, (-2, -1))  # noqa: E731
    found = jax.jit(lambda: ablation.of_stages([stage], loss))()
    gates = PerAttention(mine=jnp.ones((2, 3)).at[1, 2].set(0))
    without = jax.jit(lambda gates: loss(transformer.run_stage(stage, (), gates=gates)[0]))(gates)
    np.testing.assert_allclose(found.mine[1, :, 2], without, rtol=1e-5)


def test_who_says_nothing_of_its_attentions_is_refused():
    with pytest.raises(TypeError, match=r"another module that has attentions\(params\) .*, got test_doors.Other"):
        surgery.prune(Other(1), CONFIG, np.ones(3, bool))


# A kernel path: every logit in four lines of jnp, no bias ------------------------------------------------------------


class Plain:
    """Heads in half the words of ours: it has no bias and no dropout, and gives no log-sum-exp."""

    def refusal(self, request):
        return "plain attention has no bias" if request.bias else "it has no dropout" if request.dropout else ""

    def reluctance(self, request):
        return "it is for a test"

    def attend(self, inputs):
        q, k, v = inputs.q, *(jnp.repeat(a, inputs.q.shape[-3] // a.shape[-3], axis=-3) for a in inputs[1:3])
        logits = jnp.einsum("...th,...sh->...ts", q, k) * inputs.scale
        if inputs.mask is not None:
            logits = jnp.where(inputs.mask.block(inputs.queries, inputs.keys), logits, -jnp.inf)
        return jax.nn.softmax(logits) @ v, None


def test_a_kernel_path_of_ones_own_in_attention():
    config, x = attention.Config(d_model=6, num_heads=3, num_kv_heads=1), jnp.sin(jnp.arange(60.0)).reshape(2, 5, 6)
    params, plain = random_params(attention.init_params, config), Plain()
    options = {"mask": masks.causal(), "gates": jnp.array([1.0, 0.5, 0.0])}
    capture = ("weights", "log_sum_exp", "heads", "entropy")
    run = lambda kernel: jax.jit(  # noqa: E731
        lambda x: attention.apply_captured(params, x, config, capture=capture, kernel=kernel, **options)
    )(x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6), run(plain), run("dense"))
    jitted = jax.jit(attention.apply, static_argnames=("config", "kernel"))
    np.testing.assert_allclose(jitted(params, x, config, kernel=plain), jitted(params, x, config), rtol=0, atol=2e-6)
    for error, options in (
        ("kernel='Plain' cannot do this: plain attention has no bias; use .* dense", {"bias": jnp.ones((5, 5))}),
        ("kernel='Plain' cannot do this: a patch .* needs whole rows", {"intervention": interventions.uniform()}),
    ):
        with pytest.raises(ValueError, match=error):
            attention.apply(params, x, config, kernel=plain, **options)


@pytest.mark.slow
def test_a_kernel_path_of_ones_own_in_a_language_model():
    config = language_model.Config(d_model=6, num_heads=3, num_layers=2, vocab_size=7, d_ff=5)
    params, tokens = random_params(language_model.init_params, config), jnp.array([[1, 5, 2, 2, 6]])
    loss = lambda kernel: lambda params: jnp.sum(language_model.apply(params, tokens, config, kernel=kernel) ** 2)  # noqa: E731
    got, expected = (jax.jit(jax.grad(loss(kernel)))(params) for kernel in (Plain(), "dense"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


def test_a_kernel_path_of_ones_own_is_explained_and_what_is_none_is_refused():
    q = jax.ShapeDtypeStruct((2, 3, 5, 2), jnp.float32)
    said = str(kernels.explain(q, q, q, kernel=Plain(), platform="cpu")).splitlines()
    assert said[0] == "Plain: asked for, though it is for a test" and len(said) == 1 + len(kernels.NAMES)
    with pytest.raises(TypeError, match=r"kernels: kernel must be auto, one of .*; got a test_doors.Other without ref"):
        kernels.explain(q, q, q, kernel=Other(1))
    wrong = type("Wrong", (Plain,), {"attend": lambda self, inputs: inputs.v})()
    with pytest.raises(ValueError, match=r"attend of kernel='Wrong' must return heads \[2, 3, 5, 2\] and a LogSumExp"):
        kernels.attend(*[jnp.ones(q.shape)] * 3, kernel=wrong)
