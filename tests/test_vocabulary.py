"""Text to ids and back: lossless where it is promised, the same in every process, safe against special tokens."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from experiments.data import vocabulary
from experiments.data.vocabulary import BOS, EOS, PAD, UNK, Config
from experiments.errors import DataError

CORPUS = [
    "Ein Mann fährt mit dem Fahrrad durch die Straße .",
    "Ein Mann mit einem Hut sitzt vor dem Haus .",
    "Two men are sitting in front of the house .",
    "A man rides his bicycle through the street , the street of his house .",
] * 3
KINDS = ("bpe", "words", "characters")


@pytest.fixture(scope="module")
def bpe():
    return vocabulary.train(CORPUS, Config("bpe", 330))


@pytest.fixture(scope="module")
def words():
    return vocabulary.train(CORPUS, Config("words"))


@pytest.fixture(scope="module")
def characters():
    return vocabulary.train([*CORPUS, "A:\n\n\tno\r\n  yes 😀\n"], Config("characters"))


def odd_texts(count: int):
    """Texts from every corner of Unicode, without a space at the start."""
    generator = np.random.default_rng(7)
    corners = [
        "ä",
        "ß",
        "e\u0301",
        "😀",
        "👩‍👩‍👧",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "\x1c",
        "\u00a0",
        "\u3000",
        "\u200b",
    ]
    corners += [
        "日本",
        "العربية",
        "\ufeff",
        "\ufffd",
        "▁",
        "Ġ",
        "<eos>",
        "<pad>",
        "'s",
        "123",
        "..",
        "fährt ",
        "\U0010ffff",
    ]
    for _ in range(count):
        pieces = []
        for _ in range(generator.integers(1, 12)):
            anything = chr(generator.integers(0x110000))
            corner = corners[generator.integers(len(corners))]
            is_surrogate = unicodedata.category(anything) == "Cs"  # half a UTF-16 pair: no text has one
            pieces.append(corner if is_surrogate or generator.random() < 0.5 else anything)
        yield "".join(pieces).lstrip(" ")


def test_bpe_is_lossless(bpe):
    texts = list(odd_texts(1500)) + CORPUS + ["", "x ", "a  b   c", "für\u2028immer"]
    encoded = bpe.encode_all(texts)
    assert [bpe.decode(ids) for ids in encoded] == texts
    assert all(id > UNK for ids in encoded for id in ids)
    assert max(max(ids, default=0) for ids in encoded) < bpe.size


def test_bpe_loses_exactly_one_space_at_the_start(bpe):
    assert bpe.decode(bpe.encode("  a")) == " a"


def test_bpe_has_the_size_asked_for_and_merges(bpe):
    assert bpe.size == 330
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0].encode()) / 2


def test_bpe_of_a_tiny_corpus_is_smaller_than_asked():
    tiny = vocabulary.train(["ab ab"], Config("bpe", 4000))
    assert 260 < tiny.size < 270
    assert tiny.decode(tiny.encode("ab zä")) == "ab zä"


def test_characters_are_lossless(characters):
    text = "A:\n\n\tno\r\n  yes 😀\n" + "".join(CORPUS[:4])
    ids = characters.encode(text)
    assert len(ids) == len(text) and UNK not in ids
    assert characters.decode(ids) == text
    assert characters.size == 4 + len(set("".join(CORPUS) + "A:\n\n\tno\r\n  yes 😀\n"))


def test_unknown_characters_and_words(characters, words):
    assert [id == UNK for id in characters.encode("aΩa")] == [False, True, False]
    assert characters.decode(characters.encode("aΩa")) == "a<unk>a"
    assert [id == UNK for id in words.encode("Ein Elefant sitzt")] == [False, True, False]
    assert words.decode(words.encode("Ein Elefant sitzt")) == "Ein <unk> sitzt"


def test_words_are_joined_by_single_spaces_most_frequent_first(words):
    assert words.decode(words.encode("  Ein\tMann \n fährt ")) == "Ein Mann fährt"
    assert words.size == 4 + len(set(" ".join(CORPUS).split()))
    assert words.pieces([4, 5]) == [".", "the"]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_fixed_ids(kind):
    trained = vocabulary.train(CORPUS, Config(kind, 300))
    assert trained.pieces([PAD, BOS, EOS, UNK]) == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert trained.kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_special_token(kind):
    """Neither where training has seen the strings, often, nor where it has not."""
    hostile = ["x <pad> y", "<bos>", "a<eos>b <eos>", "<eos><eos>"]
    for corpus in (CORPUS, CORPUS + hostile * 50):
        trained = vocabulary.train(corpus, Config(kind, 400))
        assert all(id >= UNK for ids in trained.encode_all(hostile) for id in ids)
        assert sorted(trained._tokenizer.get_vocab().values()) == list(range(trained.size))
    if kind != "words":  # the last corpus has every character of the hostile texts
        assert [trained.decode(trained.encode(text)) for text in hostile] == hostile


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_stops_at_the_first_end(kind):
    trained = vocabulary.train(CORPUS, Config(kind, 300))
    ids = trained.encode("Ein Mann")
    row = np.array([BOS, PAD, *ids, EOS, *ids, EOS, PAD, PAD], np.int32)
    assert trained.decode(row) == "Ein Mann"
    assert trained.decode([]) == "" and trained.decode([EOS]) == "" and trained.decode([PAD, BOS]) == ""


def test_decoding_what_a_model_may_produce(bpe):
    half = bpe.encode("ü")[-1:]
    assert bpe.decode(half) == "\ufffd"
    assert bpe.decode([UNK]) == "<unk>"


@pytest.mark.parametrize("id", [-1, 330, 10**12])
def test_ids_outside_the_vocabulary_are_refused(bpe, id):
    for function in (bpe.decode, bpe.pieces):
        with pytest.raises(ValueError, match=f"0 ... 329, got {id}"):
            function([5, id])


def test_one_text_at_a_time_is_the_same_as_many(bpe, words, characters):
    for trained in (bpe, words, characters):
        assert trained.encode_all(CORPUS) == [trained.encode(text) for text in CORPUS]
        assert trained.encode_all([]) == [] and trained.encode("") == []


def test_pieces_are_readable(bpe, words, characters):
    text = "Ein Fahrrad fährt\n😀 x"
    pieces = bpe.pieces(bpe.encode(text))
    assert len(pieces) == len(bpe.encode(text))
    assert pieces[0] == "▁Ein" and "\\n" in pieces
    assert "".join(pieces[: pieces.index("\\n")]) == "▁Ein▁Fahrrad▁fährt"
    assert [piece for piece in pieces if piece.startswith("\\x")] == ["\\xf0", "\\x9f", "\\x98", "\\x80"]
    assert all(piece.isprintable() for piece in pieces)
    assert sum(piece.startswith("▁") for piece in pieces) == 4  # Ein, Fahrrad, fährt, x: a line end is no space
    assert characters.pieces(characters.encode("a b\n😀")) == ["a", "▁", "b", "\\n", "😀"]
    assert words.pieces(words.encode("Ein Mann")) == ["Ein", "Mann"]


def test_every_entry_has_a_piece(bpe):
    from tokenizers import pre_tokenizers

    assert len(bpe.pieces(range(bpe.size))) == bpe.size
    assert sorted(vocabulary._BYTE_OF_SYMBOL) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(vocabulary._BYTE_OF_SYMBOL.values()) == list(range(256))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(tmp_path, kind):
    trained = vocabulary.train(CORPUS, Config(kind, 320))
    path = tmp_path / "run" / "tokenizer.json"
    trained.save(path)
    loaded = vocabulary.load(path)
    assert (loaded.size, loaded.kind) == (trained.size, kind)
    texts = CORPUS + list(odd_texts(50)) + ["<eos> a <pad>"]
    assert loaded.encode_all(texts) == trained.encode_all(texts)
    everything = [id for id in range(trained.size) if id != EOS]
    assert loaded.decode(everything) == trained.decode(everything)
    assert loaded.pieces(everything) == trained.pieces(everything)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_in_every_process(tmp_path, kind):
    """Ties are frequent in this corpus, so an order that comes from hashing would show."""
    program = (
        "import sys; from experiments.data import vocabulary as v;"
        "texts = [f'{a}{b} {b}{a} x{a}' for a in 'abcdefghij' for b in 'klmnopqrst'];"
        "v.train(texts, v.Config(sys.argv[1], 350)).save(sys.argv[2])"
    )
    processes = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        arguments = [sys.executable, "-c", program, kind, str(tmp_path / hash_seed)]
        root = Path(__file__).resolve().parents[1]
        processes.append(subprocess.Popen(arguments, env=environment, cwd=root))
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corpus", [[], [""], ["", " \n"]])
def test_empty_corpus(kind, corpus):
    with pytest.raises(DataError, match="needs text"):
        vocabulary.train(corpus, Config(kind))


def test_one_string_is_not_a_corpus():
    with pytest.raises(ValueError, match="one string"):
        vocabulary.train("abc", Config())


def test_a_generator_is_a_corpus():
    assert vocabulary.train((text for text in CORPUS), Config("words")).size > 20


def test_bpe_needs_room_for_all_bytes():
    with pytest.raises(DataError, match="vocabulary.size must be at least 260 .* got 259"):
        vocabulary.train(CORPUS, Config("bpe", 259))
    assert vocabulary.train(CORPUS, Config("bpe", 260)).size == 260


def test_unknown_kind():
    with pytest.raises(ValueError, match="'bpe', 'words' or 'characters', got 'wordpiece'"):
        vocabulary.train(CORPUS, Config("wordpiece"))  # type: ignore[arg-type]


def test_unreadable_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="no such file"):
        vocabulary.load(path)
    for content in ("{", "{}", "[]", "text"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json: expected a tokenizer.json"):
            vocabulary.load(path)


def test_foreign_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    vocabulary.train(CORPUS, Config("words")).save(path)
    content = json.loads(path.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {"[UNK]": 0, "a": 1}
    content["model"]["unk_token"] = "[UNK]"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="first entries are <pad>, <bos>, <eos>, <unk>"):
        vocabulary.load(path)


def test_ids_are_known_without_the_package():
    program = "import sys, experiments.data.vocabulary as v; assert v.EOS == 2; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("size", [1000, 2**31 - 1])
def test_a_size_beyond_the_corpus_costs_no_memory(tmp_path, size):
    texts = ["abab abab für", "x"]
    found = vocabulary.load_or_train(tmp_path / f"{size}.json", texts, vocabulary.Config(size=size))
    assert found.size == 268 and found.decode(found.encode(texts[0])) == texts[0]
