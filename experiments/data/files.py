"""Reading a person's text files: plain or gzipped, one sentence a line, UTF-8.

A file that is not what it should be is refused with its name, the line, what was found and what to do; nothing is
repaired, skipped or replaced in silence.
"""

import codecs
import difflib
import gzip
import hashlib
import os
import stat
import zlib
from pathlib import Path
from typing import IO

from experiments import host
from experiments.errors import DataError

_CHUNK = 1 << 16


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    r"""The lines of a text file, without their ends.

    Lines end with ``\n`` or ``\r\n`` and nothing else: characters such as U+2028 or U+0085, at which `str.splitlines`
    would cut, stay inside their line, so that two parallel files keep the same number of lines. Empty lines are kept.
    A byte order mark at the start is dropped.

    Args:
        path: A UTF-8 text file; a name that ends in ``.gz`` is decompressed.

    Returns:
        One string per line.

    Raises:
        DataError: The file is missing, a folder, empty, not UTF-8, binary, or a damaged ``.gz``.
    """
    text = read_text(path)
    return text.removesuffix("\n").split("\n")


def read_parallel(source_path: str | os.PathLike[str], target_path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Sentence pairs from two files whose lines correspond.

    Args:
        source_path: The sentences to translate from; read as `read_lines` does.
        target_path: Their translations, line by line.

    Returns:
        One (source, target) pair per line.

    Raises:
        DataError: Either file cannot be read, the numbers of lines differ, or a line is empty on either side.
    """
    sources, targets = read_lines(source_path), read_lines(target_path)
    if len(sources) != len(targets):
        raise DataError(
            f"{source_path} has {len(sources)} lines but {target_path} has {len(targets)}; line n of one must be the "
            "translation of line n of the other. Check that both files are whole and come from the same release."
        )
    pairs = list(zip(sources, targets, strict=True))
    for number, pair in enumerate(pairs, start=1):
        for path, sentence in zip((source_path, target_path), pair, strict=True):
            if not sentence.strip():
                raise DataError(
                    f"{path}, line {number}: expected a sentence, found an empty line. "
                    f"Fill it in, or delete line {number} of both {source_path} and {target_path}."
                )
    return pairs


def read_text(path: str | os.PathLike[str]) -> str:
    r"""A whole file as one string; ``\r\n`` becomes ``\n``, a byte order mark at the start is dropped.

    Args:
        path: A UTF-8 text file; a name that ends in ``.gz`` is decompressed.

    Returns:
        The text, never empty.

    Raises:
        DataError: As for `read_lines`.
    """
    path = Path(path)
    content = _content(path).removeprefix(codecs.BOM_UTF8)
    if not content:
        raise DataError(f"{path}: expected text, found an empty file. Check that it was written or downloaded whole.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, content, error.start)) from None
    if "\0" in text:
        raise DataError(
            f"{path}, line {_line_number(content, content.index(0))}: expected text, found a NUL byte, so this is a "
            "binary file or UTF-16. Give a text file, saved as UTF-8."
        )
    return text.replace("\r\n", "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes in hexadecimal, read piece by piece so that a large file needs no memory."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(_cannot_open(path, error)) from None


def _content(path: Path) -> bytes:
    try:
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            raise DataError(
                f"{path}: expected a file, found a pipe or a device, which cannot be read twice (once for its "
                "SHA-256). Write what it gives to a file, and name that."
            )
        _check_room(path, about.st_size)
        with path.open("rb") as file:
            return _decompressed(path, file) if path.suffix.lower() == ".gz" else file.read()
    except OSError as error:
        raise DataError(_cannot_open(path, error)) from None


def _check_room(path: Path, size: int) -> None:
    """A text is there as bytes, as characters and as tokens at once, so that it may have a quarter of the memory."""
    there = host.machine_memory()
    if there is not None and size > there // 4:
        raise DataError(
            f"{path}: a text must be at most a quarter of this machine's memory, {there / 2**32:,.1f} GiB here, got "
            f"{size / 2**30:,.1f} GiB or more. Give a part of it."
        )


def _decompressed(path: Path, file: IO[bytes]) -> bytes:
    content = bytearray()
    try:
        # read1 hands over what there is; read would lose the bytes before the damage and with them the line number
        with gzip.GzipFile(fileobj=file) as unzipped:
            while chunk := unzipped.read1(_CHUNK):
                content += chunk
                _check_room(path, len(content))
    except EOFError:
        damage = "the file stops before its end (truncated .gz)"
    except (zlib.error, gzip.BadGzipFile) as error:
        damage = f"damaged .gz or no .gz at all ({error})"
    else:
        return bytes(content)
    line = _line_number(content, len(content))
    raise DataError(f"{path}: readable as far as line {line}, then: {damage}. Download or copy the file again.")


def _line_number(content: bytes | bytearray, position: int) -> int:
    return content.count(b"\n", 0, position) + 1


def _not_utf8(path: Path, content: bytes, position: int) -> str:
    line = _line_number(content, position)
    column = position - (content.rfind(b"\n", 0, position) + 1) + 1
    where = f"{path}, line {line}, byte {column}: expected UTF-8, found 0x{content[position]:02x}."
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"{where} The file starts like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path} > converted.txt"
    if content.startswith(b"\x1f\x8b"):
        return f"{where} The file is gzipped; give it a name that ends in .gz."
    return (
        f"{where} If the text is in another encoding, convert it, for example: "
        f"iconv -f LATIN1 -t UTF-8 {path} > converted.txt"
    )


def _cannot_open(path: Path, error: OSError) -> str:
    if path.is_dir():
        return f"{path}: expected a file, found a folder. Name a file inside it."
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        folder = path.parent
        if not folder.is_dir():
            return f"{path}: no such file; its folder {folder} does not exist either. Check the path."
        close = difflib.get_close_matches(path.name, sorted(os.listdir(folder)))
        hint = f"Did you mean {' or '.join(close)}?" if close else "Check the path."
        return f"{path}: no such file in the folder {folder}. {hint}"
    return f"{path}: cannot be read ({error.strerror or error}). Check the file and its permissions."
