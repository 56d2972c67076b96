"""What a stranger writes to add one more of something, and that the library does for it what it does for its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params

from mhajax import attention, norm
from mhajax.block import Gates
from mhajax.heads import surgery

# A model: two attentions one after the other, each normalised after it is added (Vaswani et al. 2017) --------------


class Params(NamedTuple):
    near: attention.Params
    far: attention.Params
    norms: norm.Params


class Both(NamedTuple):
    near: object
    far: object


def init_params(key, config):
    near, far = jax.random.split(key)
    return Params(attention.init_params(near, config), attention.init_params(far, config), norm.init_params(6, "layer"))


def apply(params, x, config, gates=(None, None)):
    for one, gate in zip((params.near, params.far), gates, strict=True):
        x = norm.apply(params.norms, x + attention.apply(one, x, config, gates=gate))
    return x


def attentions(params):
    return {"near": params.near, "far": params.far}


def with_attentions(params, changed):
    return params._replace(**changed)


CONFIG = attention.Config(d_model=6, num_heads=3)


def test_a_model_of_ones_own_has_surgery():
    params, x = random_params(init_params, CONFIG), jnp.ones((2, 5, 6)) + jnp.arange(5)[:, None]
    keep = Both(np.array([True, False, True]), np.array([False, True, True]))
    small, config = surgery.prune(params, CONFIG, keep)
    assert config.num_heads == 2 and small.far.w_q.shape == (2, 6, 2)
    gates = Both(*(jnp.asarray(kept, jnp.float32) for kept in keep))
    np.testing.assert_allclose(apply(small, x, config), apply(params, x, CONFIG, gates), rtol=0, atol=1e-6)
    turned = surgery.permute(params, Both(np.array([2, 0, 1]), None))
    np.testing.assert_allclose(apply(turned, x, CONFIG), apply(params, x, CONFIG), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="given for attention, but params have no such attention, only near, far"):
        surgery.prune(params, CONFIG, Gates(np.ones(3, bool)))


def test_who_says_nothing_of_its_attentions_is_refused():
    with pytest.raises(TypeError, match=r"another module that has attentions\(params\) .*, got test_doors.Both"):
        surgery.prune(Both(1, 2), CONFIG, np.ones(3, bool))
