"""JAX's own checks find nothing on any path: NaN, Inf, leaked tracers, numbers that 64 bits would widen."""

from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity_features import booleans
from reference import enable_x64, numbers, random_params
from tiers import tiered

from mhajax import attention, kernels, masks
from mhajax.kernels import Tiling, ring

B, N, K, T, S, H, HV = 2, 4, 2, 7, 11, 5, 3
# Every query of the second example is fully masked, and one of the first.
MASK = masks.lengths(np.array([9, 0])) & masks.dense(booleans(3, T, S))
PATHS = {
    "dense": parity.Path("dense"),
    "blockwise": parity.Path("blockwise", Tiling(2, 3, 4)),
    "blockwise, whole rows": parity.Path("blockwise", Tiling(8, T, S), 8),
    "ring": None,
}


def attend(name, q, k, v):
    if name != "ring":
        return parity.attend(PATHS[name], q, k, v, mask=MASK)[0]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("sequence",))
    cut = jax.sharding.PartitionSpec(None, None, "sequence")
    one = lambda q, k, v: ring.attend(q, k, v, axis_name="sequence", mask=MASK)[0]  # noqa: E731
    return jax.shard_map(one, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False)(q, k, v)


def both(name):
    """(q, k, v) → heads and the three gradients."""

    def run(q, k, v):
        heads, pull = jax.vjp(lambda *given: attend(name, *given), q, k, v)
        return heads, *pull(jnp.cos(heads))

    return jax.jit(run)


@pytest.mark.parametrize("name", tiered(PATHS, "blockwise"))
def test_every_path_passes_all_of_them(name):
    given = numbers(0, B, N, T, H), numbers(1, B, K, S, H), numbers(2, B, K, S, HV)
    with ExitStack() as modes:
        for mode in (jax.debug_nans(True), jax.debug_infs(True), jax.checking_leaks(), enable_x64()):
            modes.enter_context(mode)
        got = both(name)(*given)
        assert {a.dtype for a in got} == {jnp.dtype("float32")}


def test_splash_is_refused_where_it_cannot_be_traced():
    q, k, v = (jax.ShapeDtypeStruct((1, 4, 256, 64), jnp.float32) for _ in range(3))
    with enable_x64():
        assert "jax_enable_x64" in kernels.explain(q, k, v, platform="tpu").others["splash"]
    assert kernels.explain(q, k, v, platform="tpu").kernel == "splash"


@pytest.mark.slow
def test_the_checks_do_find_what_there_is_to_find():
    q, k, v = numbers(0, B, N, T, H), numbers(1, B, K, S, H), numbers(2, B, K, S, HV)
    v[0, 0, 0] = np.nan  # of a key that is seen
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        both("dense")(q, k, v)
    leaked = []
    with jax.checking_leaks(), pytest.raises(Exception, match="Leaked"):
        jax.jit(lambda q: leaked.append(q) or jnp.sum(attend("dense", q, k, v)))(q)


@pytest.mark.slow
def test_a_layer_passes_all_of_them():
    config = attention.Config(d_model=6, num_heads=4, num_kv_heads=2, head_dim=3, use_bias=True)
    with ExitStack() as modes:
        for mode in (jax.debug_nans(True), jax.debug_infs(True), jax.checking_leaks(), enable_x64()):
            modes.enter_context(mode)
        params = random_params(attention.init_params, config)
        x = numbers(4, B, S, 6)
        mask = masks.causal() & masks.lengths(np.array([9, 0]))
        loss = lambda params, x: jnp.sum(attention.apply(params, x, config, mask=mask) ** 2)  # noqa: E731
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
        assert {a.dtype for a in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
