"""Text to ids and back: byte-level BPE, words or characters, kept in one tokenizer.json.

The four special tokens have the same ids in every vocabulary, so that models and batches need not ask for them. Text
never becomes `PAD`, `BOS` or `EOS`: where "<eos>" is written in a text, it is five characters or an unknown word.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsIndex

from experiments.data import files
from experiments.errors import DataError

if TYPE_CHECKING:  # tokenizers is imported where it is used: the ids below are needed without it
    from tokenizers import Tokenizer

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
MASK_TOKEN = "<mask>"  # only where it is asked for, as the last entry
WORD_START = "▁"

_BYTES = 256
_LONGEST_WORD = 20_000  # characters
_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]+|_+")  # about what byte-level BPE keeps together
_KIND_OF_PRE_TOKENIZER = {"ByteLevel": "bpe", "WhitespaceSplit": "words", "Split": "characters"}

# Threads would save tokenizers half a second on 60,000 sentences, and make it complain at every later fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Config:
    """The table [vocabulary] of a config file.

    Attributes:
        kind: "bpe", byte-level byte pair encoding, which can write any text; "words", whitespace words; "characters".
        size: Number of entries, special tokens included; only "bpe" reads it. A corpus too small to merge that often
            gives fewer: `Vocabulary.size` is what counts. Words and characters take all that the corpus has.
    """

    kind: Literal["bpe", "words", "characters"] = "bpe"
    size: int = 4000


class Vocabulary:
    """A trained vocabulary; made by `train` or `load`.

    Attributes:
        kind: "bpe", "words" or "characters", as in `Config`.
    """

    def __init__(self, tokenizer: "Tokenizer", kind: str):
        self.kind = kind
        self._tokenizer = tokenizer
        last = tokenizer.get_vocab_size(with_added_tokens=True) - 1
        special = last in tokenizer.get_added_tokens_decoder() and tokenizer.id_to_token(last) == MASK_TOKEN
        self._mask = last if special else None
        tokenizer.encode_special_tokens = True  # a "<eos>" in the text is text; not kept in tokenizer.json

    @property
    def size(self) -> int:
        """V, the number of entries: ids are 0 ... V - 1."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def mask(self) -> int | None:
        """The id of the token that hides others; None if the vocabulary was made without."""
        return self._mask

    @property
    def unit(self) -> str:
        """What one entry is, for a reader: "word", "character" or, where it may be part of a word, "token"."""
        return {"words": "word", "characters": "character"}.get(self.kind, "token")

    def unknown(self, text: str) -> list[str]:
        """What in a text this vocabulary does not know, each once, in the order of the text; "bpe" knows all."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        found = (text[slice(*place)] for id, place in zip(encoding.ids, encoding.offsets, strict=True) if id <= UNK)
        return list(dict.fromkeys(found))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS or EOS.

        Words and characters that training has not seen are `UNK`; a "bpe" vocabulary knows every text.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text: `encode` for many."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        # the word "<eos>" is an entry of a vocabulary of words; in a text it is no end but an unknown word
        return [[max(id, UNK) for id in encoding.ids] for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids, which may come from a model.

        Reads up to the first `EOS` and drops `PAD` and `BOS`; `UNK` is written "<unk>". For "bpe" and "characters"
        this is the inverse of `encode`, except that a "bpe" text loses one space at its start, if it has any. "words"
        are joined by single spaces. Bytes that are no UTF-8, which a model can produce, become U+FFFD.

        Args:
            ids: Integers in 0 ... size - 1; a NumPy row will do.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        kept = []
        for id in self._checked(ids):
            if id == EOS:
                break
            if id not in (PAD, BOS):
                kept.append(id)
        text = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text.removeprefix(" ") if self.kind == "bpe" else text

    def pieces(self, ids: Iterable[SupportsIndex]) -> list[str]:
        r"""One readable string per id, for the axes of a figure.

        Where pieces are smaller than words, a space is written "▁", so "▁" marks where a word starts: "▁Haus", "tür".
        "words" are written as they are. Line ends and the like are escaped (``\n``), as are the bytes of a character
        that lies in several pieces (``\xf0``). Special tokens keep their names.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        return [self._piece(id) for id in self._checked(ids)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json, which `load` and the tokenizers package read; folders are made as needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")
        os.replace(unfinished, path)

    def _checked(self, ids: Iterable[SupportsIndex]) -> list[int]:
        integers = [int(id) for id in ids]
        for id in integers:
            if not 0 <= id < self.size:
                raise ValueError(
                    f"vocabulary: ids must be in 0 ... {self.size - 1}, got {id}; "
                    "was the model trained with another vocabulary?"
                )
        return integers

    def _piece(self, id: int) -> str:
        token = self._tokenizer.id_to_token(id)
        assert token is not None
        if id <= UNK or id == self.mask:
            return token
        if self.kind == "bpe":
            token = bytes(_BYTE_OF_SYMBOL[symbol] for symbol in token).decode("utf-8", errors="backslashreplace")
        return "".join(WORD_START if c == " " else c if c.isprintable() else ascii(c)[1:-1] for c in token)


def train(texts: Iterable[str], config: Config, *, mask: bool = False) -> Vocabulary:
    """Learns a vocabulary: the same texts in the same order give the same vocabulary, in every process.

    Args:
        texts: Sentences or whole documents.
        config: Kind and size.
        mask: Add a token that hides others, beyond `config.size`; no text has it.

    Returns:
        The vocabulary.

    Raises:
        DataError: There is nothing in the texts, or `config.size` cannot hold even the alphabet.
    """
    if isinstance(texts, str):
        raise ValueError("vocabulary.train: texts must be several texts, got one string; give [text].")
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise DataError(
            f"vocabulary: a vocabulary needs text to learn from, got {len(texts)} texts with nothing in them. "
            "Check the files that the training text comes from."
        )
    if config.kind == "bpe":
        tokenizer = _train_bpe(texts, config.size)
    elif config.kind == "words":
        tokenizer = _train_words(texts)
    elif config.kind == "characters":
        tokenizer = _train_characters(texts)
    else:
        raise ValueError(f"vocabulary.kind must be 'bpe', 'words' or 'characters', got {config.kind!r}.")
    if mask:
        tokenizer.add_special_tokens([MASK_TOKEN])
    return Vocabulary(tokenizer, config.kind)


def load(path: str | os.PathLike[str]) -> Vocabulary:
    """Reads what `Vocabulary.save` wrote.

    Raises:
        DataError: The file is missing, no tokenizer.json, or one that was not made by `train`.
    """
    from tokenizers import Tokenizer

    text = files.read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise DataError(
            f"{path}: expected a tokenizer.json, found something else ({error}). "
            "Train the vocabulary again, or name another file."
        ) from None
    kind = _KIND_OF_PRE_TOKENIZER.get(type(tokenizer.pre_tokenizer).__name__)
    specials = tuple(tokenizer.id_to_token(id) for id in range(len(SPECIAL_TOKENS)))
    if kind is None or specials != SPECIAL_TOKENS:
        raise DataError(
            f"{path}: expected a tokenizer.json whose first entries are {', '.join(SPECIAL_TOKENS)}, with kind "
            f"bpe, words or characters; found {specials} with {type(tokenizer.pre_tokenizer).__name__}. "
            "Use a file saved by this project."
        )
    problem = _problem(tokenizer)
    if problem:
        raise DataError(f"{path}: the file is damaged ({problem}). Bring it back from a copy, or make the vocabulary "
                        "and the model again.")  # fmt: skip
    return Vocabulary(tokenizer, kind)


def _problem(tokenizer: "Tokenizer") -> str | None:
    """What is wrong with a vocabulary that could be read: ids that are not 0 … V - 1, or text that it cannot encode."""
    entries = tokenizer.get_vocab(with_added_tokens=True)
    if sorted(entries.values()) != list(range(len(entries))):
        return f"its ids are not 0 … {len(entries) - 1}, each once"
    try:
        ids = tokenizer.encode_batch(["".join(map(chr, range(0x180))), "\U0010fffd ab"], add_special_tokens=False)
        tokenizer.decode(sorted(entries.values()), skip_special_tokens=False)
    except BaseException as error:  # the package is Rust: its panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return str(error).splitlines()[0][:200]
    return None if all(encoding.ids for encoding in ids) else "it loses text"


def load_or_train(
    path: str | os.PathLike[str], texts: Iterable[str], config: Config, *, mask: bool = False
) -> Vocabulary:
    """The vocabulary at `path`; if there is none, one made from the texts as by `train`, which is saved there first."""
    path = Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")  # a file that is there is whole
        train(texts, config, mask=mask).save(part)
        part.replace(path)
    return load(path)


def _train_bpe(texts: list[str], size: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = len(SPECIAL_TOKENS) + _BYTES
    if size < smallest:
        raise DataError(
            f"vocabulary.size must be at least {smallest} ({len(SPECIAL_TOKENS)} special tokens and {_BYTES} bytes), "
            f'got {size}. Give a larger size, or vocabulary.kind="characters".'
        )
    _check_words(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    merges = sum(len(text.encode("utf-8", "surrogatepass")) + 1 for text in texts)  # at most, a byte or more each
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, smallest + merges),  # it allocates for all of them, and ends the process if it cannot
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _check_words(texts: list[str]) -> None:
    """Refuse a word for which the merges would take minutes: their time grows with the square of its length."""
    for number, text in enumerate(texts, start=1):
        if len(text) > _LONGEST_WORD:
            longest = max(_WORD.findall(text), key=len, default="")
            if len(longest) > _LONGEST_WORD:
                raise DataError(
                    f'vocabulary: a word must be at most {_LONGEST_WORD:,} characters for vocabulary.kind="bpe", text '
                    f"{number} of {len(texts)} has one of {len(longest):,} that begins {longest[:30]!r}; learning from "
                    'it would take very long. Break it with spaces or lines, or use vocabulary.kind="characters".'
                )


def _train_words(texts: list[str]) -> "Tokenizer":
    from tokenizers import pre_tokenizers

    # the same splitter for training and for encoding: str.split() has another idea of white space
    splitter = pre_tokenizers.WhitespaceSplit()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    frequent_first = sorted(counts, key=lambda word: (-counts[word], word))
    tokenizer = _lookup_table(word for word in frequent_first if word not in (*SPECIAL_TOKENS, MASK_TOKEN))
    tokenizer.pre_tokenizer = splitter
    return tokenizer


def _train_characters(texts: list[str]) -> "Tokenizer":
    from tokenizers import Regex, decoders, pre_tokenizers

    tokenizer = _lookup_table(sorted(set().union(*texts)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _lookup_table(entries: Iterable[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, models

    ids = {entry: id for id, entry in enumerate((*SPECIAL_TOKENS, *entries))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _byte_of_symbol() -> dict[str, int]:
    """The byte that each symbol of a byte-level piece stands for.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are U+0100, U+0101, ... (Radford et
    al. 2019, GPT-2, encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(_BYTES + n): byte for n, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_of_symbol()
