"""Masks of one's own, which define `block` and nothing else."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

from mhajax import kernels, masks
from mhajax.interventions import Capture
from mhajax.kernels import blockwise, dense, ring
from mhajax.kernels.contract import Inputs

B, N, T, S = 2, 3, 5, 7
_random = np.random.default_rng(0)
PAIRS = _random.random((T, S)) < 0.5


class Third(masks.Mask):
    step: int

    def block(self, queries, keys):
        q, k = masks.positions(queries, keys)
        return (k <= q) & ((q - k) % self.step == 0)


class Ranks(masks.Mask):
    """By index, by example and by head: cut out, which would be wrong if it were asked about what is not there."""

    ranks: jax.Array  # [B or 1, N or 1, T]

    def block(self, queries, keys):
        q, k = (jax.lax.dynamic_slice_in_dim(self.ranks, run.start, run.size, -1) for run in (queries, keys))
        return q[..., :, None] >= k[..., None, :]


LONG = 13
RANKS = jnp.asarray(_random.integers(0, 5, (B, N, LONG)))
OWN = {
    "by position": Third(3),
    "by index": Ranks(RANKS),
    "by head": Ranks(RANKS[:1]),
    "combined": masks.causal() & Ranks(RANKS[:, :1]) | ~Third(2) & masks.lengths(np.array([9, 13])),
}


def written_out(mask):
    return masks.dense(jnp.broadcast_to(masks.as_array(mask, LONG, LONG), (B, N, LONG, LONG)))


@pytest.mark.parametrize("tiling", tiered([[3, 4, 5], [2, 16, 13]], [3, 4, 5]), ids=str)
@pytest.mark.parametrize("name", tiered(OWN, "combined"))
def test_a_mask_that_only_defines_block_is_evaluated_by_tiles(name, tiling):
    """Tiles that do not fit, tiles larger than all: the numbers of the dense path, with the pairs written out."""
    q, places = jax.random.normal(jax.random.key(0), (B, N, LONG, 4)), masks.tokens(LONG)

    @jax.jit
    def run(mask):
        def gradient(attend: Any, mask, **options):
            def loss(q):
                heads, _ = attend(Inputs(q, q, q, places, places, mask, scale=0.5, **options))
                return jnp.sum(heads**2), heads

            return jax.grad(loss, has_aux=True)(q)

        tiled = gradient(blockwise.attend, mask, tiling=kernels.Tiling(*tiling))
        return tiled, gradient(dense.attend, written_out(mask))

    chex.assert_trees_all_close(*run(OWN[name]), rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("name", tiered(OWN, "combined"))
def test_a_mask_that_only_defines_block_is_captured_by_rows_and_goes_round_a_ring(name):
    q, places = jax.random.normal(jax.random.key(1), (B, N, LONG, 4)), masks.tokens(LONG)
    some = Capture(("weights", "entropy"), heads=(2, 0), rows=(12, 1, 5))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("sequence",))
    cut: Any = jax.sharding.PartitionSpec(None, None, "sequence", None)

    @jax.jit
    def run(mask):
        _, captured = kernels.attend(q, q, q, queries=places, keys=places, mask=mask, capture=some)
        around = lambda q: ring.attend(q, q, q, axis_name="sequence", mask=mask, kernel="blockwise")[0]  # noqa: E731
        return captured, jax.shard_map(around, mesh=mesh, in_specs=(cut,), out_specs=cut, check_vma=False)(q)

    chex.assert_trees_all_close(run(OWN[name]), run(written_out(OWN[name])), atol=1e-6)


def test_a_mask_that_only_defines_block_never_holds_all_pairs():
    """No array of T × S, forward and backward, where indices are static: memory grows with T."""
    long = 2048
    x = jax.ShapeDtypeStruct((1, 1, long, 4), jnp.float32)

    def loss(x, mask):
        return kernels.attend(x, x, x, queries=masks.tokens(long), keys=masks.tokens(long), mask=mask)[0].sum()

    for mask in (Third(3), Third(3) & ~masks.window(2)):
        largest = max(sizes_in(jax.make_jaxpr(jax.grad(loss))(x, mask).jaxpr))
        assert 256 * 256 <= largest <= long * long // 16
    assert masks.known_tiles(Third(3) & masks.window(0), *[masks.tokens(long)] * 2, 512, 512).nonempty.sum() == 4


def sizes_in(program):
    """Numbers in every array that a program makes, and those that it calls."""
    for equation in program.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


def test_a_mask_knows_what_it_looks_up_by_index():
    """Queries and keys: what a cache asks."""
    assert [OWN[name].indexed() for name in OWN] == [(False, False), *[(True, True)] * 3]
    one_key, length = masks.dense(PAIRS[:, :1]), masks.lengths(3)
    assert one_key.indexed() == (True, False) and length.indexed() == (False, True)
    assert (one_key | ~length).indexed() == masks.segments(np.arange(T)).indexed() == (True, True)
    assert (masks.prefix(3) & masks.causal() | masks.function(lambda q, k: q == k)).indexed() == (False, False)


def test_a_new_mask_defines_one_thing():
    with pytest.raises(NotImplementedError, match="Mask must define block"):
        masks.Mask().block(masks.tokens(T), masks.tokens(S))
    assert repr(~Third(3) & masks.causal()) == "~Third(3) & causal()"
    assert masks.conditions(Third(3) & masks.window(4)).window == (4, 0)
    with pytest.raises(AttributeError, match="cannot assign"):
        Third(3).step = 4  # pyright: ignore[reportAttributeAccessIssue]
