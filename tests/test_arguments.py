"""What is given is right or refused: a mistake that is easily made gets an error that says what to write instead."""

import dataclasses
import inspect
import typing
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import mhajax
from mhajax import (
    arguments,
    attention,
    block,
    cache,
    drop_in,
    embedding,
    heads,
    interventions,
    language_model,
    linen,
    masks,
    mlp,
    nnx,
    options,
    positions,
    scores,
    transformer,
    translator,
    variants,
)
from mhajax.attentions import PerAttention

B, T, D, N, V = 2, 5, 4, 2, 11
PLAIN = embedding.Config(d_model=D, positions="none")
SHAPE = {"d_model": D, "num_heads": N}
CONFIGS = {
    "attention": attention.Config(**SHAPE),
    "mlp": mlp.Config(d_model=D),
    "block": block.Config(**SHAPE),
    "transformer": transformer.Config(**SHAPE, num_layers=1),
    "language_model": language_model.Config(**SHAPE, num_layers=1, vocab_size=V),
    "translator": translator.Config(**SHAPE, encoder_layers=1, decoder_layers=1, vocab_size=V),
}
VARIANTS = {name: CONFIGS["attention"] for name in variants.__all__}
MODULES = {name: getattr(mhajax, name) for name in CONFIGS} | {name: getattr(variants, name) for name in VARIANTS}
KEY = jax.random.key(0)
X, TOKENS, BOOLEANS = jnp.ones((B, T, D)), jnp.ones((B, T), int), jnp.ones((B, T), bool)


@pytest.fixture(scope="module")
def params():
    """Of every module: zeros will do, nothing here is computed."""
    made = {}
    for name, config in (CONFIGS | VARIANTS).items():
        shapes = jax.eval_shape(partial(MODULES[name].init_params, config=config), KEY)
        made[name] = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return made


def inputs(name):
    return {"language_model": (TOKENS,), "translator": (TOKENS, TOKENS)}.get(name, (X,))


def call(params, name, *, function="apply", **given):
    return getattr(MODULES[name], function)(params[name], *inputs(name), (CONFIGS | VARIANTS)[name], **given)


def message(do, kind=TypeError) -> str:
    with pytest.raises(kind) as caught:
        do()
    return str(caught.value)


# The kinds of mistakes, for all that they can be made with ---------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS | VARIANTS)
def test_the_order_of_arguments(params, name):
    config, module, given = (CONFIGS | VARIANTS)[name], MODULES[name], inputs(name)
    swapped = message(lambda: module.apply(params[name], config, *given))
    who = {"transformer": "transformer.run"}.get(name, f"{name}.apply")
    assert swapped.startswith(f"{who}: ") and f"The order is {who}(params, " in swapped
    assert "must be an array, got a" in swapped and "Config must be" not in swapped
    assert "params must be" in message(lambda: module.apply(params[name]._asdict(), *given, config))
    assert "write jnp.asarray(" in message(lambda: module.apply(params[name], *[[1]] * len(given), config))
    assert f"{name}.init_params(key, config)" in message(lambda: module.init_params(config, KEY))


@pytest.mark.parametrize("name", CONFIGS | VARIANTS)
def test_keys_are_keys(name):
    init = partial(MODULES[name].init_params, config=(CONFIGS | VARIANTS)[name])
    said = message(lambda: init(7))
    assert said == f"{name}.init_params: key must be a PRNG key, got 7; write jax.random.key(7)."
    assert "jax.vmap over several" in message(lambda: init(jax.random.split(KEY, 3)))
    jax.eval_shape(init, jax.random.PRNGKey(0))  # the old ones are keys too


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mlp"])
def test_keys_of_dropout_are_keys(params, name):
    rate = {"dropout_rate": 0.1} if name == "attention" else {}
    assert "dropout_key must be a PRNG key, got 0; write jax" in message(
        lambda: call(params, name, dropout_key=0, **rate)
    )


def fields(kind: type):
    return [
        (name, field.name)
        for name, config in CONFIGS.items()
        for field in dataclasses.fields(config)
        if kind in typing.get_args(hint := typing.get_type_hints(type(config))[field.name]) or hint is kind
    ]


@pytest.mark.parametrize(("name", "field"), fields(int))
def test_every_size_is_an_integer(name, field):
    change = lambda value: dataclasses.replace(CONFIGS[name], **{field: value})  # noqa: E731
    assert message(lambda: change(64.0)) == f"{field} must be an integer, got 64.0; write 64."
    assert message(lambda: change(True)) == f"{field} must be an integer, got True."
    assert f"{field} must be an integer, got '64'" in message(lambda: change("64"))
    assert message(lambda: change(0), ValueError) == f"{field} must be at least 1, got 0."


@pytest.mark.parametrize(("name", "field"), fields(bool) + fields(float))
def test_every_other_number_is_one(name, field):
    assert f"{field} must be" in message(lambda: dataclasses.replace(CONFIGS[name], **{field: "0.1"}))


@pytest.mark.parametrize("name", [name for name in CONFIGS | VARIANTS if name != "mlp"])
def test_an_option_that_does_not_exist(params, name):
    said = message(lambda: call(params, name, kernal="dense"))
    assert said.startswith(f"{name}.apply: there is no option 'kernal'; did you mean 'kernel'? The options are ")
    if name not in VARIANTS:
        assert "which returns it" in message(lambda: call(params, name, capture=("weights",)))
    if name in ("attention", "language_model", "translator"):
        assert f"{name}.apply_captured" in message(lambda: call(params, name, capture=("weights",)))
        assert "did you mean" in message(lambda: call(params, name, function="apply_captured", kernal="dense"))


@pytest.mark.parametrize("name", [name for name in CONFIGS | VARIANTS if name not in ("mlp", "translator")])
def test_a_mask_that_is_not_called_and_one_of_padding(params, name):
    given = partial(call, params, name)
    assert "mask must be a Mask or booleans, got the function masks.causal itself; call it: masks.causal()." in message(
        lambda: given(mask=masks.causal)
    )
    assert "masks.function(…)" in message(lambda: given(mask=lambda q, k: q >= k))
    padding = message(lambda: given(mask=BOOLEANS), ValueError)
    assert "masks.dense(mask[:, None, None, :])" in padding and "masks.lengths(mask.sum(-1))" in padding
    assert "cut the array" in message(lambda: given(mask=jnp.ones((3, T), bool)), ValueError)


def extend(params, **given):
    return cache.extend(
        params["attention"], X, cache.init((B,), 9, CONFIGS["attention"]), CONFIGS["attention"], **given
    )


HEADS = jnp.ones((B, T, N, D))
JAX, FLAX = drop_in.dot_product_attention, nnx.attention_fn
MORE = {
    "padding of sources": (
        lambda p: call(p, "translator", source_lengths=BOOLEANS), TypeError,
        ("translator.apply: source_lengths must be integers [...]", "got bool[2,5]", "array.sum(-1)"),
    ),
    "mask of a translator": (lambda p: call(p, "translator", mask=masks.causal()), TypeError, ("source_lengths=",)),
    "gates of no attention": (
        lambda p: call(p, "language_model", gates=jnp.ones((1, N))), TypeError,
        ("gates must be a PerAttention, got float32[1,2]", "write mhajax.PerAttention(attention=…)"),
    ),
    "gates of another model": (
        lambda p: call(p, "translator", gates=PerAttention(attention=jnp.ones((1, N)))), ValueError,
        ("gates must be for any of the attentions encoder, decoder, cross, got attention",),
    ),
    "interventions": (
        lambda p: call(p, "block", interventions=interventions.zero()), TypeError,
        ("interventions must be a PerAttention", "attention=…"),
    ),
    "intervention": (
        lambda p: call(p, "attention", intervention=interventions.zero), TypeError,
        ("intervention must be interventions.Intervention, got the function interventions.zero",),
    ),
    "score that is not called": (
        lambda p: call(p, "attention", score=scores.alibi), TypeError, ("what scores.alibi(…) returns", "call it")
    ),
    "score of numbers": (lambda p: call(p, "attention", score=X), TypeError, ("score must be a function (score",)),
    "rotate": (
        lambda p: call(p, "attention", rotate=positions.frequencies(2)), TypeError, ("rotate=positions.rotary",)
    ),
    "positions": (lambda p: call(p, "attention", positions=[0, 1, 2, 3, 4]), TypeError, ("jnp.asarray",)),
    "mask of a cache": (lambda p: extend(p, mask=masks.causal), TypeError, ("cache.extend: mask", "masks.causal()")),
    "positions of a cache": (
        lambda p: extend(p, positions=jnp.arange(T)), TypeError, ("cache.extend: there is no", "the cache knows them")
    ),
    "no cache": (
        lambda p: cache.extend(p["attention"], X, 9, CONFIGS["attention"]), TypeError,
        ("cache must be cache.Cache, got 9", "cache.init("),
    ),
    "no token": (
        lambda p: cache.extend(
            p["attention"], X[:, :0], cache.init((B,), 9, CONFIGS["attention"]), CONFIGS["attention"]
        ),
        ValueError, ("cache.extend: x must hold at least one token, got T=0",),
    ),
    "edges": (lambda p: interventions.without_edges(masks.causal), TypeError, ("interventions.without_edges: mask",)),
    "jax.nn's mask": (lambda p: JAX(HEADS, HEADS, HEADS, mask=masks.causal), TypeError, ("masks.causal()",)),
    "jax.nn's padding": (
        lambda p: JAX(HEADS, HEADS, HEADS, mask=BOOLEANS), ValueError,
        ("mask must broadcast to [..., N, T, S] = (2, 2, 5, 5), got (2, 5)", "masks.dense(mask[:, None, None, :])"),
    ),
    "jax.nn's mask of more queries": (  # was cut, in silence
        lambda p: JAX(HEADS, HEADS, HEADS, mask=jnp.ones((7, T), bool)), ValueError, ("got (7, 5)", "use 1"),
    ),
    "jax.nn's Mask of more queries": (
        lambda p: JAX(HEADS, HEADS, HEADS, mask=masks.dense(jnp.ones((7, T), bool))), ValueError,
        ("dot_product_attention: mask must be for T=5 queries",),
    ),
    "Flax's padding": (lambda p: FLAX(HEADS, HEADS, HEADS, mask=BOOLEANS), ValueError, ("nnx.attention_fn", "padding")),
    "causal, one query": (  # Flax's own layer saw key 0 only when it decodes
        lambda p: FLAX(HEADS[:, :1], HEADS, HEADS, is_causal=True), ValueError,
        ("nnx.attention_fn: is_causal with one query and 5 keys", "leave is_causal out"),
    ),
    "no rngs": (
        lambda p: nnx.MultiHeadAttention(CONFIGS["attention"], rngs=0), TypeError, ("flax.nnx", "write nnx.Rngs(0)")
    ),
    "config of another module, nnx": (
        lambda p: nnx.Model(CONFIGS["attention"], rngs=flax_nnx.Rngs(0)), TypeError,
        ("nnx.Model: config must be the Config of a model", "got an attention.Config"),
    ),
    "config of another module, linen": (
        lambda p: linen.Model(CONFIGS["attention"]).init(KEY, TOKENS), TypeError,
        ("linen.Model: config must be the Config of a model", "got an attention.Config"),
    ),
    "option of a module": (
        lambda p: nnx.MultiHeadAttention(CONFIGS["attention"], rngs=flax_nnx.Rngs(0))(X, msk=None), TypeError,
        ("there is no option 'msk'; did you mean 'mask'?",),
    ),
    "head that is not there": (
        lambda p: call(p, "attention", function="apply_captured", capture=interventions.Capture(heads=(N,))),
        ValueError, ("capture.heads must be below 2",),
    ),
    "row of a cache": (
        lambda p: cache.select(cache.init((B,), 9, CONFIGS["attention"]), jnp.array([0, B])), ValueError,
        ("cache.select: rows must be at least 0 and below 2, the number of rows of the cache, got 2",),
    ),
    "example that is not there": (
        lambda p: interventions.resample(jnp.ones((B, N, T, 2)), [0, -1]), ValueError,
        ("interventions.resample: order must be at least 0 and below 2, the number of examples, got -1",),
    ),
    "no cache in it": (lambda p: cache.overflowed(()), TypeError, ("cache.overflowed: state must hold a cache",)),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_other_mistakes(params, name):
    do, kind, parts = MORE[name]
    said = message(lambda: do(params), kind)
    assert [part for part in parts if part not in said] == []


# Signatures --------------------------------------------------------------------------------------------------------

SHOWN = {
    **{f"{name}.apply": module.apply for name, module in MODULES.items() if name != "mlp"},
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (attention, language_model, translator)
        for name in ("apply_captured", "features", "extend")
        if hasattr(module, name)
    },
    "transformer.run": transformer.run,
    "cache.extend": cache.extend,
    **{
        f"{module.__name__}.{name}.{method}": getattr(getattr(module, name), method)
        for module in (linen, nnx)
        for name in ("MultiHeadAttention", "Model")
        for method in ("__call__", "features")[: 1 + (name != "MultiHeadAttention")]
    },
}


@pytest.mark.parametrize("name", SHOWN)
def test_signatures_show_every_keyword(name):
    found = inspect.signature(SHOWN[name]).parameters
    assert {"kernel", "mask" if "ranslator" not in name else "gates"} <= set(found)
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in found.values())
    assert found["kernel"].annotation == "str | Path" and found["kernel"].default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    ("declared", "used", "besides"),
    [
        (options.LayerOptions, attention.apply_to, {"memory_positions"} ^ {"start", "keys", "cached", "capture"}),
        (block.Options, block.run, {"cache", "capture"}),
    ],
)
def test_what_is_declared_is_what_is_used(declared, used, besides):
    explicit = {p.name: p for p in inspect.signature(used).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(declared.__annotations__) ^ set(explicit) == besides
    for name in set(declared.__annotations__) & set(explicit):
        assert declared.__annotations__[name].__forward_arg__ == explicit[name].annotation


def test_jit_finds_its_static_arguments_in_the_signature():
    with pytest.raises(ValueError, match="kernal"):
        jax.jit(attention.apply, static_argnames=("config", "kernal"))


# What is there after `import mhajax` -------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [mhajax, heads])
def test_public_modules_are_there_and_nothing_else_is_shown(package):
    assert dir(package) == sorted(package.__all__)
    assert [name for name in package.__all__ if not hasattr(package, name)] == []
    folder = Path(package.__file__ or "").parent
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    hidden = {"__init__", "arguments", "checks", "dropout", "options", "precision", "version"}
    assert there - hidden == {n for n in package.__all__ if inspect.ismodule(getattr(package, n))}
    with pytest.raises(AttributeError, match="has no attribute 'haeds'"):
        package.haeds  # noqa: B018


def test_types_and_styles_are_in_the_wheel():
    import tomllib

    root = Path(__file__).parent.parent
    assert (root / "mhajax" / "py.typed").exists()
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["mhajax"]
    for package, patterns in data.items():
        folder = root.joinpath(*package.split("."))
        assert all(list(folder.glob(pattern)) for pattern in patterns)
        assert [file for file in folder.iterdir() if file.suffix == ".css" and file.name not in patterns] == []


# Indices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, -100, V, 2**31 - 1])
def test_an_id_that_is_not_in_the_table_is_no_row_of_it(wrong):
    table = jax.random.normal(KEY, (V, D))
    tokens = jnp.array([[0, wrong, V - 1]])
    embed = lambda table, tokens: embedding.apply(embedding.Params(table), tokens, PLAIN)  # noqa: E731
    said = message(lambda: embed(table, tokens), ValueError)
    assert f"tokens must be at least 0 and below {V}, the number of tokens in the vocabulary, V, got {wrong}" in said
    got = jax.jit(embed)(table, tokens)
    assert np.isnan(got[0, 1]).all()
    np.testing.assert_array_equal(got[0, ::2], np.asarray(table)[[0, -1]] * D**0.5)
    gradient = jax.jit(jax.grad(lambda table, tokens: jnp.nansum(embed(table, tokens))))(table, tokens)
    np.testing.assert_array_equal(gradient[1:-1], 0)  # and no other row is trained


@pytest.mark.parametrize("wrong", [-1, V])
def test_models_refuse_ids_that_they_do_not_know(params, wrong):
    bad = TOKENS.at[1, 2].set(wrong)
    config, known = CONFIGS["language_model"], params["language_model"]
    assert "embedding.apply: tokens" in message(lambda: language_model.apply(known, bad, config), ValueError)
    logits = jax.jit(lambda tokens: language_model.apply(known, tokens, config))(bad)
    expected = np.zeros((B, T), bool)
    expected[1, 2:] = True  # who sees it, and nobody else
    np.testing.assert_array_equal(np.isnan(logits).any(-1), expected)
    for source, target in ((bad, TOKENS), (TOKENS, bad)):
        translate = partial(translator.apply, params["translator"], source, target, CONFIGS["translator"])
        assert "embedding.apply: tokens" in message(translate, ValueError)


def test_an_example_that_is_not_there_is_nan_under_jit():
    captured = jax.random.normal(KEY, (3, N, T, 2))
    value = jax.jit(lambda order: interventions.resample(captured, order).heads.value)(jnp.array([2, -1, 3]))
    np.testing.assert_array_equal(value[0], captured[2])
    assert np.isnan(value[1:]).all()


# Caches that are full ----------------------------------------------------------------------------------------------


def test_a_cache_says_which_rows_are_full(params):
    config = CONFIGS["attention"]
    real = jnp.array([[True, True, False], [True, True, True]])

    @jax.jit
    def step(state):
        out, state, _ = cache.extend(params["attention"], X[:, :3], state, config, real=real, mask=masks.causal())
        return out, state, cache.overflowed(state)

    state = cache.init((B,), 5, config)
    for full in ([False, False], [False, True], [True, True]):
        out, state, told = step(state)
        assert told.tolist() == full
        np.testing.assert_array_equal(np.isnan(out).all((1, 2)), told)
    rolling = cache.Cache(state.k, state.v, state.length, rolling=True)
    assert cache.overflowed(rolling).tolist() == [False, False]


def test_the_caches_of_models_say_so_too(params):
    config, state = CONFIGS["language_model"], language_model.init_cache((B,), T, CONFIGS["language_model"])
    extend = jax.jit(partial(language_model.extend, config=config))
    _, state = extend(params["language_model"], TOKENS, state)
    assert not cache.overflowed(state)
    _, state = extend(params["language_model"], TOKENS, state)
    assert cache.overflowed(state)
    begun = jax.eval_shape(lambda: translator.begin(params["translator"], TOKENS, T, CONFIGS["translator"]))
    assert jax.eval_shape(cache.overflowed, begun).shape == ()


def test_what_came_is_described_shortly():
    given = [3, "a", None, np.float32(1), X, masks.causal(), attention.Config, len, partial(len), import_module("math")]
    assert [arguments.kind_of(one) for one in given] == [
        "3", "'a'", "None", "np.float32(1.0)", "float32[2,5,4]", "a masks.by_position.Causal",
        "the class attention.Config", "the function len", "a functools.partial", "a module",
    ]  # fmt: skip
