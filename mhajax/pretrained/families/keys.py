"""A config.json, key by key: what is asked and not done here is refused, and so is what nobody here knows."""

from __future__ import annotations

from typing import Any

from mhajax.pretrained.source import Source, UnreadableFile

# Of training, of generating, of how a file came to be: without influence on what a model computes from tokens.
HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "auto_map", "bad_words_ids", "bos_token_id",
    "classifier_dropout", "classifier_dropout_prob", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "generation_config", "gradient_checkpointing",
    "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_factor", "initializer_range", "is_llama_config",
    "keys_to_ignore_at_inference", "label2id", "language", "mask_token_id", "max_length", "min_length", "model_type",
    "num_labels", "output_attentions", "output_hidden_states", "output_past", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "sep_token_id", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version", "type_vocab_dropout",
    "unk_token_id", "use_cache", "use_return_dict", "vocab_type",
}  # fmt: skip
# Harmless as long as they say this.
USUAL = {
    "add_cross_attention": False, "cross_attention_hidden_size": None, "is_decoder": False, "is_encoder_decoder": False,
    "pruned_heads": {}, "tie_encoder_decoder": False, "torchscript": False, "use_bfloat16": False,
}  # fmt: skip
_MISSING = object()


class Keys:
    """The keys of a config, each to be taken by the family of the model.

    Args:
      source: the model's files.
    """

    def __init__(self, source: Source):
        self.path, self.left = source.path, dict(source.config)

    def take(self, name: str, default: Any = _MISSING, *others: str) -> Any:
        """The value of a key, or of the first of its `others` names that is there.

        Raises:
          UnreadableFile: it is missing and has no default.
        """
        found = [self.left.pop(one) for one in (name, *others) if one in self.left]
        if found:
            return found[0]
        if default is _MISSING:
            raise UnreadableFile(f"{self.path}: config.json must say {name}, which it does not.")
        return default

    def number(self, name: str, default: Any = _MISSING, *others: str) -> int:
        """A whole number of at least 1, or the default.

        Raises:
          UnreadableFile: it is missing, or something else.
        """
        value = self.take(name, default, *others)
        if value is default and default is not _MISSING:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnreadableFile(f"{self.path}: config.json must say {name} as a number of at least 1, got {value!r}.")
        return value

    def real(self, name: str, default: Any = _MISSING, *others: str) -> float:
        """A number above 0, or the default.

        Raises:
          UnreadableFile: it is missing, or something else.
        """
        value = self.take(name, default, *others)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UnreadableFile(f"{self.path}: config.json must say {name} as a number above 0, got {value!r}.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or False.

        Raises:
          UnreadableFile: it is something else.
        """
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise UnreadableFile(f"{self.path}: config.json must say {name} as true or false, got {value!r}.")
        return value

    def one_of(self, name: str, table: dict[Any, Any], default: Any = _MISSING) -> Any:
        """What a key's value means, by a table.

        Raises:
          UnreadableFile: the value is not in it.
        """
        value = self.take(name, default)
        try:
            return table[value]
        except (KeyError, TypeError):
            raise self.refused(name, value, table) from None

    def must(self, name: str, *values: Any) -> None:
        """A key that may only have one of these values, if it is there at all.

        Raises:
          UnreadableFile: it has another.
        """
        value = self.take(name, values[0])
        if value not in values:
            raise self.refused(name, value, values)

    def done(self) -> None:
        """All keys have been taken, or change nothing.

        Raises:
          UnreadableFile: some have not; they may change what the model computes.
        """
        left = {name: value for name, value in self.left.items() if name not in HARMLESS and value is not None}
        unknown = {name: value for name, value in left.items() if name not in USUAL or value != USUAL[name]}
        if unknown:
            shown = ", ".join(f"{name}={value!r}" for name, value in list(unknown.items())[:5])
            raise UnreadableFile(
                f"{self.path}: config.json asks for {shown}, which is not known here and may change what the model "
                "computes. If it does not, take the key out of the file."
            )

    def refused(self, name: str, value: Any, known: Any) -> UnreadableFile:
        """The error for a value that is not done here."""
        listed = ", ".join(map(repr, known))
        return UnreadableFile(f"{self.path}: config.json asks for {name}={value!r}; what is done here is {listed}.")
