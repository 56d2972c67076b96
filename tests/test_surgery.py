"""Heads cut out, moved, merged and grouped: against gates of 0, and against the function that was there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiers import tiered

from mhajax import attention, language_model, masks, positions, transformer, translator
from mhajax.attentions import PerAttention
from mhajax.heads import surgery

D, H, HV, T, S = 11, 4, 3, 5, 7
X, MEMORY = reference.numbers(1, 2, T, D), reference.numbers(2, 2, S, D)
MASK = (np.arange(S) < np.array([S, 3])[:, None])[:, None, None]
BIG = {"rtol": 1e-6, "atol": 1e-6}


def made(num_heads=6, num_kv_heads=None, seed=0, use_bias=True):
    """An attention in which nothing is zero."""
    config = attention.Config(
        d_model=D, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=H, value_dim=HV, use_bias=use_bias
    )
    return jax.tree.map(jnp.asarray, reference.random_params(attention.init_params, config, seed)), config


def out(params, **options):
    """By loops in float64."""
    return reference.multi_head_attention(params, X, MEMORY, mask=MASK, **options)


def weights(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("num_kv_heads", "keep", "heads", "keys"),
    [
        (None, [0, 2, 5], 3, 3),
        (3, [2, 3, 5, 4], 4, 2),  # the first group goes, the others stay whole
        (3, [0, 2, 5], 3, 3),  # each group loses one
        (2, [0, 1, 4], 3, 3),  # groups of 2 and 1: one key head for each query head is as small as groups of 2
        (2, [0, 1, 2, 3, 4], 6, 2),  # uneven, and five key heads would be more weights than one place of zeros
        (1, [4, 1], 2, 1),
        (2, [], 1, 1),  # all: one head of zeros
    ],
)
def test_pruned_is_gated(num_kv_heads, keep, heads, keys):
    params, config = made(6, num_kv_heads)
    smaller, shape = surgery.prune(params, config, keep)
    gates = np.isin(np.arange(6), keep).astype(np.float32)
    np.testing.assert_allclose(out(smaller), out(params, gates=gates), **BIG)
    assert (shape.num_heads, shape.kv_heads, shape.width, shape.value_width) == (heads, keys, H, HV)
    assert weights(smaller) == heads * (D * H + H + HV * D) + keys * (D * H + H + D * HV + HV) + D <= weights(params)
    by_bool, same = surgery.prune(params, config, gates > 0)
    assert same == shape and all(jax.tree.leaves(jax.tree.map(np.array_equal, by_bool, smaller)))
    assert sorted(set(surgery.places(params, config, keep).tolist()) - {-1}) == sorted(keep)
    if keep == [0, 1, 2, 3, 4]:
        assert surgery.places(params, config, keep).tolist() == [0, 1, 2, 3, 4, -1]


def test_every_subset_of_grouped_heads():
    params, config = made(6, 2)
    for subset in range(1, 64, 5):
        keep = np.array([bool(subset >> n & 1) for n in range(6)])
        smaller, shape = surgery.prune(params, config, keep)
        np.testing.assert_allclose(out(smaller), out(params, gates=keep), **BIG)
        assert weights(smaller) <= weights(params)
        assert shape.num_heads - 2 <= keep.sum() <= shape.num_heads


@pytest.mark.slow
def test_the_library_runs_what_was_pruned():
    params, config = made(6, 2)
    smaller, shape = surgery.prune(params, config, [0, 1, 4])
    run = jax.jit(lambda p: attention.apply(p, X, shape, memory=MEMORY, mask=masks.dense(MASK)))
    np.testing.assert_allclose(run(smaller), out(params, gates=np.isin(np.arange(6), [0, 1, 4])), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_heads_of_zeros_stay_zero_in_training_and_nothing_is_changed_in_place():
    params, config = made(4, use_bias=False)
    before = jax.tree.map(np.array, params)
    stack = jax.tree.map(lambda w: jnp.stack([w, w]), params)
    keep = np.array([[True, True, True, False], [False, True, False, False]])
    smaller, shape = surgery.prune(stack, config, keep)
    second = jax.tree.map(lambda w: w[1], smaller)
    gradient = jax.jit(jax.grad(lambda p: (attention.apply(p, X, shape, memory=MEMORY) ** 2).sum()))(second)
    assert all((w[1:] == 0).all() for w in [*second[:4], *gradient[:4]]) and (gradient.w_q[0] != 0).any()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, params)))
    assert surgery.places(stack, config, keep).tolist() == [[0, 1, 2], [1, -1, -1]]


SIZES = {"d_model": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 13}
TOKENS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 0, 0]])
TARGET = np.array([[1, 7, 3], [2, 6, 1]])


def a_stack(cross):
    config = transformer.Config(num_layers=3, **SIZES)
    params = reference.random_params(partial(transformer.init_params, cross=cross), config)
    x, memory = reference.numbers(3, 2, T, 12), reference.numbers(4, 2, S, 12)
    options = {"memory": memory} if cross else {}
    return params, config, lambda p, c, g: transformer.apply(p, x, c, gates=g, mask=masks.causal(), **options)


def a_language_model():
    config = language_model.Config(num_layers=3, vocab_size=9, **SIZES)
    params = reference.random_params(language_model.init_params, config)
    return params, config, lambda p, c, g: language_model.apply(p, TOKENS, c, gates=g)


def a_translator():
    config = translator.Config(encoder_layers=3, decoder_layers=2, vocab_size=9, **SIZES)
    params = reference.random_params(translator.init_params, config)
    lengths = np.array([5, 3])
    return params, config, lambda p, c, g: translator.apply(p, TOKENS, TARGET, c, gates=g, source_lengths=lengths)


def random_keep(seed, layers, most):
    random = np.random.default_rng(seed)
    return np.stack(
        [np.isin(np.arange(4), random.permutation(4)[: random.integers(0, most + 1)]) for _ in range(layers)]
    )


MODELS = {
    "stack": (lambda: a_stack(False), PerAttention(attention=random_keep(0, 3, 2))),
    "stack, cross": (lambda: a_stack(True), PerAttention(attention=random_keep(1, 3, 2), cross=random_keep(2, 3, 2))),
    "language model": (a_language_model, PerAttention(attention=random_keep(3, 3, 2))),
    "translator": (
        a_translator,
        PerAttention(
            **{name: random_keep(n, 2 + (n == 4), 2) for name, n in zip(translator.NAMES, (4, 5, 6), strict=True)}
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiered(MODELS, "stack, cross"))
def test_pruned_models_are_gated_ones(name, quick_compiles):
    make, keep = MODELS[name]
    params, config, run = make()
    run = jax.jit(run, static_argnums=1)
    ones = jax.tree.map(lambda k: np.ones(k.shape, np.float32), keep)
    gated = run(params, config, jax.tree.map(np.float32, keep))
    smaller, shape = surgery.prune(params, config, keep)
    np.testing.assert_allclose(run(smaller, shape, PerAttention()), gated, **BIG)
    assert np.abs(gated - run(params, config, ones)).max() > 1e-3
    attentions = 3 if name in ("stack", "language model") else 6 if name == "stack, cross" else 3 + 2 * 2
    kind = {"d_model": 12, "width": 4, "value_width": 4}
    assert {key: getattr(shape, key) for key in kind} == kind and shape.num_heads <= 3
    one_less = (4 - shape.num_heads) * 2 + (2 - shape.kv_heads) * 2  # arrays of 12 × 4
    assert weights(params) - weights(smaller) == attentions * one_less * 48 > 0
    where = surgery.places(params, config, keep)
    for name, kept in keep.items():
        for row, places in zip(kept, where[name], strict=True):
            assert sorted(p for p in places.tolist() if p >= 0) == np.flatnonzero(row).tolist()


@pytest.mark.parametrize("name", tiered(["stack, cross", "translator"], "stack, cross"))
def test_order_changes_nothing_in_models(name, quick_compiles):
    make, keep = MODELS[name]
    params, config, run = make()
    random = np.random.default_rng(7)

    def shuffled(kept):
        groups = np.stack([random.permutation(2) for _ in kept])
        inside = np.stack([[random.permutation(2) for _ in range(2)] for _ in kept])
        return (2 * groups[..., None] + inside).reshape(len(kept), 4)

    orders = jax.tree.map(shuffled, keep)
    gates = jax.tree.map(lambda k: random.random(k.shape).astype(np.float32), keep)
    moved = jax.tree.map(lambda g, o: np.take_along_axis(g, o, -1), gates, orders)
    run = jax.jit(run, static_argnums=1)
    permuted = surgery.permute(params, orders)
    np.testing.assert_allclose(run(permuted, config, moved), run(params, config, gates), **BIG)
    assert np.abs(run(permuted, config, gates) - run(params, config, gates)).max() > 1e-4


def test_permuted_heads_compute_the_same_with_rotation_too():
    params, config = made(6, 3)
    permuted = surgery.permute(params, [5, 4, 0, 1, 3, 2])
    run = jax.jit(lambda p: attention.apply(p, X, config, rotate=positions.rotary))
    np.testing.assert_allclose(run(permuted), run(params), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(permuted.w_q[0], params.w_q[5])
    np.testing.assert_array_equal(permuted.w_k[0], params.w_k[2])


def test_transplanted_heads_add_what_they_added():
    (one, _), (two, _) = made(6, 3), made(6, 3, seed=5)
    both = surgery.transplant(one, two, [2, 3])
    heads = np.isin(np.arange(6), [2, 3])
    expected = out(one, gates=~heads) + out(two, gates=heads) - two.b_o
    np.testing.assert_allclose(out(both), expected, **BIG)


def test_transplants_between_models_move_the_heads_that_were_named():
    one, config, _ = a_translator()
    two = reference.random_params(translator.init_params, config, 9)
    heads = PerAttention(decoder=np.array([[True] * 4, [False] * 4]), cross=np.zeros((2, 4), bool))
    both = surgery.transplant(one, two, heads)
    np.testing.assert_array_equal(both.decoder.layers.attention.w_k[0], two.decoder.layers.attention.w_k[0])
    rest = both._replace(decoder=one.decoder)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, rest, one)))
    np.testing.assert_array_equal(both.decoder.layers.attention.w_o[1], one.decoder.layers.attention.w_o[1])
    np.testing.assert_array_equal(both.decoder.layers.cross.w_q, one.decoder.layers.cross.w_q)


def test_grouped_key_heads_are_the_mean_and_exact_if_they_were_equal():
    params, config = made(6)
    grouped, shape = surgery.group_kv(params, config, 2)
    assert shape.kv_heads == 2
    np.testing.assert_allclose(grouped.w_v[1], (params.w_v[3] + params.w_v[4] + params.w_v[5]) / 3, rtol=1e-5)
    repeat = lambda w: jnp.repeat(w, 3, axis=0)  # noqa: E731
    equal = params._replace(**{f: repeat(getattr(grouped, f)) for f in ("w_k", "w_v", "b_k", "b_v")})
    again, shape = surgery.group_kv(equal, config, 2)
    np.testing.assert_allclose(out(again), out(equal), **BIG)


@pytest.mark.slow
def test_grouped_models_run(quick_compiles):
    params, config, run = a_translator()
    grouped, shape = surgery.group_kv(params, config, 1)
    assert grouped.encoder.layers.attention.w_k.shape == (3, 1, 12, 4)
    assert run(grouped, shape, PerAttention()).shape == (2, 3, 9)


def duplicated(num_kv_heads=None, **options):
    """Heads 1 and 4 look alike and write the same space, and so do 0 and 5, but for half as much."""
    params, config = made(6, num_kv_heads, **options)
    if num_kv_heads is None:
        twice = lambda w: w.at[4].set(w[1]).at[5].set(w[0])  # noqa: E731
        params = attention.Params(*(twice(w) for w in params[:7] if w is not None), *params[-1:])
        return params._replace(w_o=params.w_o.at[5].multiply(0.5)), config
    return params._replace(w_q=params.w_q.at[1].set(params.w_q[0]), b_q=params.b_q.at[1].set(params.b_q[0])), config


@pytest.mark.slow
def test_duplicates_become_one_exactly():
    params, config = duplicated()
    merged, shape, lost = surgery.merge(params, config, [(1, 4), (5, 0)])
    assert shape.num_heads == 4 and [one.heads for one in lost] == [(1, 4), (5, 0)]
    assert max(one.pattern for one in lost) < 1e-6 and max(one.value for one in lost) < 1e-6
    np.testing.assert_allclose(out(merged), out(params), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged.w_q[0], params.w_q[0])


@pytest.mark.slow
def test_heads_that_look_alike_but_write_different_things_lose_the_small_singular_values():
    params, config = duplicated(3)  # heads 0 and 1 share their key head, and now look alike
    merged, shape, (lost,) = surgery.merge(params, config, [(0, 1)])
    assert shape.num_heads == shape.kv_heads == 5
    assert lost.pattern < 1e-6 and lost.value < 1e-6  # w_v is shared, so the sum has rank Hv
    np.testing.assert_allclose(out(merged), out(params), rtol=1e-5, atol=1e-5)

    params, config = made(4, use_bias=False)
    alike = params._replace(w_q=params.w_q.at[2].set(params.w_q[0]), w_k=params.w_k.at[2].set(params.w_k[0]))
    merged, shape, (lost,) = surgery.merge(alike, config, [(0, 2)])
    circuit = sum(np.asarray(alike.w_v[n] @ alike.w_o[n], np.float64) for n in (0, 2))
    sizes = np.linalg.svd(circuit, compute_uv=False)
    np.testing.assert_allclose(lost.value, np.sqrt((sizes[HV:] ** 2).sum() / (sizes**2).sum()), rtol=1e-5)
    (place,) = [n for n in range(3) if n in (0, 1) and not np.array_equal(merged.w_v[n], alike.w_v[[1, 2, 3][n]])][:1]
    rest = np.asarray(merged.w_v[place] @ merged.w_o[place], np.float64) - circuit
    np.testing.assert_allclose(np.linalg.norm(rest) / np.linalg.norm(circuit), lost.value, rtol=1e-4)
    assert lost.pattern < 1e-6 < lost.value


def test_the_difference_of_patterns_is_said():
    params, config = made(4)
    doubled = params._replace(
        w_q=params.w_q.at[3].set(2 * params.w_q[0]), b_q=params.b_q.at[3].set(2 * params.b_q[0]),
        w_k=params.w_k.at[3].set(params.w_k[0]), b_k=params.b_k.at[3].set(params.b_k[0]),
        w_o=params.w_o.at[3].multiply(0.01),
    )  # fmt: skip
    _, _, (lost,) = surgery.merge(doubled, config, [(3, 0)])  # head 0 writes more and stays; 3 has twice its logits
    np.testing.assert_allclose(lost.pattern, 1, rtol=1e-5)


@pytest.mark.slow
def test_models_merge_layer_by_layer(quick_compiles):
    params, config, run = a_language_model()
    found = jax.tree.map(jnp.asarray, params.stack.layers.attention)
    alike = found._replace(w_q=found.w_q.at[1, 1].set(found.w_q[1, 0]))  # layer 1: heads 0 and 1 share their keys too
    params = params._replace(stack=params.stack._replace(layers=params.stack.layers._replace(attention=alike)))
    merged, shape, (lost,) = surgery.merge(params, config, PerAttention(attention=[[], [(0, 1)], []]))
    assert (lost.attention, lost.layer, lost.heads, shape.num_heads) == ("attention", (1,), (0, 1), 4)
    np.testing.assert_allclose(
        run(merged, shape, PerAttention()), run(params, config, PerAttention()), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"sets.attention must have a list for each of 3 layers, got 1"):
        surgery.merge(params, config, PerAttention(attention=[[(0, 1)]]))


PARAMS, CONFIG = made(6, 3)
STACK_CONFIG = transformer.Config(num_layers=3, **SIZES)
STACK = reference.random_params(transformer.init_params, STACK_CONFIG)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: surgery.prune(PARAMS, CONFIG, [0, 6]), r"name heads of 0 … 5, each once, got \[0, 6\]"),
        (ValueError, lambda: surgery.prune(PARAMS, CONFIG, [1, 1]), r"each once, got \[1, 1\]"),
        (ValueError, lambda: surgery.prune(PARAMS, CONFIG, np.ones(5, bool)), r"must be \[N\] = \(6,\), got \(5,\)"),
        (TypeError, lambda: surgery.prune(PARAMS, CONFIG, np.ones(6)), r"write gates > 0.5"),
        (ValueError, lambda: surgery.prune(PARAMS, made(4)[1], [0]), r"\(N, D, H, K, Hv\) = \(4, 11, 4, 4, 3\), got"),
        (TypeError, lambda: surgery.prune(STACK, STACK_CONFIG, np.ones((3, 4), bool)), r"must be a PerAttention"),
        (
            ValueError,
            lambda: surgery.prune(STACK, STACK_CONFIG, PerAttention(cross=np.ones((3, 4), bool))),
            r"any of the attentions attention, got cross",
        ),
        (
            ValueError,
            lambda: surgery.prune(STACK, STACK_CONFIG, PerAttention(attention=np.ones(4, bool))),
            r"keep.attention must be \[L, N\] = \(3, 4\), got \(4,\)",
        ),
        (TypeError, lambda: surgery.prune(STACK.norm, STACK_CONFIG, []), r"params must be the Params of attention"),
        (TypeError, lambda: jax.jit(lambda k: surgery.prune(PARAMS, CONFIG, k))(np.ones(6, bool)), r"outside of jit"),
        (ValueError, lambda: surgery.permute(PARAMS, [0, 1, 2, 3, 4, 4]), r"each of the heads 0 … 5 once"),
        (ValueError, lambda: surgery.permute(PARAMS, [0, 2, 1, 3, 4, 5]), r"2 heads that share a key head together"),
        (ValueError, lambda: surgery.transplant(PARAMS, PARAMS, [0]), r"all of the 2 heads that share a"),
        (ValueError, lambda: surgery.transplant(PARAMS, made(6)[0], [0]), r"must have the same shapes"),
        (ValueError, lambda: surgery.group_kv(PARAMS, CONFIG, 2), r"must divide K=3, .* got 2"),
        (ValueError, lambda: surgery.merge(PARAMS, CONFIG, [(0,)]), r"sets of two or more"),
        (ValueError, lambda: surgery.merge(PARAMS, CONFIG, [(0, 1), (1, 2)]), r"none of them twice"),
        (ValueError, lambda: surgery.merge(PARAMS, CONFIG, [(0, 7)]), r"the heads 0 … 5"),
    ],
)  # fmt: skip
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call()
