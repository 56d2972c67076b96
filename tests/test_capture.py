"""Captures by request: what is chosen is what the whole would show there, in memory that grows with T."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params
from test_interventions import ALLOWED, BIAS, CONFIG, LENGTHS, MASK, PARAMS, VALUES, B, D, K, N, T, X, by_hand
from tiers import tiered

from mhajax import attention, interventions, kernels, language_model, masks, translator
from mhajax.attentions import PerAttention
from mhajax.interventions import Capture, Intervention
from mhajax.kernels.rowwise import layout

pytestmark = pytest.mark.usefixtures("quick_compiles")

NAMES = attention.CAPTURES
look = jax.jit(partial(attention.apply_captured, config=CONFIG), static_argnames=("capture", "kernel"))
GIVEN: Any = {"mask": MASK, "bias": BIAS}
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)


def chosen(name: str, whole: Any, heads: Any, rows: Any) -> Any:
    """The same of the whole [B, N, T, …]."""
    if heads is not None:
        whole = whole[:, np.array(heads) * whole.shape[1] // N]
    return whole if rows is None or name in ("keys", "values", "column_sums") else whole[:, :, np.array(rows)]


CHOSEN = [(None, None), ((3, 0), (28, 2, 0, 5)), ((1,), None)]


@pytest.mark.parametrize("kernel", tiered(["blockwise", "dense"], "blockwise"))
@pytest.mark.parametrize(("heads", "rows"), tiered(CHOSEN, CHOSEN[1]))
def test_what_is_chosen_is_what_is_computed_by_hand(kernel, heads, rows):
    out, seen = look(PARAMS, X, kernel=kernel, capture=Capture(NAMES, heads=heads, rows=rows), **GIVEN)
    expected = by_hand({})
    if rows is not None:
        real = (np.arange(T) < LENGTHS[:, None])[:, None, np.array(rows), None]
        expected["column_sums"] = np.sum(expected["weights"][:, :, np.array(rows)] * real, axis=2)
    assert set(seen) == set(NAMES)
    for name in NAMES:
        want = chosen(name, expected[name], heads, rows)
        close(seen[name], want, err_msg=name, atol=2e-5)
    np.testing.assert_array_equal(out, apply(kernel))


def apply(kernel: str) -> Any:
    return jax.jit(partial(attention.apply, config=CONFIG, kernel=kernel))(PARAMS, X, **GIVEN)


def test_the_queries_that_count_can_be_given():
    real = np.random.default_rng(0).random((B, T)) < 0.5
    seen = look(PARAMS, X, capture=("weights", "column_sums"), real=real, **GIVEN)[1]
    close(seen["column_sums"], np.sum(np.asarray(seen["weights"]) * real[:, None, :, None], axis=2))


@pytest.mark.slow
def test_what_is_spoilt_is_marked_where_it_is_seen():
    spoilt = X.copy()
    spoilt[0, 20] = np.nan
    asked = Capture(("logits", "weights", "entropy", "column_sums"), heads=(2,), rows=(19, 20, 28))
    for kernel in ("blockwise", "dense"):
        seen = look(PARAMS, spoilt, kernel=kernel, capture=asked, **GIVEN)[1]
        for name in ("weights", "entropy"):
            rows = np.asarray(seen[name])[0, 0].reshape(3, -1)
            assert np.all(np.isfinite(rows[0])) and np.all(np.isnan(rows[1:])), name
        logits = np.asarray(seen["logits"])[0, 0]
        assert np.isnan(logits[2, 20]) and np.all(np.isfinite(logits[2, 21:])) and np.all(np.isnan(logits[1, :21]))
        assert all(np.all(np.isfinite(np.asarray(seen[name])[1])) for name in ("weights", "entropy", "column_sums"))


@pytest.mark.slow
def test_gradients_of_what_is_seen():
    """Of the fast path's log-sum-exp and the blocks of rows together: those of the dense path."""

    def loss(x, kernel):
        _, seen = attention.apply_captured(
            PARAMS, x, CONFIG, mask=MASK, kernel=kernel, capture=Capture(("weights", "entropy"), heads=(1,))
        )
        return jnp.sum(jnp.sin(3 * seen["weights"])) + jnp.sum(seen["entropy"] ** 2)

    blocks, dense = (jax.jit(jax.grad(partial(loss, kernel=kernel)))(X) for kernel in ("blockwise", "dense"))
    np.testing.assert_allclose(blocks, dense, rtol=1e-3, atol=1e-4)
    assert np.max(np.abs(dense)) > 1e-2


@pytest.mark.slow
def test_what_is_looked_at_in_blocks_is_what_is_looked_at_at_once(monkeypatch):
    """Rows of a head, some heads, an example at a time; the last block of rows is partial."""
    places = np.arange(T) + np.array([[0], [3]])
    asked = Capture(("logits", "weights", "entropy", "column_sums"), heads=(0, 1, 3, 2))
    some = Capture(asked.names, heads=(2, 0), rows=tuple(range(3, 27)))

    def in_blocks(room):
        monkeypatch.setattr(layout, "ROOM", room)
        options = GIVEN | {"positions": places, "score": lambda x, head, q, k: x * (head + 1) + (q - k)}
        see = lambda x: [attention.apply_captured(PARAMS, x, CONFIG, capture=c, **options)[1] for c in (asked, some)]  # noqa: E731
        return jax.jit(see)(X)

    whole = in_blocks(layout.ROOM)
    for room in (8 * T, 2 * T * T, N * T * T):
        jax.tree.map(partial(close, err_msg=str(room), atol=2e-5), in_blocks(room), whole)


@pytest.mark.parametrize("frozen", [False, True])
def test_entropy_is_that_of_the_weights(frozen):
    """Also where weights are too small to be anything but 0; and its gradient is finite there."""
    intervention = interventions.frozen(VALUES["weights"] * (VALUES["weights"] > 0.5)) if frozen else Intervention()

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(x):
        names = ("weights", "entropy")
        _, seen = attention.apply_captured(PARAMS, x, CONFIG, mask=MASK, capture=names, intervention=intervention)
        return jnp.sum(seen["entropy"]), seen

    (_, seen), gradient = loss(100 * X)
    weights = np.asarray(seen["weights"], np.float64)
    assert np.any((weights == 0) & ALLOWED) and np.all(np.isfinite(gradient))
    close(seen["entropy"], -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), -1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("entropy", "column_sums"), ("weights",)])
def test_memory_of_sums_grows_with_length(names):
    """Besides the plain forward: sums take room for some rows, the weights of a few rows no more."""
    config = attention.Config(d_model=16, num_heads=2)
    params = jax.eval_shape(partial(attention.init_params, config=config), jax.random.key(0))
    rows = None if names[0] == "entropy" else (5, 7)

    def memory(t):
        function = partial(
            attention.apply_captured, config=config, mask=masks.causal(), capture=Capture(names, rows=rows)
        )
        shape = jax.ShapeDtypeStruct((1, t, 16), jnp.float32)
        return jax.jit(function).lower(params, shape).compile().memory_analysis().temp_size_in_bytes

    small, large = memory(4096), memory(8192)
    assert large <= 2.3 * small and large < 8192**2 * 4 / 4  # a quarter of one head's weights


def test_nothing_asked_leaves_no_trace():
    def lowered(**options):
        return jax.jit(lambda x: attention.apply_captured(PARAMS, x, CONFIG, **GIVEN, **options)[0]).lower(X).as_text()

    assert lowered(capture=()) == lowered(capture=Capture((), heads=(1,))) == lowered(capture=(), real=None)


# Models -----------------------------------------------------------------------------------------------------------

V, L = 11, 5
LM = language_model.Config(d_model=D, num_heads=N, num_kv_heads=K, head_dim=4, num_layers=L, vocab_size=V)
TOKENS: Any = np.random.default_rng(0).integers(0, V, (B, 6))


@pytest.fixture(scope="module")
def lm():
    return random_params(language_model.init_params, LM)


@pytest.mark.parametrize("layers", tiered([[4, 0, 1], [2]], [4, 0, 1]))
def test_layers_are_chosen_and_the_others_stay_as_they_are(lm, layers):
    run = jax.jit(partial(language_model.apply_captured, config=LM), static_argnames="capture")
    names = ("weights", "heads", "entropy")
    out, seen = run(lm, TOKENS, capture=Capture(names, layers=layers, heads=(3, 1), rows=(5,)))
    whole, every = run(lm, TOKENS, capture=names)
    np.testing.assert_array_equal(out, whole)
    for name in names:
        want = np.asarray(every.attention[name])[np.array(layers)][:, :, [3, 1]][:, :, :, [5]]
        close(seen.attention[name], want)


@pytest.mark.slow
def test_a_cache_shows_what_is_chosen(lm):
    state = language_model.init_cache((B,), 8, LM)
    asked = Capture(("weights",), layers=(3, 1), heads=(2,))
    _, _, seen = language_model.run(lm, TOKENS, LM, cache=state, capture=asked)
    _, every = language_model.apply_captured(lm, TOKENS, LM, capture=("weights",))
    close(seen.attention["weights"][..., :6], np.asarray(every.attention["weights"])[np.array([3, 1])][:, :, [2]])


@pytest.mark.slow
def test_a_translator_shows_one_kind_of_attention():
    config = translator.Config(d_model=D, num_heads=N, head_dim=4, encoder_layers=2, decoder_layers=3, vocab_size=V)
    params = random_params(translator.init_params, config)
    run = jax.jit(partial(translator.apply_captured, config=config), static_argnames="capture")
    out, seen = run(params, TOKENS, TOKENS, capture=PerAttention(cross=Capture(("weights",), layers=(2,))))
    whole, every = run(params, TOKENS, TOKENS, capture=("weights",))
    assert seen.encoder == seen.decoder == {}
    np.testing.assert_array_equal(out, whole)
    close(seen.cross["weights"], every.cross["weights"][2:])

    real = np.arange(6) < np.array([[6], [4]])
    _, seen = run(
        params, TOKENS, TOKENS, source_lengths=np.array([6, 3]), capture=("weights", "column_sums"), real=real
    )
    for kind, counts in (("encoder", np.arange(6) < np.array([[6], [3]])), ("decoder", real), ("cross", real)):
        every = getattr(seen, kind)
        want = np.sum(np.asarray(every["weights"]) * counts[:, None, :, None], axis=-2)
        close(every["column_sums"], want, err_msg=kind)


ERRORS: Any = {
    "heads": (
        lambda: attention.apply_captured(PARAMS, X, CONFIG, capture=Capture(("weights",), heads=(1, 4))),
        ("capture.heads must be below 4", "(1, 4)"),
    ),
    "rows": (
        lambda: attention.apply_captured(PARAMS, X, CONFIG, capture=Capture(("weights",), rows=(29,))),
        ("capture.rows must be below 29", "(29,)"),
    ),
    "layers": (
        lambda: language_model.apply_captured(
            random_params(language_model.init_params, LM), TOKENS, LM, capture=Capture(("weights",), layers=(5,))
        ),
        ("capture.layers must be below num_layers=5", "PerAttention"),
    ),
    "name": (
        lambda: attention.apply_captured(PARAMS, X, CONFIG, capture=Capture(("entropies",))),
        (*NAMES, "['entropies']"),
    ),
    "real for nothing": (
        lambda: language_model.apply_captured(
            random_params(language_model.init_params, LM), TOKENS, LM, real=np.ones((B, 6), bool)
        ),
        ("got real without a cache", '"column_sums"', "masks.lengths"),
    ),
    "twice": (lambda: Capture(("weights",), heads=(1, 1)), ("heads must be different indices", "(1, 1)")),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, parts = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_capture_is_hashable_and_the_same_if_it_says_the_same():
    assert hash(Capture(("weights",), rows=[3])) == hash(Capture(["weights"], rows=(np.int64(3),)))  # pyright: ignore
    assert Capture(("weights",)) == interventions.as_capture(["weights"])
    assert ALLOWED.shape == (B, N, T, T)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Capture(("weights",), heads=(0, 3)), r"kernels.attend: capture.heads must be below 3, .* got \(0, 3\)"),
        (Capture(("entropy",), rows=(7,)), r"kernels.attend: capture.rows must be below 7, .* got \(7,\)"),
        (("keys",), r"kernels.attend: capture must name any of logits, weights"),
    ],
)
def test_what_does_not_exist_is_refused_by_the_kernels_themselves(asked, said):
    q = jnp.ones((3, 7, 4))
    with pytest.raises(ValueError, match=said):
        kernels.attend(q, q, q, queries=masks.tokens(7), keys=masks.tokens(7), capture=asked)
