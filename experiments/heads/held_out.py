"""The held-out text of a run as the report about heads reads it."""

from __future__ import annotations

import numpy as np

from experiments import tables
from experiments.data.vocabulary import Vocabulary
from experiments.errors import DataError
from mhajax.report import text
from mhajax.report.text import Text


def windows(validation: str, words: Vocabulary, config: tables.Windows, count: int) -> Text:
    """The first windows of the validation text of a run.

    Raises:
      DataError: there are too few for intervals.
    """
    ids = np.asarray(words.encode(validation), np.int32)[: count * config.length + 1]
    check_room(len(ids), config.length)
    origin = "windows of the validation text, which was not trained on, but whose loss chose the best parameters"
    return Text(ids, config.length, config.size, words.unit, words.pieces, words.decode, origin)


def check_room(tokens: int, length: int) -> None:
    """Raise a DataError unless a text of so many tokens has windows enough for a report."""
    try:
        text.check_room(tokens, length)
    except ValueError as error:
        raise DataError(f"heads: {error} Their length is batches.length of a config, or --length.") from None
