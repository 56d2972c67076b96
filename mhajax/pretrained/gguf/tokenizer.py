"""The tokenizer that lies in the metadata of a GGUF: byte-level BPE, split as `tokenizer.ggml.pre` says.

    gpt-2       at words, numbers, punctuation and runs of white space
    smollm      the same, after every digit has been set apart
    llama-bpe   (Llama 3) numbers in groups of three digits; a word that is a token is not merged from its parts
    qwen2       every digit by itself; text in Unicode's form NFC

References:
  Radford et al., Language Models are Unsupervised Multitask Learners (2019), 2.2: bytes as the alphabet of BPE.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from mhajax.pretrained.gguf.container import Contents
from mhajax.pretrained.source import UnreadableFile, need

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_KIND = "gpt2"
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """What a pre-tokenizer's name stands for.

    Attributes:
      pattern: at which text is split; None: at GPT-2's.
      digits: every digit is set apart before.
      nfc: text is brought into the form NFC before.
      whole: a piece that is a token stays whole, whatever the merges.
      begins: the first token is BOS, where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    begins: bool = False


_LLAMA3 = Split(_WORDS % "{1,3}", whole=True, begins=True)
_QWEN2 = Split(_WORDS % "", nfc=True)
SPLITS = {
    "gpt-2": Split(),
    "smollm": Split(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def tokenizer_of(contents: Contents) -> Tokenizer:
    """Tokens, merges, special tokens and pre-tokenizer as one.

    Args:
      contents: of the file.

    Returns:
      A tokenizer that puts BOS and EOS where `tokenizer.ggml.add_bos_token` and `add_eos_token` say.

    Raises:
      FileNotFoundError: the file has none.
      UnreadableFile: it is of another kind, or its parts do not fit each other.
      ImportError: the package tokenizers is not installed.
    """
    need("tokenizers")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    metadata = _Metadata(contents)
    if "tokenizer.ggml.model" not in contents.metadata:
        raise FileNotFoundError(f"{contents.path}: there is no tokenizer in this file.")
    metadata.choice("model", [_KIND])
    split = SPLITS[metadata.choice("pre", SPLITS)]
    tokens = metadata.strings("tokens")
    types = metadata.optional("token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or not all(isinstance(kind, int) for kind in types):
        raise metadata.error("token_type", f"must be {len(tokens)} integers, one per token, got {len(types)}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise metadata.error("tokens", f"must be different from each other, got {twice!r:.60} twice")
    model = models.BPE(vocabulary, _merges(metadata, vocabulary), ignore_merges=split.whole)
    tokenizer = Tokenizer(model)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, of in zip(tokens, types, strict=True) if of == kind]
        added = [AddedToken(token, normalized=False, special=special) for token in found]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    _add_ends(tokenizer, metadata, tokens, split)
    return tokenizer


def _merges(metadata: _Metadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in metadata.strings("merges"):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise metadata.error("merges", f"must be of two tokens that make a third, got {merge!r:.60}")
        merges.append((left, right))
    return merges


def _add_ends(tokenizer: Tokenizer, metadata: _Metadata, tokens: list[str], split: Split) -> None:
    """BOS before and EOS after a text, where the file asks for them."""
    from tokenizers import processors

    ends = {}
    for end, default in (("bos", split.begins), ("eos", False)):
        if metadata.optional(f"add_{end}_token", bool, default):
            i = metadata.optional(f"{end}_token_id", int, None)
            if i is None or not 0 <= i < len(tokens):
                raise metadata.error(f"{end}_token_id", f"must be one of {len(tokens)} tokens, got {i}")
            ends[end] = (tokens[i], i)
    if ends:
        around = [[ends[end][0]] if end in ends else [] for end in ("bos", "eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*around[0], "$A", *around[1]],
            pair=[*around[0], "$A", *around[1], *(f"{token}:1" for token in around[0]), "$B:1",
                  *(f"{token}:1" for token in around[1])],
            special_tokens=list(dict(ends.values()).items()),
        )  # fmt: skip


class _Metadata:
    """What stands under tokenizer.ggml."""

    def __init__(self, contents: Contents):
        self.contents = contents

    def optional(self, key: str, kind: type, default: Any) -> Any:
        value = self.contents.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise self.error(key, f"must be of type {kind.__name__}, got {value!r:.60}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.optional(key, list, None)
        if not value or not isinstance(value[0], str):  # all are of one type
            raise self.error(key, f"must be a list of strings, got {value!r:.60}")
        return value

    def choice(self, key: str, choices: Collection[str]) -> str:
        value = self.optional(key, str, None)
        if value is None or value not in choices:
            raise self.error(key, f"must be one of {', '.join(choices)}, got {value!r:.60}; others are not read here")
        return value

    def error(self, key: str, message: str) -> UnreadableFile:
        return UnreadableFile(f"{self.contents.path}: tokenizer.ggml.{key} {message}.")
