"""Reading text: what is read is exact, and what cannot be read says where and why."""

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from experiments.data import files
from experiments.errors import DataError


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["text.txt", "text.gz", "text.GZ"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("eins\nzwei\n", ["eins", "zwei"]),
        ("eins\nzwei", ["eins", "zwei"]),
        ("eins\r\nzwei\r\n", ["eins", "zwei"]),
        ("\ufeffeins\nzwei\n", ["eins", "zwei"]),
        ("eins\n\ufeffzwei\n", ["eins", "\ufeffzwei"]),
        ("\n", [""]),
        ("a\n\n b \n\n", ["a", "", " b ", ""]),
        ("für\u2028immer\u0085\x0b\x0c\x1c\ny😀\rz\n", ["für\u2028immer\u0085\x0b\x0c\x1c", "y😀\rz"]),
    ],
)
def test_lines_end_at_newlines_only(tmp_path, name, content, lines):
    path = tmp_path / name
    encoded = content.encode()
    path.write_bytes(gzip.compress(encoded) if name.lower().endswith(".gz") else encoded)
    assert files.read_lines(path) == lines
    assert files.read_lines(str(path)) == lines


def test_text_keeps_everything_but_the_mark_and_carriage_returns(tmp_path):
    path = write(tmp_path / "play.txt", b"\xef\xbb\xbfA:\r\n  no\ttabs\n\n\xc3\xbc\n")
    assert files.read_text(path) == "A:\n  no\ttabs\n\nü\n"


def test_concatenated_gzip_members_are_one_text(tmp_path):
    (tmp_path / "two.gz").write_bytes(gzip.compress(b"a\n") + gzip.compress(b"b\n"))
    assert files.read_lines(tmp_path / "two.gz") == ["a", "b"]


def error_of(read, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        read(*arguments)
    return str(caught.value)


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.en.gz", b"a\n")
    message = error_of(files.read_lines, tmp_path / "trian.en.gz")
    assert "trian.en.gz" in message and "Did you mean train.en.gz?" in message
    assert "Did you mean" not in error_of(files.read_lines, tmp_path / "zzz")
    assert "folder" in error_of(files.read_lines, tmp_path / "nowhere" / "train.en")
    assert "folder" in error_of(files.read_lines, tmp_path / "train.en.gz" / "inner")


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.gz").mkdir()
    for path in (tmp_path, tmp_path / "folder.gz"):
        assert f"{path}: expected a file, found a folder" in error_of(files.read_text, path)
        assert "found a folder" in error_of(files.sha256, path)


@pytest.mark.parametrize("name", ["text.txt", "text.gz"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path, name, content):
    assert "found an empty file" in error_of(files.read_lines, write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["text.txt", "text.gz"])
def test_bad_encoding_names_line_and_byte(tmp_path, name):
    content = "gut\nüber\n".encode() + "naïve für\n".encode("latin-1")
    message = error_of(files.read_lines, write(tmp_path / name, content))
    assert f"{name}, line 3, byte 3: expected UTF-8, found 0xef" in message and "LATIN1" in message


def test_a_character_cut_off_at_the_end_is_an_error(tmp_path):
    message = error_of(files.read_lines, write(tmp_path / "cut.txt", "a\nü".encode()[:-1]))
    assert "line 2, byte 1: expected UTF-8, found 0xc3" in message


def test_utf16_and_misnamed_gzip_are_recognised(tmp_path):
    assert "UTF-16" in error_of(files.read_lines, write(tmp_path / "a.txt", "für\n".encode("utf-16")))
    assert "UTF-16" in error_of(files.read_lines, write(tmp_path / "b.txt", "a\n".encode("utf-16-le")))
    assert "ends in .gz" in error_of(files.read_lines, write(tmp_path / "c.txt", gzip.compress(b"a\n")))


def test_nul_byte_names_its_line(tmp_path):
    message = error_of(files.read_text, write(tmp_path / "model.bin", b"a\nb\nc\0d\n"))
    assert "model.bin, line 3" in message and "NUL" in message


def test_truncated_gzip_names_the_line_reached(tmp_path):
    lines = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(3000)]
    whole = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "train.gz"
    path.write_bytes(whole[: len(whole) // 2])
    message = error_of(files.read_lines, path)
    reached = int(message.split("as far as line ")[1].split(",")[0])
    assert "truncated" in message and 1300 < reached < 1700


def test_corrupt_gzip(tmp_path):
    whole = bytearray(gzip.compress(b"one\ntwo\n"))
    whole[-8] ^= 1  # of the checksum
    (tmp_path / "sum.gz").write_bytes(whole)
    message = error_of(files.read_lines, tmp_path / "sum.gz")
    assert "damaged" in message and "sum.gz: readable as far as line" in message
    (tmp_path / "plain.gz").write_bytes(b"one\ntwo\n")
    assert "no .gz at all" in error_of(files.read_lines, tmp_path / "plain.gz")
    (tmp_path / "block.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    assert "damaged" in error_of(files.read_lines, tmp_path / "block.gz")


def test_parallel_pairs(tmp_path):
    source = write(tmp_path / "en.txt", b"one\ntwo\n")
    target = write(tmp_path / "de.gz", b"eins\r\nzwei")
    assert files.read_parallel(source, target) == [("one", "eins"), ("two", "zwei")]


def test_parallel_counts_must_agree(tmp_path):
    source = write(tmp_path / "en.txt", b"one\ntwo\nthree\n")
    target = write(tmp_path / "de.txt", b"eins\nzwei\n")
    message = error_of(files.read_parallel, source, target)
    assert f"{source} has 3 lines" in message and f"{target} has 2" in message


@pytest.mark.parametrize("empty", ["", " \t", "\u3000"])
@pytest.mark.parametrize("side", [0, 1])
def test_parallel_refuses_an_empty_line(tmp_path, side, empty):
    whole = write(tmp_path / "whole.txt", b"one\ntwo\nthree\n")
    holed = write(tmp_path / "holed.txt", f"eins\n{empty}\ndrei\n".encode())
    paths = (whole, holed) if side else (holed, whole)
    assert f"{holed}, line 2: expected a sentence, found an empty line" in error_of(files.read_parallel, *paths)


def test_sha256_of_a_file_larger_than_one_piece(tmp_path):
    content = bytes(range(256)) * 5000
    assert files.sha256(write(tmp_path / "data.bin", content)) == hashlib.sha256(content).hexdigest()
    assert "no such file" in error_of(files.sha256, tmp_path / "other")


def test_what_is_no_file_of_bytes_is_refused_before_it_is_read(tmp_path):
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")  # reading would wait for a writer
        assert "found a pipe or a device" in error_of(files.read_text, tmp_path / "pipe.txt")
    if Path("/dev/zero").exists():
        assert "/dev/zero: expected a file" in error_of(files.read_text, "/dev/zero")


def test_a_text_beyond_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.host, "machine_memory", lambda: 4000)
    assert "at most a quarter" in error_of(files.read_text, write(tmp_path / "large.txt", b"a" * 1001))
    assert "at most a quarter" in error_of(files.read_text, write(tmp_path / "bomb.gz", b"a" * 100_000))  # 133 bytes
    assert files.read_text(write(tmp_path / "room.txt", b"a" * 1000)) == "a" * 1000
