"""Kernels on several devices and by compilers of other machines, in processes of their own."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_heads import HV, LENGTHS, B, H, N, S, attend, error, heads_of, normal

from mhajax import attention, kernels, masks, scores
from mhajax.kernels import choice, contract, ring, varying
from mhajax.masks import Tokens, tokens

ROOT = Path(__file__).parent.parent


def run(function, *arguments, **environment):
    """What a function of this file returns in a process of its own."""
    code = f"import json, {Path(__file__).stem} as f; print(json.dumps(f.{function}(*{arguments})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ring_results(*names):
    """Largest relative errors of the ring on 8 devices against dense, of these cases: in float64, but for one."""
    size = jax.device_count()
    assert size == 8
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("sequence",))
    cut, shared = jax.sharding.PartitionSpec(None, None, "sequence"), jax.sharding.PartitionSpec()
    t, s = size * 5, size * 7
    random = np.random.default_rng(5)
    packed = masks.segments(random.integers(0, 3, (B, t)), random.integers(0, 3, (B, s)))
    packed = masks.causal() & packed & masks.lengths(np.array([50, 0]))
    striped = [np.arange(n).reshape(-1, size).T.reshape(-1) for n in (t, s)]

    def both(attend_all, order):
        """Heads, log-sum-exp and gradients, the score's constants included."""

        def loss(q, k, v, slopes):
            heads, log_sums = attend_all(q, k, v, slopes)
            weights = normal(B, N, t, HV, seed=6)[:, :, order], normal(B, N, t, seed=8)[:, :, order]
            finite = jnp.where(log_sums == -jnp.inf, 0, log_sums)
            return jnp.sum(heads * weights[0]) + jnp.sum(finite * weights[1]), (heads, finite)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))

    def errors(mask, kernel, spoilt=False, order=None, score=True, dtype=np.float64):
        plain = order is None
        order = (np.arange(t), np.arange(s)) if plain else order
        q, k, v, slopes = (a.astype(dtype) for a in (*heads_of(t, s), normal(N, seed=9)))
        if spoilt:
            v[0, 1, 51], k[0, 2, 20] = np.nan, np.inf
        positions = [jnp.asarray(a) for a in order]
        of_score = lambda slopes: scores.slope(slopes) if score else None  # noqa: E731
        of_heads = lambda slopes: jnp.cos(slopes)[:, None, None]  # noqa: E731

        def on_ring(q, k, v, slopes):
            def one_device(q, k, v, slopes, asking, answering):
                i = jax.lax.axis_index("sequence")
                places = Tokens(i * (t // size), asking), Tokens(i * (s // size), answering)
                return ring.attend(
                    q, k, v, axis_name="sequence", mask=mask, kernel=kernel, score=of_score(slopes),
                    scale=of_heads(slopes), queries=None if plain else places[0], keys=None if plain else places[1],
                )  # fmt: skip

            along = jax.sharding.PartitionSpec("sequence")
            return jax.shard_map(
                one_device, mesh=mesh, in_specs=(cut, cut, cut, shared, along, along), out_specs=(cut, cut),
                check_vma=False,
            )(q, k, v, slopes, *positions)  # fmt: skip

        def on_one(q, k, v, slopes):
            heads, captured = kernels.attend(
                q, k, v, queries=tokens(t), keys=tokens(s), mask=mask, kernel="dense", score=of_score(slopes),
                scale=of_heads(slopes), capture=("log_sum_exp",),
            )  # fmt: skip
            return heads, captured["log_sum_exp"]

        asking, answering = order
        got = both(on_ring, asking)(q[:, :, asking], k[:, :, answering], v[:, :, answering], slopes)
        (d_q, d_k, d_v, d_slopes), seen = both(on_one, np.arange(t))(q, k, v, slopes)
        expected = (
            (d_q[:, :, asking], d_k[:, :, answering], d_v[:, :, answering], d_slopes),
            [a[:, :, asking] for a in seen],
        )
        worst = 0.0
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            if not np.array_equal(np.isnan(a), np.isnan(b)):
                return f"NaN in other places: {np.isnan(a).sum()} and {np.isnan(b).sum()}"
            worst = max(worst, float(np.nanmax(np.abs(a - b)) / max(np.nanmax(np.abs(b)), 1e-9)))
        return worst

    inside = []
    jax.eval_shape(
        jax.shard_map(
            lambda q: inside.append(choice.spread()) or q, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False
        ),
        jnp.zeros((1, 1, t, H)),
    )
    padded = masks.causal() & masks.lengths(np.array([50, 0]))
    cases = {
        "no mask, float32": lambda: errors(None, "dense", score=False, dtype=np.float32),
        "no mask, blockwise parts": lambda: errors(None, "blockwise"),
        "causal": lambda: errors(masks.causal(), "auto"),
        "causal, segments, lengths": lambda: errors(packed, "blockwise"),
        "striped": lambda: errors(masks.causal() & masks.window(9), "blockwise", order=striped),
        "NaN": lambda: errors(padded, "dense", spoilt=True, score=False),
    }
    return {"partitioned": [choice.spread(), *inside]} | {name: cases[name]() for name in names}


def on_the_ring(*names):
    eight = {"JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return run("ring_results", *names, **eight)


def test_the_ring_equals_dense_forward_and_backward():
    """And only outside of `shard_map` the compiler may partition."""
    name = "causal, segments, lengths"
    found = on_the_ring(name)
    assert found["partitioned"] == [True, False]
    assert isinstance(found[name], float) and found[name] < 1e-12, found


@pytest.mark.slow
def test_the_ring_equals_dense_in_other_cases():
    most = {
        "no mask, float32": 2e-6,
        "no mask, blockwise parts": 1e-12,
        "causal": 1e-12,
        "striped": 1e-12,
        "NaN": 1e-12,
    }
    found = on_the_ring(*most)
    assert {name: found[name] for name in most if not isinstance(found[name], float) or found[name] >= most[name]} == {}


def test_where_the_compiler_may_partition_splash_attention_is_not_picked():
    heads = jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.bfloat16)
    whole = tokens(4096)
    given = {"bias": False, "score": False, "dropout": False, "log_sum_exp": False, "cached": False}
    request = contract.Request("tpu", heads, heads, heads, None, whole, whole, **given, spread=True)
    picked = choice.choose(request)
    assert picked.kernel == "blockwise" and "shard_map" in picked.others["splash"]
    assert choice.choose(request, "splash").kernel == "splash"


def test_the_ring_takes_dense_or_blockwise_parts_only():
    with pytest.raises(ValueError, match="kernels.ring: kernel must be auto, dense or blockwise, got 'splash'"):
        ring.attend(*heads_of(), axis_name="sequence", kernel="splash")


def cut_results():
    """Largest relative errors inside `shard_map`, with its check on, against outside: heads, entropy, gradients."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    assert jax.device_count() == 2
    shared, first = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("devices")
    t = 12
    q, k, v, slopes = *heads_of(t, k=2), normal(N, seed=9)
    every = {"lengths": jnp.asarray(LENGTHS), "places": jnp.arange(t)}
    vary = functools.partial(varying.over, {"devices"})

    def errors(cuts, kernel, mask, look=True, score=False):
        """The axes along which q and the positions, and k, v and lengths are cut."""

        def local(q, k, v, slopes, lengths, places, inside=True):
            of_score = {"score": scores.slope(vary(slopes) if inside else slopes)} if score else {}
            heads, seen = kernels.attend(
                q, k, v, queries=Tokens(0, places), keys=tokens(S), mask=mask(lengths), kernel=kernel, **of_score,
                capture=("entropy",) if look else (),
            )  # fmt: skip
            return heads, *seen.values()

        def both(function):
            def of_arrays(*arrays):
                out, pull = jax.vjp(lambda *a: function(*a, every["lengths"], every["places"]), *arrays)
                return out, pull(
                    jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), out)
                )

            return jax.tree.leaves(jax.jit(of_arrays)(q, k, v, slopes))

        spread = jax.shard_map(local, mesh=mesh, in_specs=cuts, out_specs=cuts[0])
        return max(map(error, both(spread), both(functools.partial(local, inside=False))))

    rows = jax.sharding.PartitionSpec(None, None, "devices")
    batch, queries = (first, first, first, shared, first, shared), (rows, shared, shared, shared, shared, first)
    heads = (*[jax.sharding.PartitionSpec(None, "devices")] * 3, *[shared] * 3)
    nobody, causal, padded = (lambda _: None), (lambda _: masks.causal()), masks.lengths
    found = {}
    for path in ("dense", "blockwise"):
        found[f"{path}, batch"] = errors(batch, path, padded)
        found[f"{path}, batch, nothing is looked at"] = errors(batch, path, nobody, look=False)
        found[f"{path}, queries"] = errors(queries, path, causal)
        found[f"{path}, heads"] = errors(heads, path, padded)
        found[f"{path}, batch, score"] = errors(batch, path, causal, score=True)

    config = attention.Config(d_model=8, num_heads=2)
    params, x = attention.init_params(jax.random.key(0), config), normal(B, 20, 8, seed=3)

    def loss(params, x):
        return jnp.sum(jnp.sin(attention.apply(params, x, config, mask=masks.causal())))

    def of_all(params, x):
        of_mine = lambda params, x: jax.lax.psum(loss(params, x), "devices")  # noqa: E731
        return jax.shard_map(of_mine, mesh=mesh, in_specs=(shared, first), out_specs=shared)(params, x)

    gradients = [jax.tree.leaves(jax.jit(jax.grad(function))(params, x)) for function in (of_all, loss)]
    found["a layer, batch"] = max(map(error, *gradients))

    vary = lambda a: a  # noqa: E731
    try:
        errors(batch, "blockwise", causal, score=True)
    except ValueError as refused:
        found["refused"] = str(refused)
    return found


@pytest.fixture(scope="module")
def cut_over_devices():
    return run("cut_results", JAX_NUM_CPU_DEVICES="2", JAX_ENABLE_X64="1", JAX_DISABLE_MOST_OPTIMIZATIONS="1")


@pytest.mark.slow
def test_inside_shard_map_with_its_check_the_numbers_are_those_outside(cut_over_devices):
    refused = cut_over_devices.pop("refused")
    assert len(cut_over_devices) == 11
    assert {name: e for name, e in cut_over_devices.items() if not e < 2e-6} == {}
    assert "float32[6] that is the same on all devices" in refused and "check_vma=False" in refused


def tpu_results():
    """Temporary memory in MiB of forward and backward compiled for one TPU v5e chip; None: it does not compile."""
    from jax.experimental import topologies

    def chips(name, **options):
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices

    one = jax.sharding.SingleDeviceSharding(chips("v5e:1x1", chips_per_host_bounds=(1, 1, 1))[0])

    def memory(function, sharding, *shapes):
        def both(q, k, v, d):
            out, pull = jax.vjp(function, q, k, v)
            return out, pull(d)

        given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        try:
            compiled = jax.jit(both).lower(*given, given[0]).compile()
        except jax.errors.JaxRuntimeError as refused:
            assert "RESOURCE_EXHAUSTED" in str(refused)
            return None
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    def of_jax(q, k, v):
        turned = (jnp.moveaxis(a, 1, 2) for a in (q, k, v))
        return jnp.moveaxis(jax.nn.dot_product_attention(*turned, is_causal=True), 1, 2)

    mask = masks.causal() & masks.lengths(jnp.array([5000]))
    found = {}
    for t in (8192, 32768):
        heads = [(1, 8, t, 64)] * 3
        found[f"splash {t}"] = memory(attend(t, t, mask=mask, kernel="splash"), one, *heads)
        found[f"blockwise {t}"] = memory(attend(t, t, mask=mask, kernel="blockwise"), one, *heads)
        found[f"jax.nn {t}"] = memory(of_jax, one, *heads)
    mesh = jax.sharding.Mesh(np.array(chips("v5e:2x2")).reshape(4), ("heads",))
    cut = jax.sharding.PartitionSpec(None, "heads")
    spread = jax.shard_map(
        attend(1000, 1000, mask=masks.causal(), kernel="splash"),
        mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False,
    )  # fmt: skip
    sharding = jax.sharding.NamedSharding(mesh, cut)
    found["splash in shard_map"] = memory(spread, sharding, (2, 8, 1000, 64), *[(2, 4, 1000, 64)] * 2)
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs, libtpu, is not installed"
)
def test_compiled_for_a_tpu_memory_grows_with_length():
    found = run("tpu_results", XLA_FLAGS="", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    for path in ("splash", "blockwise"):
        assert found[f"{path} 8192"] < found["jax.nn 8192"] / 16
        assert found[f"{path} 32768"] < 1024
    assert found["jax.nn 32768"] is None  # does not fit
    assert found["splash in shard_map"] is not None
