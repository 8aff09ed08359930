"""Word error rate: a metric of which less is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class WordErrorRate:
    """Words to insert, delete or replace so that the predictions become their references, per word of the references.

    0 is perfect, long predictions reach more than 1. Of several references the nearest counts.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {"word_error_rate": False}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        edits = words = 0
        for prediction, allowed in zip(predictions, references, strict=True):
            given = prediction.split()
            fewest, length = min((count_word_edits(given, one.split()), len(one.split())) for one in allowed)
            edits, words = edits + fewest, words + length
        return {"word_error_rate": edits / max(words, 1)}


def count_word_edits(given: Sequence[str], wanted: Sequence[str]) -> int:
    """Levenshtein distance of two lists of words."""
    above = list(range(len(wanted) + 1))
    for number, word in enumerate(given, 1):
        row = [number]
        for place, other in enumerate(wanted, 1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (word != other)))
        above = row
    return above[-1]
