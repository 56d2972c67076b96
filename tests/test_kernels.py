"""The kernels: every feature on every path against loops in float64 (docs/parity.md), what is chosen, what it costs."""

import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity import COMPUTED, FEATURES, REFUSED
from parity_features import CASES, CAUSAL, Sizes, booleans
from reference import numbers
from tiers import tiered

from mhajax import attention, dropout, kernels, masks, scores
from mhajax.kernels import Inputs, Tiling, choice, contract
from mhajax.kernels.blockwise import layout
from mhajax.kernels.rules import Rules

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "parity.md"
EVERYTHING = "dropout, mask, bias, score"

CELLS = [(path, name) for name in FEATURES for path in COMPUTED]
# One case of every promise, on the definition and in tiles; the page says what all of them do.
TILES = "blockwise, several tiles"
PROMISES = {
    "dense": (
        "dropout, mask, bias, score", "NaN, Inf in masked keys, values", "`cached=True`",
        "forward mode: `jvp`, `hessian`",
    ),
    TILES: (
        "bias with -inf and its gradient, mask", "score of your own, gradient of what it closes over",
        "dropout, mask, bias, score", "a query with nothing to attend to", "NaN, Inf in masked keys, values",
        "NaN, Inf in a visible key, value, query", "`cached=True`",
    ),
    "blockwise, all heads at once": ("bfloat16",),
}  # fmt: skip
ALWAYS = [(path, name) for path, names in PROMISES.items() for name in names]

WRITING = bool(os.environ.get("MHAJAX_WRITE"))
OUTDATED = "docs/parity.md is not what the paths do; its first lines say how it is written anew"


def said(name, path):
    """What the page says of a path that runs here."""
    row = next((line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} | ")), "")
    return dict(zip(COMPUTED, row.removeprefix(f"| {name} | ").split(" | "), strict=False)).get(path, "nothing")


# The matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path, name", tiered(CELLS, *ALWAYS))
def test_a_feature_on_a_path(path, name):
    cell = parity.computed(name, path)
    assert WRITING or cell == said(name, path), OUTDATED


def test_the_page_has_every_row_and_what_other_platforms_can_do():
    table = parity.table(parity.computed if WRITING else said)
    if WRITING:
        PAGE.write_text(table)
    assert PAGE.read_text() == table, OUTDATED


def test_the_page_claims_of_the_ring_what_its_test_shows():
    source = (ROOT / "tests" / "test_kernels_devices.py").read_text()
    assert [case for case in parity.RING.values() if f'"{case}": lambda: errors(' not in source] == []
    assert set(parity.RING) <= set(FEATURES) and set(parity.SPECIAL) <= set(FEATURES)
    assert set.union(*REFUSED.values()) <= set(FEATURES)


@pytest.mark.parametrize("name", [EVERYTHING, "sinks and their gradient", "`vmap` over gates", "score: soft cap"])
def test_the_loops_have_the_gradient_of_their_value(name):
    case = CASES[name]._replace(dtype="float64")
    *given, d_out, d_log_sums = parity.inputs(case)
    given = tuple(given)
    along = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), given)

    def value(sign):
        moved = jax.tree.map(lambda a, d: a + sign * 1e-6 * d, given, along)
        heads, log_sums = parity.loops(case, *moved, d_out, d_log_sums)[:2]
        return np.sum(heads * d_out) + np.sum(np.where(np.isneginf(log_sums), 0, log_sums) * d_log_sums)

    q, k, v, extras = along
    directions = [q, k, v, *(extras[name] for name in sorted(extras))]
    gradients = parity.loops(case, *given, d_out, d_log_sums)[2:]
    slope = sum(np.sum(g * d) for g, d in zip(gradients, directions, strict=True))
    np.testing.assert_allclose((value(1) - value(-1)) / 2e-6, slope, rtol=1e-7)


OTHER_TILINGS = [(1, 5, 6), (2, 4, 17), (4, 7, 6), (99, 13, 6), (99, 4, 17), (1, 13, 17)]
IN_TILES = [name for name in FEATURES if name not in REFUSED["blockwise"]]
# Every feature is on the page in two; here every third is in one more, and every tiling has three of them.
TILED = [(name, OTHER_TILINGS[i % 6]) for i, name in enumerate(IN_TILES[::3])]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tiling"), TILED, ids=str)
def test_features_in_other_tilings(name, tiling):
    case, (items, rows, columns) = FEATURES[name].case, tiling
    FEATURES[name].check(parity.Path("blockwise", Tiling(min(items, case.items), rows, columns)), case)


# What the compiler makes of it with all its optimisations ------------------------------------------------------------


def attend(t, s, kernel="blockwise", **options):
    """A function of q, k, v."""
    places = {"queries": masks.tokens(t), "keys": masks.tokens(s)}
    return lambda q, k, v: kernels.attend(q, k, v, kernel=kernel, **places, **options)[0]


def with_gradient(function):
    def both(q, k, v):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(jnp.sin(1 + jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return both


@pytest.mark.slow
def test_everything_at_once_fully_optimised(full_compiles, monkeypatch):
    monkeypatch.setattr(parity, "quick", full_compiles)
    parity.against_loops(parity.Path("blockwise", Tiling(2, 5, 6)), CASES[EVERYTHING])


@pytest.mark.slow
def test_everything_at_once_in_64_bits(monkeypatch):
    monkeypatch.setitem(parity.BOUNDS, "float64", "1e-9")  # the loops have their slopes from differences
    parity.against_loops(parity.Path("blockwise", Tiling(2, 5, 6)), CASES[EVERYTHING]._replace(dtype="float64"))


@pytest.mark.slow
def test_a_score_may_close_over_traced_integers_and_booleans():
    def loss(table, kernel, places, near):
        score = lambda x, head, q, k: jnp.where(near[q, k], x, table[places[k]])  # noqa: E731
        return jnp.sum(
            jnp.sin(attend(7, 9, kernel, score=score)(*(numbers(i, 2, n, 4) for i, n in enumerate((7, 9, 9)))))
        )

    given = jnp.arange(9, dtype=jnp.uint32)[::-1], jnp.asarray(booleans(3, 7, 9))
    gradient = parity.quick(jax.grad(loss), static_argnums=1)
    got, expected = (gradient(jnp.sin(jnp.arange(9.0)), kernel, *given) for kernel in ("blockwise", "dense"))
    assert np.all(expected != 0)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_a_scale_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"scale must broadcast to \[\.\.\., N, T, 1\] = \(2, 7, 1\), got \(3,\)"):
        attend(7, 9, scale=np.ones(3))(*(numbers(i, 2, n, 4) for i, n in enumerate((7, 9, 9))))


@pytest.mark.slow
def test_a_long_odd_sequence_in_the_tiles_that_are_chosen():
    t, s = 1031, 1033
    given = numbers(1, 2, 2, t, 8), numbers(2, 2, 1, s, 8), numbers(3, 2, 1, s, 3)
    mask = masks.causal() & masks.lengths(np.array([997, 0]))
    both = (with_gradient(attend(t, s, path, mask=mask)) for path in ("blockwise", "dense"))
    got, expected = (parity.quick(function)(*given) for function in both)
    assert choice.choose(request(t=t, s=s, mask=mask)).tiling.block_q < t
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())
        assert not np.any(a[1])  # nothing to attend to


@pytest.mark.slow
def test_looking_changes_no_bit_of_the_output_fully_optimised(full_compiles, monkeypatch):
    monkeypatch.setattr(parity, "quick", full_compiles)
    parity.looking(parity.Path("blockwise", Tiling(2, 5, 6)), CASES["capture of weights, logits"])


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [None, (1, 5, 6), (8, 13, 6)], ids=str)
def test_the_same_weights_are_dropped_everywhere(tiling):
    """With equal weights and values that are unit vectors, an output says which weights stayed."""
    b, n, _, t, s, h, _ = Sizes()
    key = jax.random.key(5)
    path = parity.Path("dense") if tiling is None else parity.Path("blockwise", Tiling(*tiling))
    q, k, v = np.zeros((b, n, t, h), np.float32), numbers(1, b, n, s, h), np.eye(s, dtype=np.float32)
    out, _ = parity.quick(
        lambda q, k, v: parity.attend(path, q, k, v, dropout_rate=0.4, dropout_key=key)
    )(q, k, np.broadcast_to(v, (b, n, s, s)))  # fmt: skip
    np.testing.assert_array_equal(out > 0, dropout.keep(key, 0.4, (b, n, t, s)))
    np.testing.assert_allclose(np.max(out), 1 / (s * 0.6), rtol=1e-6)


# What is chosen -----------------------------------------------------------------------------------------------------


def request(platform="cpu", b=1, n=8, t=4096, s=4096, h=64, dtype=jnp.float32, **options):
    heads = [jax.ShapeDtypeStruct((b, n, length, h), dtype) for length in (t, s, s)]
    given = {
        "mask": None, "queries": masks.tokens(t), "keys": masks.tokens(s), "bias": False, "score": False,
        "dropout": False, "log_sum_exp": False, "cached": False, "rules": Rules(keys_at_once=512),
    }  # fmt: skip
    return contract.Request(platform, *heads, **given | options)


HALF = {"dtype": jnp.bfloat16}
CHOICES = {
    "long": (request(), "blockwise"),
    "with everything": (request(mask=masks.causal(), bias=True, score=True, dropout=True), "blockwise"),
    "short": (request(t=8, s=8), "dense"),
    "long queries, few keys": (request(s=8), "blockwise"),
    "long queries, very few keys": (request(s=7), "dense"),
    "few logits": (request(b=2, t=32, s=32), "dense"),
    "more logits": (request(b=3, t=32, s=32), "blockwise"),
    "cached": (request(cached=True), "dense"),
    "no key": (request(t=256, s=0), "dense"),
    "one query": (request(t=1), "dense"),
    "no example": (request(b=0), "dense"),
    "GPU, 256 keys": (request("gpu", t=256, s=256), "blockwise"),
    "TPU, 256 keys": (request("tpu", t=256, s=256), "splash"),
    "GPU": (request("gpu", **HALF), "cudnn"),
    "GPU, float32": (request("gpu"), "blockwise"),
    "GPU, dropout": (request("gpu", dropout=True, **HALF), "blockwise"),
    "GPU, short": (request("gpu", t=8, s=8, **HALF), "dense"),
    "GPU, the sums": (request("gpu", log_sum_exp=True, **HALF), "blockwise"),
    "TPU": (request("tpu", mask=masks.causal()), "splash"),
    "TPU, several devices": (request("tpu", spread=True), "blockwise"),
    "TPU, bias": (request("tpu", bias=True), "blockwise"),
    "TPU, cached": (request("tpu", cached=True), "dense"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen(name):
    asked, kernel = CHOICES[name]
    chosen = choice.choose(asked)
    assert chosen.kernel == kernel and chosen.why
    assert set(chosen.others) == set(kernels.NAMES) - {kernel} and all(chosen.others.values())
    assert (chosen.tiling is None) == (kernel != "blockwise")


def test_whole_rows_of_all_heads_are_computed_at_once_where_the_compiler_writes_no_logits_down():
    short = {"b": 4, "t": 512, "s": 512}
    assert choice.choose(request(**short)).values_at_once == 32
    assert choice.choose(request(**short, mask=masks.causal())).values_at_once == 32
    unlike = [
        {"s": 513},
        {"rules": Rules(keys_at_once=0)},
        {"platform": "gpu"},
        {"spread": True},
        {"bias": True},
        {"score": True},
        {"dropout": True},
        {"log_sum_exp": True},
    ]
    assert [choice.choose(request(**short | one)).values_at_once for one in unlike] == [0] * len(unlike)


@pytest.mark.parametrize(
    ("asked", "tiling"),
    [
        ({"b": 32, "t": 128, "s": 128}, (16, 128, 128)),
        ({"b": 8, "t": 512, "s": 512}, (2, 512, 512)),
        ({"b": 8, "t": 512, "s": 512, "mask": masks.causal()}, (8, 256, 256)),
        ({"t": 1001, "s": 999}, (2, 501, 500)),
        ({"b": 64, "t": 32, "s": 32}, (64, 32, 32)),
        ({"b": 3, "n": 5, "t": 100, "s": 100}, (15, 100, 100)),
        ({"platform": "gpu", "b": 32}, (256, 512, 512)),
    ],
)
def test_tiles_hold_what_stays_in_the_cache_or_fills_the_machine(asked, tiling):
    assert choice.choose(request(**asked)).tiling == Tiling(*tiling)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older compilers do not fuse as much")
def test_the_choice_prints_itself():
    heads = [jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.float32)] * 3
    chosen = kernels.explain(*heads, mask=masks.causal(), platform="cpu")
    assert str(chosen).splitlines() == [
        f"blockwise: {chosen.why}",
        f"  8 heads at a time, tiles of 256 queries × 256 keys; {chosen.visited:.0%} of the tiles are visited",
        *(f"not {name}: {why}" for name, why in chosen.others.items()),
    ]  # fmt: skip
    assert chosen.others["cudnn"] == "cuDNN needs an NVIDIA GPU" and chosen.others["splash"].endswith("needs a TPU")
    assert chosen.others["dense"] == "it holds all T × S logits"
    short = [jax.ShapeDtypeStruct((4, 8, 128, 64), jnp.float32)] * 3
    assert str(kernels.explain(*short, platform="cpu")).splitlines()[1:3] == [
        "  16 heads at a time, tiles of 128 queries × 128 keys; 100% of the tiles are visited",
        "  where no gradient is taken: 32 heads at a time, whole rows",
    ]
    assert str(kernels.explain(*heads, cached=True)).splitlines()[0] == (
        "dense: a cache is read by the dense path, which does not copy it"
    )


@pytest.mark.parametrize(("t", "expected"), [(2048, 0.625), (4096, 0.5625), (8192, 0.53125)])
def test_causal_visits_about_half_of_the_tiles(t, expected):
    assert choice.choose(request(t=t, s=t, mask=masks.causal())).visited <= expected
    assert choice.choose(request(t=t, s=t, mask=masks.causal())).visited >= 0.5
    assert choice.choose(request(t=t, s=t)).visited == 1
    assert choice.choose(request(t=t, s=t, mask=masks.causal() & masks.window(100))).visited < 3 * 256 / t


@pytest.mark.parametrize("traced", [False, True])
def test_the_loops_run_over_what_the_mask_leaves(traced):
    """Three blocks of queries, three of keys; lengths are looked at when the program runs."""
    heads = [numbers(i, 2, 2, 12, 3) for i in range(3)]

    def visits(lengths):
        mask, tokens = masks.causal() & masks.lengths(lengths), masks.tokens(12)
        inputs = Inputs(*heads, tokens, tokens, mask, tiling=Tiling(2, 4, 4))
        context = layout.lay_out(inputs)[2]
        return context.order, context.full, context.nonempty

    order, full, nonempty = (jax.jit(visits) if traced else visits)(np.array([12, 5]))
    np.testing.assert_array_equal(nonempty, [[1, 2, 3], [1, 2, 2]])
    np.testing.assert_array_equal(full, [[0, 1, 2], [0, 1, 1]])
    assert isinstance(nonempty, np.ndarray) != traced
    for chunk, row in np.ndindex(2, 3):  # full tiles first
        assert sorted(order[chunk, row]) == [0, 1, 2] and order[chunk, row][0] == 0


def test_what_cannot_be_done_is_said():
    heads = numbers(1, 1, 2, 5, 3)
    with pytest.raises(
        ValueError, match="^kernels: kernel must be auto or one of dense, blockwise, cudnn, splash, got 'flash'.$"
    ):
        attend(5, 5, "flash")(heads, heads, heads)
    with pytest.raises(ValueError, match="^kernels: kernel='blockwise' cannot do this: a cache .* one of dense.$"):
        attend(5, 5, cached=True)(heads, heads, heads)
    for kernel, reason in (("cudnn", "NVIDIA"), ("splash", "bias")):
        with pytest.raises(ValueError, match=f"kernel='{kernel}' cannot do this: .*{reason}.* one of dense.$"):
            attend(5, 5, kernel, bias=np.zeros((5, 5), np.float32))(heads, heads, heads)


def test_an_empty_batch_is_an_empty_result():
    heads = np.zeros((0, 4, 5, 3), np.float32)
    for kernel in ("auto", "dense", "blockwise"):
        out = jax.eval_shape(with_gradient(attend(5, 5, kernel, mask=masks.causal())), heads, heads, heads)
        assert {a.shape for a in jax.tree.leaves(out)} == {heads.shape}


# Forward mode -------------------------------------------------------------------------------------------------------

CONFIG = attention.Config(d_model=7, num_heads=3, head_dim=2)


def test_the_second_derivative_by_gates_is_had_from_the_dense_path():
    """The output is linear in the gates: the hessian of half its square is the product of the contributions."""
    from reference import random_params

    params, x = random_params(attention.init_params, CONFIG), numbers(1, 2, 5, 7)

    def loss(gates, kernel):
        return jnp.sum(attention.apply(params, x, CONFIG, gates=gates, mask=masks.causal(), kernel=kernel) ** 2) / 2

    hessian = parity.quick(jax.hessian(partial(loss, kernel="dense")))(np.ones(3, np.float32))
    look = partial(attention.apply_captured, config=CONFIG, mask=masks.causal(), capture=("contributions",))
    _, seen = parity.quick(look)(params, x)
    np.testing.assert_allclose(hessian, np.einsum("bntd,bmtd->nm", *[seen["contributions"]] * 2), rtol=1e-5)


# What it costs ------------------------------------------------------------------------------------------------------


def lowered(t=1024, n=2, h=16, **options):
    heads = jax.ShapeDtypeStruct((1, n, t, h), jnp.float32)
    return jax.jit(with_gradient(attend(t, t, **options))).lower(heads, heads, heads)


LEFT_OUT = {
    "mask": {"mask": None},
    "bias": {"bias": None},
    "score": {"score": None},
    "scale": {"scale": 0.25},
    "a rate of 0": {"dropout_rate": 0.0, "dropout_key": jax.random.key(0)},
    "no key": {"dropout_rate": 0.3, "dropout_key": None},
    "nothing is looked at": {"capture": ()},
}


@pytest.fixture(scope="module")
def plain():
    return lowered().as_text()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_not_asked_for_leaves_no_trace(name, plain):
    assert lowered(**LEFT_OUT[name]).as_text() == plain


def test_what_is_asked_for_does(plain):
    assert lowered(mask=masks.causal()).as_text() != plain != lowered(**DROPPED).as_text()


PADDED = masks.causal() & masks.lengths(np.array([1000]))
DROPPED = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
SCORE = {"score": scores.relative(np.ones((2, 9), np.float32))}
COSTS = {"nothing": {}, "mask": {"mask": PADDED}, "mask, score, dropout": {"mask": PADDED, **SCORE, **DROPPED}}


@pytest.mark.parametrize("name", tiered(COSTS, "mask"))
def test_memory_grows_with_length_and_not_its_square(name):
    """Forward and backward; the dense path's, which holds all weights, grows fourfold."""

    def memory(t):
        return lowered(t, **COSTS[name]).compile(parity.QUICK).memory_analysis().temp_size_in_bytes

    small, middle, large = map(memory, (1024, 2048, 4096))
    assert middle <= 2.3 * small and large <= 2.3 * middle
    assert large < 4096**2 * 4  # the weights of one head


def test_the_memory_of_the_dense_path_does_not():
    memory = [
        lowered(t, kernel="dense").compile(parity.QUICK).memory_analysis().temp_size_in_bytes for t in (512, 1024)
    ]
    assert memory[1] > 3 * memory[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTS)
def test_the_program_does_not_grow_with_length(name):
    short, long = (len(lowered(t, **COSTS[name]).as_text().splitlines()) for t in (8192, 32768))
    assert short == long


def test_the_cases_are_what_their_names_say():
    """Of what a wrong row would hide: several tiles, the last of them partial, rows that see nothing."""
    for name in FEATURES:
        for path in ("blockwise, several tiles", "blockwise, all heads at once"):
            (_, rows, columns), sizes = parity.paths(name)[path].tiling, FEATURES[name].case.sizes
            assert sizes.t % rows or sizes.s % columns
            assert sizes.t > rows or sizes.s > columns
    assert not np.array_equal(CAUSAL, np.ones_like(CAUSAL))
