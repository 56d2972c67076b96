"""Masks against NumPy, whole and in blocks, alone and combined, through JAX's transformations."""

import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered

from mhajax import attention, kernels, masks
from mhajax.masks import Tokens

B, N, T, S = 2, 3, 5, 7
LENGTHS = np.array([4, 0])
NOT_A_MASK: Any = None
QUERY_SEGMENTS = np.array([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])
KEY_SEGMENTS = np.array([[0, 1, 1, 2, 2, 2, 3], [1, 1, 0, 0, 1, 1, 1]])
_random = np.random.default_rng(0)
PAIRS, EXAMPLES, HEADS, ALL = (_random.random(shape) < 0.5 for shape in ((T, S), (B, T, S), (N, T, S), (B, N, T, S)))


def dilated(q, k, step, options):
    return ((q - k) % step == 0) & (q - k <= options["reach"][1])


# name: (mask, what it says about every pair, broadcast to [B, N, T, S])
GAPS = np.arange(T)[:, None] - np.arange(S)
CAUSAL = GAPS >= 0
TRUTH = {
    "causal": (masks.causal(), CAUSAL),
    "lengths": (masks.lengths(LENGTHS), (np.arange(S) < LENGTHS[:, None])[:, None, None, :]),
    "length": (masks.lengths(3), np.arange(S) < 3),
    "segments": (
        masks.segments(QUERY_SEGMENTS, KEY_SEGMENTS),
        (QUERY_SEGMENTS[:, :, None] == KEY_SEGMENTS[:, None, :])[:, None],
    ),
    "segments of one text": (
        masks.segments(QUERY_SEGMENTS[0], KEY_SEGMENTS[0]),
        QUERY_SEGMENTS[0][:, None] == KEY_SEGMENTS[0],
    ),
    "dense": (masks.dense(PAIRS), PAIRS),
    "dense, all axes": (masks.dense(ALL), ALL),
    "dense, shared heads": (masks.dense(ALL[:, :1]), ALL[:, :1]),
    "dense, shared queries": (masks.dense(ALL[:, :, :1]), ALL[:, :, :1]),
    "dense, shared keys": (masks.dense(ALL[..., :1]), ALL[..., :1]),
    "per example": (masks.per_example(EXAMPLES), EXAMPLES[:, None]),
    "per head": (masks.per_head(HEADS), HEADS),
    "window": (masks.window(2), (GAPS <= 2) & (GAPS >= 0)),
    "window, ahead": (masks.window(0, after=3), (GAPS <= 0) & (GAPS >= -3)),
    "prefix": (masks.causal() | masks.prefix(3), CAUSAL | (np.arange(S) < 3)),
    "prefix per example": (masks.prefix(LENGTHS), (np.arange(S) < LENGTHS[:, None])[:, None, None, :]),
    "chunk": (masks.chunk(3), np.arange(T)[:, None] // 3 == np.arange(S) // 3),
    "function": (masks.function(dilated, 2, {"reach": np.array([9, 4])}), (GAPS % 2 == 0) & (GAPS <= 4)),
    "and": (
        masks.causal() & masks.lengths(LENGTHS),
        CAUSAL & (np.arange(S) < LENGTHS[:, None])[:, None, None, :],
    ),
    "or": (masks.causal() | masks.per_head(HEADS), CAUSAL | HEADS),
    "not": (~masks.causal(), ~CAUSAL),
    "nested": (
        ~(masks.causal() & masks.per_example(EXAMPLES)) | masks.dense(PAIRS),
        ~(CAUSAL & EXAMPLES[:, None]) | PAIRS,
    ),
}


def whole(mask, queries=T, keys=S):
    return np.broadcast_to(mask.block(masks.tokens(queries), masks.tokens(keys)), (B, N, queries, keys))


@pytest.mark.parametrize("name", TRUTH)
def test_a_mask_says_what_numpy_says(name):
    mask, truth = TRUTH[name]
    np.testing.assert_array_equal(whole(mask), np.broadcast_to(truth, (B, N, T, S)))


@pytest.mark.parametrize("name", tiered(TRUTH, *list(TRUTH)[::3]))
def test_a_block_is_that_part_of_the_whole(name):
    """Static and dynamic starts, with positions that go with the indices."""
    mask, truth = TRUTH[name]
    truth = np.broadcast_to(truth, (B, N, T, S))

    @jax.jit
    def block(mask, t, s):
        return mask.block(Tokens(t, t + jnp.arange(2)), Tokens(s, s + jnp.arange(3)))

    for t, s in ((0, 0), (1, 4), (3, 2)):
        expected = truth[:, :, t : t + 2, s : s + 3]
        np.testing.assert_array_equal(np.broadcast_to(block(mask, t, s), expected.shape), expected)
    static = mask.block(Tokens(3, jnp.arange(3, 5)), Tokens(4, jnp.arange(4, 7)))
    np.testing.assert_array_equal(np.broadcast_to(static, (B, N, 2, 3)), truth[:, :, 3:, 4:])


def test_causal_compares_positions_and_lengths_compare_indices():
    queries, keys = Tokens(0, jnp.array([10, 3])), Tokens(0, jnp.array([2, 9, 10, 11]))
    np.testing.assert_array_equal(
        masks.causal().block(queries, keys), [[True, True, True, False], [True, False, False, False]]
    )
    np.testing.assert_array_equal(masks.lengths(2).block(queries, keys), [[True, True, False, False]])


def test_positions_may_differ_between_examples():
    queries, keys = jnp.array([[0, 1], [5, 6]]), jnp.array([[0, 1, 2], [4, 6, 7]])
    block = masks.causal().block(Tokens(0, queries), Tokens(0, keys))
    assert block.shape == (2, 1, 2, 3)
    np.testing.assert_array_equal(block[:, 0], keys[:, None, :] <= queries[:, :, None])


@pytest.mark.parametrize("leading", [(), (B,)])
def test_new_kinds_compare_positions(leading):
    """Positions that are no indices, in any order, far apart, and unsigned ones that would wrap around."""
    random = np.random.default_rng(3)
    asking, answering = random.integers(0, 20, (*leading, T)), random.integers(0, 20, (*leading, S))
    q, k = asking[..., None, :, None], answering[..., None, None, :]
    for dtype in (np.int32, np.uint8):
        queries, keys = Tokens(3, asking.astype(dtype)), Tokens(2, answering.astype(dtype))
        for mask, truth in (
            (masks.window(4, after=2), (q - k <= 4) & (k - q <= 2)),
            (masks.window(2**31 - 1, after=2**31 - 1), (q - k <= 99)),
            (masks.prefix(6), (k < 6) & (q >= 0)),
            (masks.chunk(5), q // 5 == k // 5),
            (masks.function(lambda q, k: q // 5 == k // 5), q // 5 == k // 5),
        ):
            block = mask.block(queries, keys)
            np.testing.assert_array_equal(np.broadcast_to(block, truth.shape), truth)
    assert masks.function(lambda q, k: q == k).block(queries, keys).shape == ((B, 1, T, S) if leading else (T, S))


def test_windows_of_several_models_are_a_vmap():
    windows = jax.vmap(masks.window)(jnp.array([0, 2, 9]))
    blocks = jax.vmap(lambda mask: mask.block(masks.tokens(T), masks.tokens(S)))(windows)
    np.testing.assert_array_equal(blocks, [(GAPS <= n) & (GAPS >= 0) for n in (0, 2, 9)])


@pytest.mark.parametrize("name", TRUTH)
def test_written_out(name):
    """Boolean [T, S], or [..., 1 or N, T, S] where examples or heads differ; back again it is the same mask."""
    mask, truth = TRUTH[name]
    array = masks.as_array(mask, T, masks.tokens(S))
    assert array.shape[-2:] == (T, S) and array.dtype == bool
    np.testing.assert_array_equal(np.broadcast_to(array, (B, N, T, S)), np.broadcast_to(truth, (B, N, T, S)))
    assert array.ndim == max(np.ndim(truth), 2)


def test_no_mask_written_out_is_true_everywhere():
    array = masks.as_array(None, T, S)
    assert array.shape == (T, S) and array.all()


def test_masks_go_through_jit_vmap_and_scan():
    make = lambda lengths: masks.causal() & masks.lengths(lengths)  # noqa: E731
    expected = np.stack([np.broadcast_to(CAUSAL & (np.arange(S) < n), (T, S)) for n in range(4)])
    evaluate = lambda mask: jnp.broadcast_to(mask.block(masks.tokens(T), masks.tokens(S)), (T, S))  # noqa: E731

    stacked = jax.vmap(make)(jnp.arange(4))
    np.testing.assert_array_equal(jax.jit(jax.vmap(evaluate))(stacked), expected)
    np.testing.assert_array_equal(jax.lax.scan(lambda _, mask: (None, evaluate(mask)), None, stacked)[1], expected)
    assert jax.tree.structure(stacked) == jax.tree.structure(make(2))


def test_a_mask_holds_no_pairs_unless_it_was_given_pairs():
    assert jax.tree.leaves(masks.causal()) == []
    assert [leaf.shape for leaf in jax.tree.leaves(masks.causal() & masks.lengths(LENGTHS))] == [(B,)]


def test_a_boolean_array_becomes_a_dense_mask_and_nothing_else_changes():
    assert masks.as_mask(None) is None
    mask = masks.causal()
    assert masks.as_mask(mask) is mask
    np.testing.assert_array_equal(whole(masks.as_mask(PAIRS)), np.broadcast_to(PAIRS, (B, N, T, S)))


# what is done: (kind of error, what its message must hold)
ERRORS = {
    "window looks back by less than nothing": (
        partial(masks.window, -1),
        ValueError,
        ("masks.window", "before", "at least 0", "got -1"),
    ),
    "window ahead": (partial(masks.window, 2, after=-3), ValueError, ("masks.window", "after", "got -3")),
    "half a window": (partial(masks.window, 2.5), TypeError, ("masks.window", "before", "integer", "float32")),
    "several windows": (partial(masks.window, np.array([1, 2])), TypeError, ("one integer", "(2,)", "vmap")),
    "no chunks": (partial(masks.chunk, 0), ValueError, ("masks.chunk", "size", "at least 1", "got 0")),
    "prefix that is a mask": (partial(masks.prefix, True), TypeError, ("masks.prefix", "length", "bool")),
    "negative prefix": (partial(masks.prefix, np.array([2, -2])), ValueError, ("masks.prefix", "[ 2 -2]")),
    "function that is an array": (
        lambda: masks.function(PAIRS),  # pyright: ignore[reportArgumentType]
        TypeError,
        ("masks.function", "(q_position, k_position, *arrays) -> bool", "ndarray", "masks.dense"),
    ),
    "function of logits": (
        partial(masks.function, lambda q, k: q - k),
        TypeError,
        ("masks.function", "return one boolean", "int32 ()", "k <= q"),
    ),
    "function of many keys": (
        partial(masks.function, lambda q, k, ids: ids == k, np.arange(3)),
        TypeError,
        ("masks.function", "return one boolean", "bool (3,)"),
    ),
    "function that forgets to return": (partial(masks.function, lambda q, k: None), TypeError, ("NoneType",)),
    "picture of any size": (lambda: masks.causal().show(), ValueError, ("causal()", "mask.show(T, S)")),
    "three axes": (
        partial(masks.dense, np.ones((N, T, S), bool)),
        ValueError,
        ("masks.dense", "[T, S] or [B, N, T, S]", "(3, 5, 7)", "masks.per_example", "masks.per_head"),
    ),
    "one axis": (partial(masks.dense, np.ones(S, bool)), ValueError, ("masks.dense", "(7,)")),
    "numbers": (
        partial(masks.dense, np.ones((T, S), int)),
        TypeError,
        ("masks.dense", "boolean", "True = may attend", "int", "!= 0", "bias="),
    ),
    "numbers per example": (
        partial(masks.per_example, np.ones((B, T, S))),
        TypeError,
        ("masks.per_example", "boolean", "float"),
    ),
    "example without batch": (
        partial(masks.per_example, PAIRS),
        ValueError,
        ("masks.per_example", "[B, T, S]", "(5, 7)", "masks.dense"),
    ),
    "heads with batch": (
        partial(masks.per_head, ALL),
        ValueError,
        ("masks.per_head", "[N, T, S]", "(2, 3, 5, 7)", "masks.dense"),
    ),
    "numbers per head": (partial(masks.per_head, np.ones((N, T, S))), TypeError, ("masks.per_head", "boolean")),
    "lengths that are booleans": (
        partial(masks.lengths, np.ones((B, S), bool)),
        TypeError,
        ("masks.lengths", "integers", "bool", "masks.dense(array[:, None, None, :])"),
    ),
    "lengths that are floats": (partial(masks.lengths, 3.0), TypeError, ("masks.lengths", "integers", "float32")),
    "and with an array": (
        lambda: masks.causal() & PAIRS,  # pyright: ignore[reportOperatorIssue]
        TypeError,
        ("&", "two masks", "ndarray", "masks.dense(array)"),
    ),
    "or with None": (lambda: masks.causal().__or__(NOT_A_MASK), TypeError, ("|", "two masks", "NoneType")),
    "too few queries": (
        lambda: whole(masks.dense(PAIRS), queries=T + 1),
        ValueError,
        ("made for 5 tokens", "asked about 6", "queries", "(5, 7)"),
    ),
    "too few keys": (
        lambda: whole(masks.dense(PAIRS), keys=S + 2),
        ValueError,
        ("made for 7 tokens", "asked about 9", "(5, 7)"),
    ),
}


@pytest.mark.parametrize(
    "ask",
    [
        lambda a, b: a and b,  # was b alone
        lambda a, b: a or b,
        lambda a, b: not a,
        lambda a, b: a if b else None,
        lambda a, b: bool(a),
    ],
)
def test_a_mask_has_no_truth_value(ask):
    with pytest.raises(TypeError, match="masks: a mask has no truth value, got .* write a & b .* a | b .*, ~a "):
        ask(masks.causal(), masks.window(3))


@pytest.mark.parametrize("other", [True, np.ones((3, 3), bool), jnp.ones((3, 3), bool), [[True]]])
def test_what_comes_first_must_be_a_mask_too(other):
    for combine, sign in ((operator.and_, "&"), (operator.or_, r"\|")):
        for pair in ((other, masks.causal()), (masks.causal(), other)):
            with pytest.raises(TypeError, match=f"masks: {sign} combines two masks, got .* wrap an array: masks.dense"):
                combine(*pair)


@pytest.mark.parametrize("given", ["causal", {}, object()])
def test_what_is_neither_a_mask_nor_an_array_is_named(given):
    with pytest.raises(
        TypeError, match=r"attention.apply: mask must be a Mask or booleans, got .*; write masks.causal\(\)"
    ):
        masks.as_mask(given)


@pytest.mark.parametrize("sign", [operator.add, operator.mul, operator.sub, operator.xor])
def test_signs_that_masks_do_not_have_say_what_to_write(sign):
    for other in (masks.window(3), np.ones((3, 3), bool), jnp.ones((3, 3), bool)):
        for pair in ((masks.causal(), other), (other, masks.causal())):
            with pytest.raises(TypeError, match="masks: masks have no .* write a "):
                sign(*pair)


def test_both_sides_of_a_window_are_named():
    with pytest.raises(TypeError, match="positional"):
        masks.window(2, 3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"one integer, got shape \(2,\); window\(before, after=…\)"):
        masks.window((2, 3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, kind, parts = ERRORS[name]
    with pytest.raises(kind) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


# JAX can be told to refuse operands of different ranks; it finds them while it traces.
PLACES = [masks.tokens(size, jnp.asarray(np.arange(B)[:, None] + np.arange(size))) for size in (T, S)]


@pytest.mark.parametrize("name", TRUTH)
@jax.numpy_rank_promotion("raise")
def test_a_mask_broadcasts_no_rank(name):
    def said(mask, *tokens):
        return mask.block(*tokens), mask.tiles(*tokens, 2, 3)

    for places in (PLACES, (PLACES[0], masks.tokens(S)), (masks.tokens(T), PLACES[1])):
        jax.make_jaxpr(said)(TRUTH[name][0], *places)
        jax.make_jaxpr(lambda *places: said(TRUTH[name][0], *places))(*places)


@pytest.mark.parametrize("path", ["dense", "blockwise"])
@pytest.mark.parametrize("name", tiered(["causal", "and", "or", "per head", "segments", "prefix per example"], "or"))
@jax.numpy_rank_promotion("raise")
def test_kernels_broadcast_no_rank(name, path):
    options: dict[str, Any] = dict(
        bias=jnp.ones((1, N, 1, S)),
        scale=0.3,
        dropout_rate=0.3,
        dropout_key=jax.random.key(0),
        tiling=kernels.Tiling(3, 2, 3),
    )

    def loss(qkv, mask, places):
        heads, sums = kernels.PATHS[path].attend(kernels.Inputs(*qkv, *places, mask, **options))
        return heads.sum() + sums.whole.sum()

    qkv = jnp.ones((B, N, T, 4)), jnp.ones((B, N, S, 4)), jnp.ones((B, N, S, 2))
    for places in (PLACES, [masks.tokens(T), masks.tokens(S)]):
        jax.make_jaxpr(jax.grad(loss))(qkv, TRUTH[name][0], places)


@jax.numpy_rank_promotion("raise")
def test_attention_broadcasts_no_rank():
    config = attention.Config(d_model=6, num_heads=N, use_bias=True)
    params = jax.eval_shape(partial(attention.init_params, config=config), jax.random.key(0))
    x, memory = jax.ShapeDtypeStruct((B, T, 6), jnp.float32), jax.ShapeDtypeStruct((B, S, 6), jnp.float32)
    for gates, mask in ((None, None), (jnp.ones(N), "and"), (jnp.ones((B, N)), "or")):
        options: Any = {} if mask is None else {"mask": TRUTH[mask][0], "bias": jnp.ones((T, S))}
        run = partial(attention.apply_captured, config=config, gates=gates, capture=attention.CAPTURES, **options)
        out, _ = jax.eval_shape(lambda p, x, memory, run=run: run(p, x, memory=memory), params, x, memory)
        assert out.shape == (B, T, 6)
