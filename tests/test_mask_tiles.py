"""Bounds of tiles against the pairs themselves, for every kind of mask and random combinations of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhajax import masks
from mhajax.masks import Tiles, Tokens

B, N, T, S = 2, 3, 13, 17
_random = np.random.default_rng(7)
SHUFFLED = Tokens(0, _random.permutation(T)), Tokens(0, _random.permutation(S) + 2)
EXAMPLES = Tokens(0, _random.integers(0, 9, (B, T))), Tokens(0, _random.integers(0, 9, (B, S)))
INDICES = masks.tokens(T), masks.tokens(S)
SIZES = ((1, 1), (2, 3), (5, 4), (13, 17), (32, 7), (4, 64))


def sorted_segments(random, size):
    return np.sort(random.integers(0, 4, size))


# name: a mask made from random numbers
KINDS = {
    "causal": lambda random: masks.causal(),
    "window": lambda random: masks.window(int(random.integers(0, 6)), after=int(random.integers(0, 3))),
    "narrow window": lambda random: masks.window(0),
    "prefix": lambda random: masks.prefix(int(random.integers(0, S + 3))),
    "prefixes": lambda random: masks.prefix(random.integers(0, S + 3, B)),
    "chunk": lambda random: masks.chunk(int(random.integers(1, 7))),
    "length": lambda random: masks.lengths(int(random.integers(0, S + 3))),
    "lengths": lambda random: masks.lengths(random.integers(0, S + 3, B)),
    "dense": lambda random: masks.dense(random.random((T, S)) < random.choice([0.03, 0.5, 0.97])),
    "dense, all axes": lambda random: masks.dense(random.random((B, N, T, S)) < 0.9),
    "dense, shared queries": lambda random: masks.dense(random.random((B, 1, 1, S)) < 0.8),
    "dense, shared keys": lambda random: masks.dense(random.random((T, 1)) < 0.8),
    "per example": lambda random: masks.per_example(random.random((B, T, S)) < 0.1),
    "per head": lambda random: masks.per_head(random.random((N, T, S)) < 0.9),
    "segments": lambda random: masks.segments(random.integers(0, 4, T), random.integers(0, 4, S)),
    "packed": lambda random: masks.segments(sorted_segments(random, (B, T)), sorted_segments(random, (B, S))),
    "function": lambda random: masks.function(every_other, int(random.integers(1, 4))),
}
EXACT = [name for name in KINDS if name not in ("segments", "packed", "function")]


def every_other(q, k, step):
    return (q - k) % step == 0


def combined(random, depth):
    """A random tree of &, | and ~ over random masks."""
    if depth == 0 or random.random() < 0.15:
        return KINDS[random.choice(list(KINDS))](random)
    how = random.integers(3)
    if how == 2:
        return ~combined(random, depth - 1)
    first, second = combined(random, depth - 1), combined(random, depth - 1)
    return first & second if how else first | second


def whole(array, shape):
    return np.broadcast_to(np.asarray(array), (B, N, *shape))


def truth(mask, queries, keys, rows, columns):
    """Any and all over the pairs of every tile, by slicing."""
    pairs = whole(mask.block(queries, keys), (queries.size, keys.size))
    cuts = [
        [pairs[:, :, t : t + rows, s : s + columns] for s in range(0, keys.size, columns)]
        for t in range(0, queries.size, rows)
    ]
    over = lambda reduce: np.moveaxis(np.array([[reduce(cut, (2, 3)) for cut in row] for row in cuts]), (0, 1), (2, 3))  # noqa: E731
    return Tiles(over(np.any), over(np.all))


def holds(tiles, expected, exact=False):
    """The bounds do not claim more than is so; if exact, not less either."""
    nonempty, full = (whole(bound, expected.nonempty.shape[-2:]) for bound in tiles)
    assert all(bound.dtype == bool and bound.shape[-2:] == expected.nonempty.shape[-2:] for bound in tiles)
    if exact:
        np.testing.assert_array_equal(nonempty, expected.nonempty)
        np.testing.assert_array_equal(full, expected.full)
    assert not np.any(expected.nonempty & ~nonempty), "a tile with a pair is left out"
    assert not np.any(full & ~expected.full), "a tile is said to be full and is not"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("where", [INDICES, SHUFFLED, EXAMPLES], ids=["indices", "shuffled", "per example"])
def test_bounds_of_every_kind(name, where):
    random = np.random.default_rng(1)
    for rows, columns in SIZES:
        mask = KINDS[name](random)
        tiles = mask.tiles(*where, rows, columns)
        assert all(isinstance(bound, np.ndarray) for bound in tiles)
        holds(tiles, truth(mask, *where, rows, columns), exact=where is INDICES and name in EXACT)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_of_random_combinations(seed):
    random = np.random.default_rng(seed)
    mask = combined(random, 3)
    where = (INDICES, SHUFFLED, EXAMPLES)[seed % 3]
    rows, columns = SIZES[random.integers(len(SIZES))]
    expected = truth(mask, *where, rows, columns)
    holds(mask.tiles(*where, rows, columns), expected)
    holds(masks.known_tiles(mask, *where, rows, columns), expected)


def test_segments_in_order_leave_out_what_is_far_apart():
    """Packed texts: bounds by smallest and largest are exact for them where tiles do not straddle."""
    packed = masks.segments(np.repeat([0, 1, 2], 4))
    tiles = packed.tiles(masks.tokens(12), masks.tokens(12), 4, 2)
    np.testing.assert_array_equal(tiles.nonempty, np.repeat(np.eye(3, dtype=bool), 2, axis=1))
    np.testing.assert_array_equal(tiles.full, tiles.nonempty)


ALL = masks.causal() & masks.window(5) | masks.prefix(np.array([3, 0])) & ~masks.chunk(4) & masks.lengths(np.array(9))
ALL |= masks.segments(np.arange(T) // 4, np.arange(S) // 4) & masks.dense(_random.random((T, S)) < 0.5)


def test_what_is_known_stays_known_inside_jit():
    """NumPy while an outer function is traced: a kernel chooses its tiles then. Concrete JAX arrays count as known."""
    seen = []

    @jax.jit
    def trace(x):
        seen.extend(mask.tiles(masks.tokens(T), masks.tokens(S), 4, 5) for mask in (ALL, on_device))
        return x

    on_device = jax.tree.map(jnp.asarray, ALL)
    trace(0.0)
    for tiles in seen:
        assert all(isinstance(bound, np.ndarray) for bound in tiles)
        holds(tiles, truth(ALL, *INDICES, 4, 5))


def test_what_is_not_known_is_found_at_run_time_without_retracing():
    traces = []

    @jax.jit
    def bounds(mask, queries, keys):
        traces.append(None)
        return mask.tiles(queries, keys, 4, 5)

    make = lambda n: masks.causal() & masks.window(n) & masks.lengths(np.array([n, 3])) | masks.chunk(n + 1)  # noqa: E731
    for n in (2, 5):
        queries, keys = Tokens(n, np.arange(T) + n), Tokens(1, np.arange(S))
        holds(bounds(make(n), queries, keys), truth(make(n), queries, keys, 4, 5))
    assert len(traces) == 1


def test_starts_that_are_traced():
    """Lengths, segments and pairs written out are looked up at the start, which a cache knows at run time only."""
    arrays = masks.segments(np.arange(T) // 3, np.arange(S) // 4) | masks.dense(_random.random((T, S)) < 0.2)
    mask = arrays & masks.lengths(11)
    bounds = jax.jit(lambda t, s: mask.tiles(Tokens(t, np.arange(7)), Tokens(s, np.arange(11)), 2, 3))
    for t, s in ((0, 0), (5, 4)):
        where = Tokens(t, np.arange(7)), Tokens(s, np.arange(11))
        expected = truth(mask, *where, 2, 3)
        holds(bounds(t, s), expected)
        holds(mask.tiles(*where, 2, 3), expected)


def test_known_tiles_hold_for_whatever_is_traced():
    """causal() & lengths(n), n traced: what is above the diagonal is left out when the program is traced."""
    found = []

    @jax.jit
    def trace(n):
        for mask in (masks.causal() & masks.lengths(n), ~(masks.causal() | masks.lengths(n))):
            found.append(masks.known_tiles(mask, *INDICES, 4, 5))
            assert not isinstance(mask.tiles(*INDICES, 4, 5).nonempty, np.ndarray)
        return n

    trace(3)
    causal = masks.causal().tiles(*INDICES, 4, 5)
    assert all(isinstance(bound, np.ndarray) for tiles in found for bound in tiles)
    np.testing.assert_array_equal(found[0].nonempty, causal.nonempty)
    np.testing.assert_array_equal(found[0].full, np.zeros((4, 4), bool))
    np.testing.assert_array_equal(found[1].nonempty, ~causal.full)


def test_no_mask_is_every_pair():
    tiles = masks.known_tiles(None, *INDICES, 4, 5)
    assert tiles.nonempty.all() and tiles.full.all() and tiles.full.shape == (4, 4)


def test_a_mask_that_only_defines_block_is_unknown():
    class Mine(masks.Mask):
        pass

    tiles = Mine().tiles(*INDICES, 4, 5)
    assert tiles.nonempty.all() and not tiles.full.any() and tiles.nonempty.shape == (4, 4)


def test_bounds_are_cheap():
    """Bounds of a million tokens: nothing of the size of the pairs is made."""
    long = masks.tokens(2**20)
    mask = masks.causal() & masks.window(4096) & masks.lengths(2**19) | masks.chunk(2**14) & ~masks.prefix(2**10)
    tiles = mask.tiles(long, long, 2**14, 2**14)
    assert tiles.nonempty.shape == (64, 64) and 64 <= tiles.nonempty.sum() <= 2 * 64
    program = jax.make_jaxpr(lambda mask, at: mask.tiles(Tokens(0, at), Tokens(0, at), 2**14, 2**14))(
        mask, long.position
    )
    sizes = [max([var.aval.size for var in eqn.outvars]) for eqn in program.eqns]
    assert max(sizes) <= 2**20


def test_origin_is_the_first_position_if_they_go_up_by_one():
    assert masks.tokens(5).origin == 0
    assert Tokens(0, np.arange(3, 9)).origin == 3
    assert Tokens(0, jnp.arange(3, 9)).origin == 3
    assert Tokens(0, np.array([0, 1, 3])).origin is None
    assert Tokens(0, np.zeros((2, 3), int)).origin is None
    jax.jit(lambda at: [] if Tokens(0, at).origin is None else 1 / 0)(np.arange(3))
