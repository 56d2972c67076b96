"""Interventions: every patch against NumPy with the same done by hand, on every path, per layer, head and token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numbers, random_params
from tiers import tiered

from mhajax import attention, interventions, language_model, masks, translator
from mhajax.attentions import PerAttention
from mhajax.interventions import Intervention, Patch

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, N, K, D, H, HV = 2, 29, 4, 2, 7, 3, 5
CONFIG = attention.Config(d_model=D, num_heads=N, num_kv_heads=K, head_dim=H, value_dim=HV, use_bias=True)
PARAMS: Any = random_params(attention.init_params, CONFIG)
X: Any = numbers(1, B, T, D)
LENGTHS: Any = np.array([T, 11])
ALLOWED: Any = np.tri(T, dtype=bool) & (np.arange(T) < LENGTHS[:, None, None, None])
ALLOWED = np.broadcast_to(ALLOWED, (B, N, T, T)).copy()
ALLOWED[:, :, 0] = False  # a query with nothing to attend to
FIRST: Any = np.ones((T, T), bool)
FIRST[0] = False
MASK = masks.causal() & masks.lengths(LENGTHS) & masks.dense(FIRST)
BIAS: Any = numbers(2, 1, N, T, T)
apply = jax.jit(attention.apply, static_argnames=("config", "kernel"))
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=5e-6)

SHAPES = {
    "queries": (B, N, T, H), "keys": (B, K, T, H), "values": (B, K, T, HV), "logits": (B, N, T, T),
    "weights": (B, N, T, T), "heads": (B, N, T, HV),
}  # fmt: skip
VALUES: Any = {name: numbers(10 + i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
VALUES["weights"] = np.abs(VALUES["weights"])


def amount_for(name: str, amount: Any) -> Any:
    """[...] as it broadcasts over the quantity: [N], [B, N] or [B, N, T]."""
    amount = np.asarray(amount, np.float64)
    missing = 1 if amount.ndim == 3 else 2
    return amount.reshape(*amount.shape, *(1,) * missing)


def by_hand(patches: Any, x: Any = X, gates: Any = 1.0, allowed: Any = ALLOWED) -> dict[str, Any]:
    """Everything that the attention computes, in float64; patches are name → (value, amount)."""

    def patched(name: str, quantity: Any) -> Any:
        if name not in patches:
            return quantity
        value, amount = patches[name]
        amount = amount_for(name, amount)
        return quantity * (1 - amount) + value * amount

    w = {name: np.asarray(a, np.float64) for name, a in PARAMS._asdict().items()}
    project = lambda a, b: np.einsum("btd,ndh->bnth", x, a) + b[:, None]  # noqa: E731
    q = patched("queries", project(w["w_q"], w["b_q"]))
    k = patched("keys", project(w["w_k"], w["b_k"]))
    v = patched("values", project(w["w_v"], w["b_v"]))
    keys, values = (np.repeat(a, N // K, axis=1) for a in (k, v))
    logits = patched("logits", np.einsum("bnth,bnsh->bnts", q, keys) / np.sqrt(H) + BIAS)
    logits = np.where(allowed, logits, -np.inf)
    top = np.max(logits, -1, keepdims=True)
    powers = np.exp(logits - np.where(np.isneginf(top), 0, top))
    total = powers.sum(-1, keepdims=True)
    weights = np.where(allowed, patched("weights", powers / np.where(total == 0, 1, total)), 0)
    heads = np.einsum("bnts,bnsh->bnth", weights, values)
    heads = patched("heads", heads * (gates if np.ndim(gates) == 0 else amount_for("gates", gates)))
    out = np.einsum("bnth,nhd->btd", heads, w["w_o"]) + w["b_o"]
    return {
        "queries": q, "keys": k, "values": v, "logits": logits, "weights": weights, "heads": heads, "out": out,
        "contributions": np.einsum("bnth,nhd->bntd", heads, w["w_o"]),
        "log_sum_exp": np.where(total > 0, top + np.log(np.where(total > 0, total, 1)), -np.inf)[..., 0],
        "entropy": -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), -1),
        "column_sums": np.sum(np.where((np.arange(T) < LENGTHS[:, None])[:, None, :, None], weights, 0), axis=2),
    }  # fmt: skip


def of_all(amounts: Any, names: Any = tuple(SHAPES), gates: Any = None) -> Intervention:
    """Every patch at once, so that one program is enough; amounts not given are 0."""
    nothing = {name: np.zeros(SHAPES[name][:3], np.float32) for name in names}
    given = {name: np.broadcast_to(amount_for(name, amounts[name])[..., 0], SHAPES[name][:3]) for name in amounts}
    patches = {
        name: Patch(VALUES[name], np.asarray(given.get(name, nothing[name]), np.float32)) for name in names
    }  # fmt: skip
    return Intervention(gates=np.ones((B, N, T), np.float32) if gates is None else gates)._replace(**patches)


AMOUNTS: Any = {
    "of heads": lambda n: np.arange(n) == 1,
    "of examples": lambda n: np.stack([np.arange(n) == 0, np.arange(n) != 0]),
    "of tokens, in part": lambda n: np.random.default_rng(5).random((B, n, T)),
}
ON_BLOCKS = ("queries", "keys", "values", "heads")  # what every path can do


@pytest.mark.parametrize("path", ["whole rows", "dense", "blockwise"])
def test_a_patch_does_what_is_done_by_hand(path):
    names = tuple(SHAPES) if path == "whole rows" else ON_BLOCKS
    run = partial(apply, PARAMS, X, CONFIG, mask=MASK, bias=BIAS, kernel="auto" if path == "whole rows" else path)
    close(run(intervention=of_all({}, names)), by_hand({})["out"])
    for name in names:
        for amount in AMOUNTS.values():
            amount = amount(SHAPES[name][1])
            out = run(intervention=of_all({name: amount}, names))
            close(out, by_hand({name: (VALUES[name], amount)})["out"], err_msg=name, atol=2e-5)
    amounts = {name: AMOUNTS["of tokens, in part"](SHAPES[name][1]) for name in names}
    gates = numbers(7, B, N, T)
    out = run(intervention=of_all(amounts, names, gates))
    close(out, by_hand({n: (VALUES[n], a) for n, a in amounts.items()}, gates=gates)["out"], atol=2e-5)


def run(intervention: Intervention, x: Any = X, **options: Any) -> Any:
    return apply(PARAMS, x, CONFIG, mask=MASK, bias=BIAS, intervention=intervention, **options)


@pytest.mark.slow
def test_what_a_run_captured_changes_nothing_when_it_is_patched_back():
    look = jax.jit(attention.apply_captured, static_argnames=("config", "capture"))
    plain, seen = look(PARAMS, X, CONFIG, mask=MASK, bias=BIAS, gates=numbers(3, N), capture=tuple(SHAPES))
    patches = {name: Patch(seen[name], True) for name in SHAPES}
    close(run(Intervention(gates=numbers(3, N))._replace(**patches)), plain)
    assert np.all(np.isneginf(seen["logits"][~ALLOWED]))


def test_ablations():
    off = np.arange(N) == 2
    some = numbers(5, B, N, T, HV)
    real = np.arange(T) < LENGTHS[:, None]
    average = np.sum(some * real[:, None, :, None], (0, 2), keepdims=True) / real.sum()
    for intervention, value in (
        (interventions.zero(off), np.zeros(1)),
        (interventions.mean(some, off, real), average),
        (interventions.resample(some, [1, 0], off), some[::-1]),
    ):
        close(run(intervention), by_hand({"heads": (value, off)})["out"])
    counts = np.maximum(ALLOWED.sum(-1, keepdims=True), 1)
    close(run(interventions.uniform(off)), by_hand({"weights": (ALLOWED / counts, off)})["out"])
    close(run(interventions.frozen(VALUES["weights"], off)), by_hand({"weights": (VALUES["weights"], off)})["out"])
    cut = np.random.default_rng(0).random((B, N, T, T)) < 0.4
    without = by_hand({}, allowed=ALLOWED & ~cut)["out"]
    for kernel in ("dense", "blockwise"):
        close(run(interventions.without_edges(cut), kernel=kernel), without)


@pytest.mark.slow
def test_uniform_holds_with_a_score_and_a_bias_that_masks():
    holes = np.where(np.random.default_rng(0).random((1, N, T, T)) < 0.5, BIAS, -np.inf)
    _, seen = attention.apply_captured(
        PARAMS, X, CONFIG, mask=MASK, bias=holes, score=lambda s, h, q, k: s * h + (q - k),
        intervention=interventions.uniform(), capture=("weights",),
    )  # fmt: skip
    visible = ALLOWED & (holes > -np.inf)
    close(seen["weights"], visible / np.maximum(visible.sum(-1, keepdims=True), 1))


@pytest.mark.parametrize("name", tiered(["zero", "uniform", "frozen", "logits"], "uniform", "logits"))
def test_masked_keys_reach_nothing_and_a_query_that_sees_nothing_gives_zeros(name):
    spoilt = X.copy()
    spoilt[1, 11:] = np.nan  # keys that nobody may see, and queries that are not looked at
    made = {
        "zero": interventions.zero,
        "uniform": interventions.uniform,
        "frozen": partial(interventions.frozen, VALUES["weights"]),
        "logits": partial(interventions.patched, "logits", np.where(ALLOWED, VALUES["logits"], -np.inf)),
    }[name]

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, x, amount):
        out, seen = attention.apply_captured(
            params, x, CONFIG, mask=MASK, intervention=made(amount), capture=("heads", "weights")
        )
        return jnp.sum(out[0] ** 2) + jnp.sum(out[1, :11] ** 2), seen

    amount = np.array([0.0, 1.0, 0.3, 1.0], np.float32)
    (value, seen), gradient = loss(PARAMS, spoilt, amount)
    (sound, _), sound_gradient = loss(PARAMS, np.where(np.isnan(spoilt), 0, X), amount)
    assert np.isfinite(value) and value == sound
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, sound_gradient)
    assert np.all(seen["heads"][:, :, 0] == 0) and np.all(seen["weights"][:, :, 0] == 0)


@pytest.mark.slow
def test_the_gradient_of_an_amount_is_that_of_the_patch():
    direction = numbers(9, B, T, D)
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(direction * run(interventions.uniform(a)))))(np.zeros(N, np.float32))
    for n in range(N):
        moved = [
            np.sum(direction * by_hand({"logits": (0.0, sign * 1e-5 * (np.arange(N) == n))})["out"]) for sign in (1, -1)
        ]
        np.testing.assert_allclose(gradient[n], (moved[0] - moved[1]) / 2e-5, rtol=2e-3, atol=1e-3)
    attribution = jax.jvp(
        lambda a: attention.apply(PARAMS, X, CONFIG, intervention=interventions.uniform(a)), (np.zeros(N, np.float32),),
        (np.ones(N, np.float32),),
    )[1]  # fmt: skip
    assert np.all(np.isfinite(attribution)) and np.any(attribution != 0)


def test_nothing_is_looked_up_by_its_number_where_sentences_are_short():
    """Many ablations by one `vmap`: a gather for every head would be most of the work."""

    def one(amount):
        return run(interventions.uniform(amount))

    text = jax.jit(jax.vmap(one)).lower(np.eye(N, dtype=np.float32)).as_text()
    assert "dot_general" in text and "gather" not in text and "dynamic_slice" not in text


@pytest.mark.slow
def test_long_rows_are_cut_into_blocks(monkeypatch):
    """A few rows at a time, the last block partial: the same numbers and gradients, dropout included."""
    from mhajax.kernels.rowwise import layout

    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(0)}

    def loss(x, intervention):
        given = {"mask": MASK, "bias": BIAS, "intervention": intervention, **options}
        return jnp.sum(attention.apply(PARAMS, x, CONFIG, **given) ** 2)

    intervention = interventions.uniform(np.arange(N) == 1)
    whole = jax.jit(jax.value_and_grad(loss))(X, intervention)
    monkeypatch.setattr(layout, "ROOM", 8 * T)
    cut = jax.jit(jax.value_and_grad(lambda x, i: loss(x, i)))(X, intervention)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), cut, whole)
    dense = jax.jit(lambda x: loss(x, interventions.uniform(np.zeros(N))))(X)
    np.testing.assert_allclose(dense, loss(X, Intervention()), rtol=1e-4)


# Models -----------------------------------------------------------------------------------------------------------

V, L = 11, 3
LM = language_model.Config(d_model=D, num_heads=N, num_kv_heads=K, head_dim=4, num_layers=L, vocab_size=V)
TOKENS: Any = np.random.default_rng(0).integers(0, V, (B, 6))


@pytest.fixture(scope="module")
def lm():
    return random_params(language_model.init_params, LM)


@pytest.mark.slow
def test_all_ablations_are_one_vmap(lm):
    traces = []

    @jax.jit
    def one(amount):
        traces.append(1)
        return language_model.apply(lm, TOKENS, LM, interventions=PerAttention(attention=interventions.uniform(amount)))

    amounts = np.eye(L * N, dtype=np.float32).reshape(L * N, L, N)
    every = jax.jit(jax.vmap(one))(amounts)
    alone = np.stack([one(amount) for amount in amounts])
    assert len(traces) == 1  # amounts are values: nothing is traced again
    np.testing.assert_allclose(every, alone, rtol=1e-4, atol=1e-4)
    plain = language_model.apply(lm, TOKENS, LM)
    np.testing.assert_allclose(one(np.zeros((L, N), np.float32)), plain, rtol=1e-4, atol=1e-4)
    assert np.all(np.abs(every - plain).max((1, 2, 3)) > 1e-3)


@pytest.mark.slow
def test_a_cache_with_an_intervention_gives_what_the_whole_text_gives(lm):
    changed = PerAttention(
        attention=interventions.uniform(np.eye(L * N).reshape(L * N, L, N)[5])._replace(gates=numbers(4, L, N))
    )
    whole = language_model.apply(lm, TOKENS, LM, interventions=changed)
    state = language_model.init_cache((B,), 8, LM)
    extend = partial(language_model.extend, interventions=changed)
    first, state = extend(lm, TOKENS[:, :4], state, LM)
    then, state = extend(lm, TOKENS[:, 4:], state, LM)
    np.testing.assert_allclose(np.concatenate([first, then], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_three_attentions_of_a_translator_are_changed_each():
    config = translator.Config(
        d_model=D, num_heads=N, head_dim=4, encoder_layers=2, decoder_layers=L, vocab_size=V
    )  # fmt: skip
    params = random_params(translator.init_params, config)
    run = jax.jit(partial(translator.apply, config=config), static_argnames="kernel")
    plain = run(params, TOKENS, TOKENS)
    for kind, layers in (("encoder", 2), ("decoder", L), ("cross", L)):
        off = np.arange(layers * N).reshape(layers, N) == 3
        zeroed = PerAttention(**{kind: interventions.zero(off)})
        gated = PerAttention(**{kind: 1.0 - off})
        out = run(params, TOKENS, TOKENS, interventions=zeroed)
        np.testing.assert_allclose(out, run(params, TOKENS, TOKENS, gates=gated), rtol=1e-4, atol=1e-5)
        assert np.max(np.abs(out - plain)) > 1e-3


# What is not asked for, and what is refused -----------------------------------------------------------------------


def test_no_intervention_leaves_no_trace(lm):
    def lowered(**options):
        return jax.jit(lambda x: attention.apply(PARAMS, x, CONFIG, mask=MASK, **options)).lower(X).as_text()

    assert lowered(intervention=Intervention()) == lowered() != lowered(intervention=interventions.zero())

    def lowered_model(**options):
        return jax.jit(lambda t: language_model.apply(lm, t, LM, **options)).lower(TOKENS).as_text()

    assert lowered_model(interventions=PerAttention(), kernel="auto") == lowered_model()


def lm_with(**interventions: Any) -> Any:
    shapes = jax.eval_shape(partial(language_model.init_params, config=LM), jax.random.key(0))
    return jax.eval_shape(partial(language_model.apply, tokens=TOKENS, config=LM, **interventions), shapes)


ERRORS: Any = {
    "value": (
        lambda: run(interventions.patched("logits", np.zeros((T, T + 1)))),
        ValueError,
        ("intervention.logits", "[..., N, T, S] = (2, 4, 29, 29)", "(29, 30)"),
    ),
    "amount": (
        lambda: run(interventions.patched("keys", 0.0, np.ones(N))),
        ValueError,
        ("the amount of intervention.keys must be [K] = (2,)", "[..., K, S] = (2, 2, 29)", "(4,)"),
    ),
    "path": (
        lambda: run(interventions.uniform(), kernel="blockwise"),
        ValueError,
        ("kernel='blockwise' cannot do this", "logits or weights", "kernel='auto' or one of dense"),
    ),
    "gates twice": (
        lambda: run(Intervention(gates=np.ones(N)), gates=np.ones(N)),
        ValueError,
        ("gates must be given once", "intervention.gates"),
    ),
    "name": (lambda: interventions.patched("edges", 0.0), ValueError, ("queries, keys", "'edges'")),
    "no examples": (lambda: interventions.mean(np.zeros((N, T, HV))), ValueError, ("[B, N, T, Hv]", "(4, 29, 5)")),
    "stacked for other layers": (
        lambda: lm_with(interventions=PerAttention(attention=interventions.zero(np.ones((2, N))))),
        ValueError,
        ("num_layers=3", "[2, 3]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, kind, parts = ERRORS[name]
    with pytest.raises(kind) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []
