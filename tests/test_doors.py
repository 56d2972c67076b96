"""What a stranger writes to add one more of something, and that the library does for it what it does for its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from mhajax import attention, masks, norm, transformer
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
