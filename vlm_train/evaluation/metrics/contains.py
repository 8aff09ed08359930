"""Share of predictions that contain a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vlm_train.evaluation.metrics.texts import mean_of_best, normalize_text
from vlm_train.evaluation.metrics.token_f1 import split_words


class Contains:
    """Share of predictions in which a reference stands as whole words; letter case, punctuation and articles aside.

    For models that answer in sentences. A model that lists every answer is always right.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {"contains": True}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"contains": mean_of_best(contains, predictions, references)}


def contains(prediction: str, reference: str) -> bool:
    """Whether the words of the reference follow each other in the prediction."""
    given, wanted = split_words(prediction), split_words(reference)
    if not wanted:  # nothing but punctuation or articles
        return normalize_text(prediction) == normalize_text(reference)
    return any(given[place : place + len(wanted)] == wanted for place in range(len(given) - len(wanted) + 1))
