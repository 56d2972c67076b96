"""Batches: every example where it belongs, in an order that depends on seed and position alone."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from experiments.data import batches
from experiments.data.batches import PairBatches, Position, TextBatches, evaluation_batches, evaluation_pairs, windows
from experiments.errors import DataError

PAD, BOS, EOS = 0, 1, 2
BOUNDARIES = (5, 11, 23)


def random_pairs(count: int, longest: int = 22, seed: int = 0):
    generator = np.random.default_rng(seed)

    def sentence():
        return generator.integers(4, 97, generator.integers(0, longest + 1)).tolist()

    return [(sentence(), sentence()) for _ in range(count)]


def make(pairs, batch_tokens=200, boundaries=BOUNDARIES, seed=3):
    return PairBatches(pairs, batch_tokens=batch_tokens, boundaries=boundaries, seed=seed)


def epoch_of(training, epoch=0):
    return list(itertools.islice(training.iterate(Position(epoch, 0)), training.batches_per_epoch))


def same(one, other):
    return len(one) == len(other) and all(
        len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def check_rows(batch, pairs):
    """The definition of a PairBatch, row by row."""
    source, source_lengths, target, target_lengths, index = batch
    assert all(array.dtype == np.int32 for array in batch)
    boundary = source.shape[1]
    assert target.shape == (len(index), boundary + 1)
    for row, number in enumerate(index.tolist()):
        words = ([], []) if number == -1 else pairs[number]
        expected_source = [] if number == -1 else [*words[0], EOS]
        expected_target = [] if number == -1 else [BOS, *words[1], EOS]
        assert source[row].tolist() == expected_source + [PAD] * (boundary - len(expected_source))
        assert target[row].tolist() == expected_target + [PAD] * (boundary + 1 - len(expected_target))
        assert source_lengths[row] == len(expected_source)
        assert target_lengths[row] == max(len(expected_target) - 1, 0)


def test_a_batch_by_hand():
    (batch,) = epoch_of(make([([7, 8, 9], [5])], batch_tokens=8, boundaries=(4,)))
    rows = batch.index.tolist()
    assert sorted(rows) == [-1, 0]
    pair, empty = rows.index(0), rows.index(-1)
    assert batch.source[pair].tolist() == [7, 8, 9, EOS] and batch.source_lengths[pair] == 4
    assert batch.target[pair].tolist() == [BOS, 5, EOS, PAD, PAD] and batch.target_lengths[pair] == 2
    assert batch.source[empty].tolist() == [PAD] * 4 and batch.source_lengths[empty] == 0
    assert batch.target[empty].tolist() == [PAD] * 5 and batch.target_lengths[empty] == 0


def test_every_pair_once_per_epoch_in_its_bucket():
    pairs = random_pairs(613)
    training = make(pairs)
    for epoch in (0, 1, 7):
        seen = Counter()
        for batch in epoch_of(training, epoch):
            check_rows(batch, pairs)
            boundary = batch.source.shape[1]
            shorter = max((b for b in BOUNDARIES if b < boundary), default=0)
            for number in batch.index[batch.index >= 0].tolist():
                seen[number] += 1
                assert shorter < max(map(len, pairs[number])) + 1 <= boundary
        assert seen == Counter(range(len(pairs)))


def test_shapes_are_few_and_known():
    training = make(random_pairs(613))
    assert training.shapes == ((40, 5), (16, 11), (8, 23))
    assert {batch.source.shape for batch in epoch_of(training)} == set(training.shapes)


@pytest.mark.parametrize(
    ("batch_tokens", "rows"), [(1, 1), (22, 1), (23, 1), (46, 2), (23 * 7, 7), (23 * 8, 8), (23 * 15, 8), (23 * 16, 16)]
)
def test_rows_of_a_batch(batch_tokens, rows):
    training = make([([5] * 22, [5])], batch_tokens=batch_tokens, boundaries=(23,))
    assert training.shapes == ((rows, 23),)
    assert next(training.iterate(Position(0, 0))).source.shape == (rows, 23)


def test_filler_is_no_more_than_the_rest_of_each_bucket():
    training = make(random_pairs(613))
    filler = Counter()
    for batch in epoch_of(training):
        filler[batch.source.shape] += int((batch.index == -1).sum())
    assert all(count < rows for (rows, _), count in filler.items())


def test_a_batch_count_that_fits_exactly_has_no_filler():
    training = make([([5], [6])] * 48, batch_tokens=80, boundaries=(5,))
    assert training.batches_per_epoch == 3
    assert all((batch.index >= 0).all() for batch in epoch_of(training))


def test_boundary_is_inclusive_and_longer_pairs_are_counted():
    pairs = [([5] * 22, [5]), ([5], [5] * 22), ([5] * 23, [5]), ([5], [5] * 40), ([5], [5])]
    training = make(pairs)
    assert training.left_out == 2
    seen = sorted(number for batch in epoch_of(training) for number in batch.index.tolist() if number >= 0)
    assert seen == [0, 1, 4]


def test_unused_boundaries_make_no_shapes():
    training = make([([5], [5]), ([5] * 20, [5])])
    assert [boundary for _, boundary in training.shapes] == [5, 23]
    assert training.batches_per_epoch == 2


def test_same_seed_same_order_other_seed_other_order():
    pairs = random_pairs(211)
    assert same(epoch_of(make(pairs)), epoch_of(make(pairs)))
    assert not same(epoch_of(make(pairs)), epoch_of(make(pairs, seed=4)))
    assert not same(epoch_of(make(pairs)), epoch_of(make(pairs), epoch=1))


def test_the_order_is_the_documented_one():
    """Written out again from the raw words of Philox; a change here breaks the resumption of stored runs."""
    training = make([([5], [5])] * 5, batch_tokens=10, boundaries=(5,), seed=11)
    raw = np.random.Philox(np.random.SeedSequence((11, 2))).random_raw(8)
    rows = [*np.argsort(raw[:5]).tolist(), -1]
    expected = [rows[2 * i : 2 * i + 2] for i in np.argsort(raw[5:])]
    assert [batch.index.tolist() for batch in epoch_of(training, 2)] == expected
    assert [batch.index.tolist() for batch in epoch_of(training, 0)] == [[3, -1], [0, 2], [1, 4]]


def test_batches_of_different_lengths_are_mixed():
    training = make([([5] * words, [5]) for words in (2, 8, 20) for _ in range(400)])
    widths = [batch.source.shape[1] for batch in epoch_of(training)]
    assert Counter(widths) == {5: 10, 11: 25, 23: 50}
    changes = sum(a != b for a, b in itertools.pairwise(widths))
    assert changes > 30  # 47 are expected of a fair shuffle, 2 of none


def test_pairs_meet_other_pairs_in_each_epoch():
    training = make([([5] * 20, [5])] * 613)
    first, second = ({frozenset(b.index.tolist()) for b in epoch_of(training, epoch)} for epoch in (0, 1))
    assert not first & second


def test_resumption_gives_the_rest_of_the_sequence():
    pairs = random_pairs(211)
    training = make(pairs)
    per_epoch = training.batches_per_epoch
    whole = list(itertools.islice(training.iterate(), 2 * per_epoch + 3))
    for step in (0, 1, per_epoch - 1, per_epoch, per_epoch + 2, 2 * per_epoch + 1):
        position = training.position(step)
        stored = [int(number) for number in position]
        resumed = make(pairs).iterate((stored[0], stored[1]))
        assert same(list(itertools.islice(resumed, len(whole) - step)), whole[step:])
    assert training.position(per_epoch + 2) == Position(1, 2)


def test_two_iterators_do_not_disturb_each_other():
    training = make(random_pairs(211))
    alone = list(itertools.islice(training.iterate(), 9))
    one, other = training.iterate(), training.iterate(training.position(4))
    assert same([batch for batch, _ in zip(one, itertools.islice(other, 9), strict=False)], alone)


def test_a_changed_batch_does_not_change_the_data():
    training = make(random_pairs(50))
    for batch in epoch_of(training):
        batch.source[:] = 99
        batch.target[:] = 99
    check_rows(epoch_of(training)[0], random_pairs(50))


def test_batches_are_made_fast():
    """The fastest of many, because the machine may be busy; a loop over the rows would not pass."""
    training = make(random_pairs(20000, longest=31), batch_tokens=4096, boundaries=(8, 16, 24, 32))
    stream = training.iterate()
    next(stream)
    durations = []
    for _ in range(100):
        start = time.perf_counter()
        next(stream)
        durations.append(time.perf_counter() - start)
    assert min(durations) < 3e-4


def test_no_pairs_to_train_on():
    with pytest.raises(DataError, match="0 given"):
        make([])
    with pytest.raises(DataError, match="2 given, 2 of them longer than the last boundary 23"):
        make([([5] * 23, [5])] * 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens must be an integer of at least 1, got 0"),
        ({"batch_tokens": 1e3}, "batch_tokens must be an integer of at least 1, got 1000.0"),
        ({"batch_tokens": True}, "batch_tokens"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"boundaries": ()}, "boundaries must be positive integers, strictly ascending"),
        ({"boundaries": (5, 5)}, "boundaries"),
        ({"boundaries": (0, 5)}, "boundaries"),
        ({"boundaries": (11, 5)}, "boundaries"),
        ({"boundaries": (5.0, 11.0)}, "boundaries"),
    ],
)
def test_arguments_are_checked(changed, message):
    with pytest.raises(ValueError, match=f"batches.PairBatches: {message}"):
        make([([5], [5])], **changed)


def test_positions_are_checked_before_the_first_batch():
    training = make(random_pairs(50))
    with pytest.raises(ValueError, match=f"less than batches_per_epoch={training.batches_per_epoch}"):
        training.iterate(Position(0, training.batches_per_epoch))
    for wrong in (Position(-1, 0), Position(0, -1), Position(0, 0.5)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="position"):
            training.iterate(wrong)
    with pytest.raises(ValueError, match="step"):
        training.position(-1)


def test_evaluation_gives_every_sentence_once_shortest_first():
    sources = [source for source, _ in random_pairs(157, longest=30)]
    given = list(evaluation_batches(sources, batch_size=7, boundaries=BOUNDARIES))
    order = np.concatenate([index for index, _, _ in given])
    assert len(order) == 7 * 23
    assert sorted(order[:157].tolist()) == list(range(157)) and (order[157:] == -1).all()
    lengths = np.concatenate([lengths for _, _, lengths in given])
    assert (np.diff(lengths[:157]) >= 0).all() and (lengths[157:] == 0).all()
    for index, source, source_lengths in given:
        assert index.dtype == source.dtype == source_lengths.dtype == np.int32
        longest = source_lengths.max()
        assert source.shape == (7, min(b for b in (*BOUNDARIES, 32) if b >= longest))
        for number, row, length in zip(index.tolist(), source, source_lengths, strict=True):
            expected = [] if number == -1 else [*sources[number], EOS]
            assert row.tolist() == expected + [PAD] * (len(row) - len(expected)) and length == len(expected)


@pytest.mark.parametrize(("words", "width"), [(22, 23), (23, 32), (31, 32), (32, 64), (100, 128)])
def test_evaluation_drops_no_long_sentence(words, width):
    (batch,) = evaluation_batches([[5] * words], batch_size=2, boundaries=BOUNDARIES)
    assert batch.source.shape == (2, width) and batch.source_lengths.tolist() == [words + 1, 0]
    (batch,) = evaluation_pairs([([5], [5] * words)], batch_size=2, boundaries=BOUNDARIES)
    assert batch.source.shape == (2, width) and batch.target.shape == (2, width + 1)


def test_evaluation_pairs_are_pair_batches():
    pairs = random_pairs(61, longest=40)
    given = list(evaluation_pairs(pairs, batch_size=8, boundaries=BOUNDARIES))
    for batch in given:
        check_rows(batch, pairs)
    order = np.concatenate([batch.index for batch in given]).tolist()
    assert sorted(order[:61]) == list(range(61)) and order[61:] == [-1] * 3
    assert sum(int(batch.target_lengths.sum()) for batch in given) == sum(len(target) + 1 for _, target in pairs)


def test_evaluation_of_nothing_and_of_wrong_arguments():
    assert list(evaluation_batches([], batch_size=3, boundaries=(5,))) == []
    with pytest.raises(ValueError, match="evaluation_batches: batch_size"):
        evaluation_batches([[5]], batch_size=0, boundaries=(5,))
    with pytest.raises(ValueError, match="evaluation_pairs: boundaries"):
        evaluation_pairs([([5], [5])], batch_size=1, boundaries=())


def test_text_windows_are_cut_from_the_stream():
    stream = np.arange(1000, 1101)
    for tokens in itertools.islice(TextBatches(stream, batch_size=5, length=7, seed=0).iterate(), 50):
        assert tokens.shape == (5, 8) and tokens.dtype == np.int32
        assert (np.diff(tokens, axis=1) == 1).all()
        assert tokens.min() >= 1000 and tokens.max() <= 1100


def test_text_windows_start_everywhere_equally_often():
    stream = np.arange(13)
    starts = Counter()
    for tokens in itertools.islice(TextBatches(stream, batch_size=10, length=3, seed=1).iterate(), 1000):
        starts.update(tokens[:, 0].tolist())
    assert set(starts) == set(range(10))  # the last window is 9 ... 12
    assert all(850 < count < 1150 for count in starts.values())  # 5 standard deviations of 30


def test_text_batches_depend_on_seed_and_step_only():
    def take(seed, step, count):
        text = TextBatches(np.arange(101), batch_size=3, length=7, seed=seed)
        return list(itertools.islice(text.iterate(text.position(step)), count))

    whole = take(2, 0, 12)
    assert np.array_equal(take(2, 5, 7), whole[5:])
    assert not np.array_equal(whole, take(3, 0, 12))
    assert len({tokens.tobytes() for tokens in whole}) == 12
    raw = np.random.Philox(np.random.SeedSequence((2, 5))).random_raw(3)
    assert whole[5][:, 0].tolist() == [int(word) % (101 - 7) for word in raw]


def test_the_shortest_possible_stream():
    (tokens,) = itertools.islice(TextBatches(np.arange(8), batch_size=2, length=7, seed=0).iterate(), 1)
    assert tokens.tolist() == [list(range(8))] * 2
    with pytest.raises(DataError, match="at least 8 tokens, the stream has 7"):
        TextBatches(np.arange(7), batch_size=2, length=7, seed=0)


def test_text_from_a_memory_map(tmp_path):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    stream = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    arguments = {"batch_size": 3, "length": 7, "seed": 0}
    from_map, from_array = (TextBatches(s, **arguments).iterate() for s in (stream, np.arange(500)))
    tokens = next(from_map)
    assert np.array_equal(tokens, next(from_array)) and tokens.dtype == np.int32


def test_text_positions_are_checked():
    text = TextBatches(np.arange(101), batch_size=3, length=7, seed=0)
    assert text.position(4) == Position(0, 4)
    for wrong in (Position(1, 0), Position(0, -1)):
        with pytest.raises(ValueError, match="position"):
            text.iterate(wrong)


@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 14, 15, 16, 57, 58, 100])
def test_windows_predict_every_token_once(count):
    stream = np.arange(50, 50 + count)
    predicted, batch_count = [], 0
    for tokens, lengths in windows(stream, batch_size=4, length=7):
        batch_count += 1
        assert tokens.shape == (4, 8) and tokens.dtype == lengths.dtype == np.int32
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            predicted += row[1 : length + 1].tolist()
            real = length + 1 if length else 0
            assert (np.diff(row[:real]) == 1).all() and (row[real:] == PAD).all() and (row[:real] != PAD).all()
    assert predicted == stream[1:].tolist()
    assert batch_count == -(-(count - 1) // (4 * 7))


def test_windows_of_too_little_and_wrong_arguments():
    for count in (0, 1):
        with pytest.raises(DataError, match=f"at least 2 tokens, got {count}"):
            windows(np.arange(count), batch_size=4, length=7)
    for tokens in (np.zeros((2, 9), np.int32), np.zeros(9), [1, 2, 3]):
        with pytest.raises(ValueError, match="batches.windows: tokens must be an integer array"):
            windows(tokens, batch_size=4, length=7)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="batches.TextBatches: tokens"):
            TextBatches(tokens, batch_size=4, length=7, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length must be an integer of at least 1"):
        windows(np.arange(9), batch_size=4, length=0)
    with pytest.raises(ValueError, match="TextBatches: batch_size"):
        TextBatches(np.arange(9), batch_size=0, length=2, seed=0)


def test_special_tokens_are_those_of_the_vocabulary():
    assert (batches.PAD, batches.BOS, batches.EOS) == (PAD, BOS, EOS)
