"""How masks are printed, drawn, and taken apart for kernels with options of their own."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhajax import masks

PADDED = np.array([4, 0])
PACKED = np.array([0, 0, 1, 1, 1])


def near(q, k, reach, options):
    return (abs(q - k) < reach) & (options["table"][0, 0] > 0)


CAUSAL, WINDOW, CHUNK = masks.causal(), masks.window(4), masks.chunk(8)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (CAUSAL, "causal()"),
        (CAUSAL & WINDOW, "causal() & window(before=4)"),
        (masks.window(4, after=np.int32(1)), "window(before=4, after=1)"),
        (masks.prefix(3) | CAUSAL & CHUNK, "prefix(3) | causal() & chunk(8)"),
        ((masks.prefix(3) | CAUSAL) & ~CHUNK, "(prefix(3) | causal()) & ~chunk(8)"),
        (~(CAUSAL & ~(WINDOW | CHUNK)), "~(causal() & ~(window(before=4) | chunk(8)))"),
        (masks.lengths(jnp.asarray(PADDED)), "lengths(int32[2])"),
        (masks.segments(PACKED.astype(np.int32)), "segments(int32[5], int32[5])"),
        (masks.per_head(np.ones((3, 5, 7), bool)), "dense(bool[3,5,7])"),
        (masks.function(near, 2, {"table": np.ones((2, 3), np.float32)}), "function(near, 2, float32[2,3])"),
    ],
    ids=str,
)
def test_a_mask_is_printed_as_it_is_written(mask, text):
    assert repr(mask) == str(mask) == text


def test_a_mask_whose_numbers_are_not_known_is_printed_too():
    texts = []
    jax.jit(lambda mask: texts.append(repr(mask)) or 0)(WINDOW & masks.lengths(PADDED.astype(np.int32)))
    assert texts == ["window(before=int32[], after=int32[]) & lengths(int32[2])"]


def test_a_picture_has_a_character_for_every_pair():
    title, *lines = (CAUSAL & masks.window(1) | masks.prefix(1)).show(4, 6).splitlines()
    assert lines == ["█·····", "██····", "███···", "█·██··"]
    assert title == "causal() & window(before=1) | prefix(1): 4 queries (down) × 6 keys"


def test_a_picture_of_a_mask_that_is_written_out_needs_no_size():
    array = np.random.default_rng(0).random((2, 3, 4, 5)) < 0.5
    title, *lines = masks.dense(array).show().splitlines()
    assert [[c == "█" for c in line] for line in lines] == array[0, 0].tolist()
    assert title.endswith("4 queries (down) × 5 keys, the first of 2×3")
    assert len(CAUSAL.show(5).splitlines()) == 6
    assert len((CAUSAL & masks.segments(PACKED)).show().splitlines()[1]) == 5


@pytest.mark.parametrize("size", [40, 4000], ids=["every pair looked at", "by bounds"])
def test_a_picture_of_many_pairs_shows_tiles(size):
    """Ten characters in a line: each is a tenth of the keys, and twice as many queries."""
    unit = size // 10
    title, *lines = (masks.chunk(2 * unit) & masks.lengths(8 * unit + unit // 2)).show(size, width=10).splitlines()
    assert lines == ["██········", "··██······", "····██····", "······██··", "········▒·"]
    assert f"█ is {2 * unit} × {unit} pairs" in title


def test_a_picture_fits_its_width_however_long_the_text():
    for queries, keys in ((7, 1000), (1000, 7), (101, 103), (11, 11), (12, 11)):
        _, *lines = CAUSAL.show(queries, keys, width=11).splitlines()
        assert len(lines) <= 11 and all(len(line) <= 11 for line in lines)


def test_conditions_of_masks_that_kernels_have_options_for():
    found = masks.conditions(CAUSAL & masks.lengths(PADDED))
    assert found.causal and found.lengths is PADDED
    assert found.window is found.segments is None and found.rest == ()
    assert masks.conditions(CAUSAL) == masks.Conditions(causal=True)
    assert masks.conditions(None) == masks.Conditions()
    segments = masks.conditions(masks.segments(PACKED, 2 * PACKED)).segments
    assert segments is not None and segments[0] is PACKED and segments[1].tolist() == [0, 0, 2, 2, 2]


def test_conditions_keep_what_they_do_not_know():
    first, second = masks.segments(PACKED), masks.segments(PACKED[::-1])
    either = CAUSAL | CHUNK
    found = masks.conditions(first & (either & ~~(second & ~CAUSAL)) & CHUNK)
    assert not found.causal and found.segments is not None and found.segments[0] is PACKED
    assert found.rest[0] is either and found.rest[1] is second and found.rest[3] is CHUNK
    assert repr(found.rest[2]) == "~causal()" and len(found.rest) == 4


@pytest.mark.parametrize(
    ("mask", "causal", "window"),
    [
        (masks.window(4, after=2), False, (4, 2)),
        (masks.window(4), True, (4, 0)),
        (masks.window(4, after=2) & CAUSAL, True, (4, 0)),
        (masks.window(4, after=2) & masks.window(np.int32(7), after=1), False, (4, 1)),
        (masks.window(jnp.asarray(4), after=2), False, (4, 2)),
    ],
    ids=str,
)
def test_a_window_with_nothing_ahead_is_causal(mask, causal, window):
    found = masks.conditions(mask)
    assert (found.causal, found.window) == (causal, window)
    assert all(type(edge) is int for edge in found.window)


def test_the_shorter_of_two_lengths_counts():
    found = masks.conditions(masks.lengths(PADDED) & masks.lengths(3) & masks.lengths(np.array([5, 2])))
    np.testing.assert_array_equal(found.lengths, [3, 0])


def test_conditions_under_jit_keep_what_is_traced():
    @jax.jit
    def traced(mask):
        found = masks.conditions(mask)
        assert found.causal and found.rest == ()
        return found.window, found.lengths

    window, lengths = traced(CAUSAL & masks.window(4, after=2) & masks.lengths(PADDED) & masks.lengths(1))
    assert window == (4, 0) and lengths.tolist() == [1, 0]


def test_conditions_together_are_the_mask():
    """Random conjunctions: what is named and what is left say the same about every pair as the mask."""
    random = np.random.default_rng(5)
    T, S = 5, 7
    for _ in range(30):
        kinds = [
            CAUSAL,
            masks.window(int(random.integers(4)), after=int(random.integers(4))),
            masks.lengths(random.integers(8, size=2)),
            masks.lengths(int(random.integers(8))),
            masks.segments(random.integers(2, size=T), random.integers(2, size=S)),
            ~masks.prefix(1),
            CAUSAL | masks.prefix(3),
        ]
        chosen = [kinds[i] for i in random.integers(len(kinds), size=random.integers(1, 6))]
        mask = functools.reduce(operator.and_, chosen)
        found = masks.conditions(mask)
        parts = list(found.rest) + [CAUSAL] * found.causal
        parts += [] if found.window is None else [masks.window(found.window[0], after=found.window[1])]
        parts += [] if found.lengths is None else [masks.lengths(found.lengths)]
        parts += [] if found.segments is None else [masks.segments(*found.segments)]
        full = lambda mask: np.broadcast_to(masks.as_array(mask, T, S), (2, 1, T, S))  # noqa: E731
        np.testing.assert_array_equal(full(functools.reduce(operator.and_, parts)), full(mask))
