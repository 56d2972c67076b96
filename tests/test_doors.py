"""What a stranger writes to add one more of something, and that the library does for it what it does for its own."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from mhajax import attention, interventions, kernels, language_model, masks, norm, transformer
from mhajax.attentions import PerAttention
from mhajax.heads import ablation, surgery

NORM = norm.Config(d_model=6, norm="layer")

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
