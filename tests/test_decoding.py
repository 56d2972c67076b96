"""Decoding against enumeration: a model that is a table of probabilities, small enough to try every text."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numbers, random_params
from tiers import tiered

from mhajax import decoding, embedding, translator

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, END, LENGTH = 4, 0, 4
TABLE = 1.5 * numbers(7, 2, LENGTH, V, V, V)  # [B, place, last but one, last, next]
LOG_P = np.asarray(jax.nn.log_softmax(TABLE))
FIRST, BEFORE = np.array([1, 2]), 3


def step(tokens, cache):
    """Logits depend on the example, the place and the last two tokens, of which the cache holds one."""
    example, before, place = cache
    return jnp.asarray(TABLE)[example, place, before, tokens], (example, tokens, place + 1)


def select(cache, rows):
    return cache[0][rows], cache[1][rows], cache[2]


def start(copies=1):
    return jnp.repeat(jnp.arange(2), copies), jnp.full(2 * copies, BEFORE), jnp.int32(0)


def log_p_of(example, text, table=LOG_P):
    """Log-probability of a text, word for word."""
    words = (BEFORE, FIRST[example], *text)
    return sum(table[example, t, *words[t : t + 3]] for t in range(len(text)))


def every_text(example, length_penalty):
    """All texts of an example with their scores, best first: over at END or after LENGTH tokens."""
    found = {}
    for words in itertools.product(range(V), repeat=LENGTH):
        text = words[: words.index(END) + 1] if END in words else words
        filled = text + (END,) * (LENGTH - len(text))
        found[filled] = log_p_of(example, text) / ((5 + len(text)) / 6) ** length_penalty
    return sorted(found.items(), key=lambda item: -item[1])


def search(beams, length_penalty=1.0):
    function = partial(decoding.beam_search, step, select, beams=beams, length=LENGTH, end=END)
    return jax.jit(partial(function, length_penalty=length_penalty))(start(beams), FIRST)


@pytest.mark.parametrize("length_penalty", tiered([0.0, 1.0, 2.5], 1.0))
def test_enough_beams_find_everything(length_penalty):
    result = search(128, length_penalty)
    for example in range(2):
        texts, scores = zip(*every_text(example, length_penalty), strict=True)
        assert len(texts) == 1 + 3 + 9 + 27 * 4
        np.testing.assert_allclose(result.scores[example, : len(scores)], scores, rtol=1e-5)
        np.testing.assert_array_equal(result.tokens[example, : len(texts)], texts)
        assert np.all(np.isneginf(result.scores[example, len(scores) :]))


@pytest.mark.parametrize("length_penalty", tiered([0.0, 1.0, 6.0], 6.0))
def test_few_beams_give_texts_with_their_true_scores(length_penalty):
    result = search(3, length_penalty)
    for example in range(2):
        truth = dict(every_text(example, length_penalty))
        texts = [tuple(text) for text in result.tokens[example].tolist()]
        assert len(set(texts)) == 3
        np.testing.assert_allclose([truth[text] for text in texts], result.scores[example], rtol=1e-5)
        assert np.all(np.diff(result.scores[example]) <= 0)
        best = every_text(example, length_penalty)[:3]  # of these examples three beams find the three best
        assert texts == [text for text, _ in best]


@pytest.mark.parametrize("length_penalty", [-4.0, -1.0, 2.0])
def test_a_search_stops_when_no_text_can_win_whichever_way_the_penalty_goes(length_penalty):
    """Two tokens, one of which ends: one beam is every text. Searches of their own, so that each stops for itself."""
    length = 5
    tables = np.asarray(jax.nn.log_softmax(numbers(8, 64, length, 2)), np.float64)  # [searches, place, next]

    def best(table):
        model = lambda tokens, place: (table[place][None], place + 1)  # noqa: E731
        return decoding.beam_search(
            model, lambda cache, rows: cache, jnp.int32(0), jnp.array([1]),
            beams=1, length=length, end=END, length_penalty=length_penalty,
        ).scores[0, 0]  # fmt: skip

    on = np.cumsum(tables[..., 1], axis=1)  # of going on for so many tokens
    ended = tables[..., END] + on - tables[..., 1]
    of_length = np.concatenate([ended[:, :-1], np.maximum(ended, on)[:, -1:]], axis=1)
    expected = np.max(of_length / ((5 + np.arange(1, length + 1)) / 6) ** length_penalty, axis=1)
    np.testing.assert_allclose(jax.jit(jax.vmap(best))(jnp.asarray(tables, jnp.float32)), expected, rtol=1e-5)


def test_what_no_search_can_do_is_refused():
    first = jnp.asarray(FIRST)
    search = partial(decoding.beam_search, step, select, start(2), first, beams=2, length=3, end=END)
    generate = partial(decoding.generate, step, start(), first, decoding.greedy, jax.random.key(0), length=3)
    for do, kind, said in (
        (partial(search, beams=0), ValueError, "decoding.beam_search: beams must be at least 1, got 0"),
        (partial(search, length=2.0), TypeError, "decoding.beam_search: length must be an integer, got 2.0; write 2"),
        (partial(search, length_penalty=float("nan")), ValueError, "length_penalty must be finite, got nan"),
        (partial(search, end=V), ValueError, "end must be at least 0 and below 4, the number of tokens"),
        (partial(generate, end=-1), ValueError, "decoding.generate: end must be at least 0 and below 4"),
        (partial(generate, length=-1), ValueError, "length must be at least 0, got -1"),
        (partial(search, length_penalty="1"), TypeError, "length_penalty must be a number, got '1'"),
        (
            partial(search, length_penalty=1e5),
            ValueError,
            "must be a float32, got length_penalty=100000.0 and length=3",
        ),
    ):
        with pytest.raises(kind, match=said):
            do()
    with pytest.raises(TypeError, match=r"decoding.generate: key must be a PRNG key, got 0; write jax.random.key\(0\)"):
        decoding.generate(step, start(), first, decoding.greedy, 0, length=3)
    with pytest.raises(TypeError, match=r"choose must be what sampler\(…\) returns, got the function itself; call it"):
        decoding.generate(step, start(), first, decoding.sampler, jax.random.key(0), length=3)  # pyright: ignore
    assert generate(length=0).shape == (2, 0)


@pytest.mark.parametrize(
    ("first", "kind", "said"),
    [
        (jnp.zeros(0, int), ValueError, r"\[B\] with B at least 1, got \(0,\)"),
        (3, TypeError, "integers .*, got 3; write"),
        (jnp.ones((1, 1), int), ValueError, r"got \(1, 1\)"),
        (jnp.ones(2), TypeError, r"got float32\[2\]"),
        ([1], TypeError, "a list"),
    ],
)
def test_what_a_text_goes_on_from_is_a_token_for_every_example(first, kind, said):
    with pytest.raises(kind, match=f"decoding.generate: first must be .*{said}"):
        decoding.generate(step, start(), first, decoding.greedy, jax.random.key(0), length=3)
    with pytest.raises(kind, match=f"decoding.beam_search: first must be .*{said}"):
        decoding.beam_search(step, select, start(2), first, beams=2, length=3, end=END)


@pytest.mark.parametrize(("length_penalty", "text", "steps"), [(6.0, [2, 2, 2, END], 4), (0.0, [END] * 4, 1)])
def test_a_search_goes_on_while_a_longer_text_can_still_win_and_no_longer(length_penalty, text, steps):
    """At every step the text ends with probability 0.55."""
    p, calls = np.array([0.55, 0.0, 0.45, 0.0]), []

    def model(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.broadcast_to(jnp.log(p + 1e-9), (1, V)), cache

    found = decoding.beam_search(
        model, lambda cache, rows: cache, None, jnp.array([1]),
        beams=1, length=4, end=END, length_penalty=length_penalty,
    )  # fmt: skip
    jax.effects_barrier()
    assert found.tokens[0, 0].tolist() == text and len(calls) == steps
    expected = (3 * np.log(0.45) + np.log(0.55)) / 1.5**6 if steps == 4 else np.log(0.55)
    np.testing.assert_allclose(found.scores[0, 0], expected, rtol=1e-5)


def greedy(length=LENGTH, end=END, model=step):
    function = partial(decoding.generate, model, choose=decoding.greedy, key=jax.random.key(0), length=length, end=end)
    return np.asarray(jax.jit(lambda first: function(start(), first))(FIRST))


def greedy_by_hand(end, log_p=LOG_P):
    texts = np.full((2, LENGTH), 0 if end is None else end)
    for example in range(2):
        before, last = BEFORE, FIRST[example]
        for t in range(LENGTH):
            before, last = last, np.argmax(log_p[example, t, before, last])
            texts[example, t] = last
            if last == end:
                break
    return texts


@pytest.mark.parametrize("end", [None, 0, 1, 2, 3])
def test_greedy_is_the_loop(end):
    np.testing.assert_array_equal(greedy(end=end), greedy_by_hand(end))


def test_the_ends_differ_in_the_examples_above():
    """So that the tests of END test something: some text ends early, some does not."""
    ended = [np.any(greedy_by_hand(end)[:, :-1] == end, axis=1) for end in range(V)]
    assert np.any(ended) and not np.all(ended)


def test_one_beam_is_greedy_where_no_text_ends():
    never = TABLE.copy()
    never[..., END] = -50

    def model(tokens, cache):
        example, before, place = cache
        return jnp.asarray(never)[example, place, before, tokens], (example, tokens, place + 1)

    found = decoding.beam_search(
        model, select, start(), jnp.asarray(FIRST), beams=1, length=LENGTH, end=END, length_penalty=0.0
    )
    np.testing.assert_array_equal(found.tokens[:, 0], greedy(model=model))
    texts, log_p = greedy_by_hand(None, never), np.asarray(jax.nn.log_softmax(never))
    for b in range(2):
        np.testing.assert_allclose(found.scores[b, 0], log_p_of(b, texts[b], log_p), rtol=1e-5)


def test_generation_stops_when_all_texts_are_over():
    """A step after the last end would fail the count."""
    calls = []

    def counted(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        logits = jnp.where(cache == 2, jnp.eye(V)[END], jnp.eye(V)[2])
        return jnp.broadcast_to(logits, (2, V)), cache + 1

    tokens = decoding.generate(
        counted, jnp.int32(0), jnp.asarray(FIRST), decoding.greedy, jax.random.key(0), length=50, end=END
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens, [[2, 2] + [END] * 48] * 2)
    assert len(calls) == 3


LOGITS = np.array([2.0, -1.0, 0.5, 1.9, 0.0, -3.0, 1.0], np.float32)


def exact(temperature=1.0, top_k=None, top_p=1.0):
    """The distribution to draw from, by the definitions."""
    p = np.exp(LOGITS / temperature, dtype=np.float64)
    order = np.argsort(-p)
    p[order[len(p) if top_k is None else top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


SAMPLERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 7},
    {"top_k": 100},
    {"top_p": 0.7},
    {"top_p": 0.05},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.8},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
def test_samplers_draw_from_the_exact_distribution(options):
    count, p = 20_000, exact(**options)
    draw = jax.jit(decoding.sampler(**options))
    tokens = draw(jnp.broadcast_to(LOGITS, (count, len(LOGITS))), jax.random.key(1))
    observed = np.bincount(tokens, minlength=len(LOGITS))
    assert np.all(observed[p == 0] == 0) and np.all(p[observed > 0] > 0)
    expected = count * p[p > 0]
    assert np.sum((observed[p > 0] - expected) ** 2 / expected) < 27.9  # chi-square, 6 degrees, 99.99 %


def test_sampled_texts_follow_their_key_and_end_at_the_end():
    generate = jax.jit(
        lambda key: decoding.generate(
            step, start(), jnp.asarray(FIRST), decoding.sampler(), key, length=LENGTH, end=END
        )
    )
    texts = np.stack([generate(jax.random.key(seed)) for seed in range(400)])
    np.testing.assert_array_equal(texts[0], generate(jax.random.key(0)))
    ends = np.cumsum(texts == END, axis=-1) > 0
    assert np.all(texts[ends] == END)
    for example in range(2):  # the first two tokens, against the table
        truth = np.exp(LOG_P[example, 0, BEFORE, FIRST[example]])
        np.testing.assert_allclose(
            np.bincount(texts[:, example, 0], minlength=V) / 400, truth, atol=4 * np.sqrt(0.25 / 400)
        )
        after = texts[texts[:, example, 0] == np.argmax(truth[1:]) + 1, example, 1]
        truth = np.exp(LOG_P[example, 1, FIRST[example], np.argmax(truth[1:]) + 1])
        np.testing.assert_allclose(
            np.bincount(after, minlength=V) / len(after), truth, atol=4 * np.sqrt(0.25 / len(after))
        )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": 1e-45},
        {"temperature": 1e300},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
    ],
    ids=str,
)
def test_samplers_refuse_what_they_cannot_do(options):
    with pytest.raises(
        ValueError, match=r"top_p in \(0, 1\], top_k at least 1 or None, got .*decoding\.greedy"
    ) as caught:
        decoding.sampler(**options)
    assert all(f"{name}={value}" in str(caught.value) for name, value in options.items())


@pytest.fixture(scope="module")
def model():
    """A translator, its parameters, two sources of different length."""
    config = translator.Config(
        d_model=12, num_heads=3, d_ff=13, encoder_layers=1, decoder_layers=2, vocab_size=11, head_dim=4
    )
    params = random_params(translator.init_params, config, seed=4)
    params = params._replace(
        embedding=embedding.Params(params.embedding.tokens / 5)
    )  # lest every token is followed by itself
    return config, params, np.random.default_rng(0).integers(0, 11, (2, 5)), np.array([5, 3])


full_model = jax.jit(translator.apply, static_argnames="config")


def advance(config, params, tokens, state):
    logits, state = translator.extend(params, tokens[:, None], state, config)
    return logits[:, 0], state


@pytest.mark.slow
def test_a_translator_with_cache_writes_what_it_would_without(model):
    config, params, source, lengths = model
    first, length, end = jnp.array([1, 1]), 6, 2

    @jax.jit
    def generate(params):
        state = translator.begin(params, source, length, config, source_lengths=lengths)
        return decoding.generate(
            partial(advance, config, params), state, first, decoding.greedy, jax.random.key(0), length=length, end=end
        )

    full = partial(full_model, config=config)
    target = np.full((2, length + 1), 1)  # later places do not matter: the model is causal
    over = np.zeros(2, bool)
    for t in range(length):
        logits = full(params, source, target, source_lengths=lengths)
        target[:, t + 1] = np.where(over, end, np.argmax(logits[:, t], axis=-1))
        over |= target[:, t + 1] == end
    np.testing.assert_array_equal(generate(params), target[:, 1:])
    assert len(np.unique(target)) > 2


@pytest.mark.slow
def test_beams_of_a_translator_have_the_scores_of_the_full_model(model):
    config, params, source, lengths = model
    beams, length, end = 3, 7, 2

    @jax.jit
    def search(params):
        repeat = lambda a: jnp.repeat(a, beams, axis=0)  # noqa: E731
        state = translator.begin(params, repeat(source), length, config, source_lengths=repeat(lengths))
        model = partial(advance, config, params)
        return decoding.beam_search(
            model, translator.select, state, jnp.array([1, 1]), beams=beams, length=length, end=end, length_penalty=0.6
        )

    found = search(params)
    full = partial(full_model, config=config)
    assert len({tuple(text) for text in found.tokens[0].tolist()}) == beams
    for k in range(beams):
        written = np.asarray(found.tokens[:, k])
        target = np.concatenate([np.ones((2, 1), int), written[:, :-1]], axis=1)
        log_p = jax.nn.log_softmax(full(params, source, target, source_lengths=lengths))
        log_p = np.take_along_axis(np.asarray(log_p), written[..., None], axis=-1)[..., 0]
        counts = np.where(np.any(written == end, axis=1), np.argmax(written == end, axis=1) + 1, length)
        total = np.sum(log_p * (np.arange(length) < counts[:, None]), axis=1)
        np.testing.assert_allclose(found.scores[:, k], total / ((5 + counts) / 6) ** 0.6, rtol=1e-4)
