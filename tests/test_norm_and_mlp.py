"""Norms and feed-forwards against NumPy, with their derivatives."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from reference import enable_x64, numbers, random_params

from mhajax import mlp, norm

pytestmark = pytest.mark.usefixtures("quick_compiles")

D = 10
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind):
    x = numbers(0, 3, D) + 2
    config = norm.Config(d_model=D, norm=kind, norm_epsilon=0.5)
    params = random_params(norm.init_params, config)
    centred = np.float64(x) - (np.mean(x, -1, keepdims=True) if kind == "layer" else 0)
    expected = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 0.5) * params.scale
    close(norm.apply(params, x, config), expected + (0 if params.shift is None else params.shift))
    assert norm.apply(params, jnp.bfloat16(x), config).dtype == jnp.bfloat16
    assert (params.shift is None) == (kind == "rms")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", get_args(mlp.Activation))
def test_feed_forward(activation, bias):
    config = mlp.Config(d_model=D, activation=activation, mlp_bias=bias)
    params = random_params(mlp.init_params, config)
    gated = activation in ("reglu", "geglu", "geglu_tanh", "swiglu")
    assert params.w_in.shape == (D, 4 * D) and (params.w_gate is not None) == gated
    assert (params.b_in is None) == (params.b_out is None) == (not bias)
    x = numbers(0, 3, D)
    before = np.float64(x) @ params.w_in + (params.b_in if bias else 0)
    bend = {
        "relu": lambda a: np.maximum(a, 0),
        "gelu": lambda a: a * scipy.stats.norm.cdf(a),
        "gelu_tanh": lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
        "silu": lambda a: a / (1 + np.exp(-a)),
    }
    of_gate = {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}
    hidden = bend[of_gate.get(activation, activation)](before) * (
        x @ params.w_gate + (params.b_gate if bias else 0) if gated else 1
    )
    close(mlp.apply(params, x, config), hidden @ params.w_out + (params.b_out if bias else 0))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rms", "layer", "gelu", "swiglu"])
def test_norm_and_feed_forward_have_the_derivative_of_their_value(part):
    """Both modes against central differences in float64: some of their derivatives are written by hand."""
    apply, params = {
        "rms": lambda: normalisation("rms"),
        "layer": lambda: normalisation("layer"),
        "gelu": lambda: feed_forward("gelu"),
        "swiglu": lambda: feed_forward("swiglu"),
    }[part]()
    with enable_x64():
        at, along = ((jax.tree.map(np.float64, params), np.float64(numbers(1, 2, 3, D)) + 2) for _ in range(2))
        along = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), along)
        cotangent = np.random.default_rng(3).normal(size=(2, 3, D))
        value = jax.jit(lambda given: jnp.sum(apply(*given) * cotangent))
        moved = lambda step: value(jax.tree.map(lambda a, d: a + step * d, at, along))  # noqa: E731
        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        gradient = jax.jit(jax.grad(value))(at)
        backward = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
        forward = jax.jit(lambda: jax.jvp(value, (at,), (along,))[1])()
    np.testing.assert_allclose([backward, forward], slope, rtol=1e-6)


def normalisation(kind):
    config = norm.Config(d_model=D, norm=kind)
    return partial(norm.apply, config=config), random_params(norm.init_params, config)


def feed_forward(activation):
    config = mlp.Config(d_model=D, activation=activation)
    return partial(mlp.apply, config=config), random_params(mlp.init_params, config)
