"""Exact match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vlm_train.evaluation.metrics.texts import mean_of_best, normalize_text


class ExactMatch:
    """Share of predictions that equal a reference, letter case and outer blanks aside."""

    higher_is_better: ClassVar[Mapping[str, bool]] = {"exact_match": True}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"exact_match": mean_of_best(matches, predictions, references)}


def matches(prediction: str, reference: str) -> bool:
    """Whether both are the same answer."""
    return normalize_text(prediction) == normalize_text(reference)
