"""Average normalized Levenshtein similarity, the metric of ST-VQA and DocVQA (arXiv 1905.13648, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vlm_train.errors import ConfigError
from vlm_train.evaluation.metrics.texts import count_edits, mean_of_best, normalize_text


class ANLS:
    """Mean of `1 - edits / length of the longer text`, letter case and outer blanks aside.

    Args:
        threshold: answers with this share of edits or more count as wrong, 0.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {"anls": True}

    def __init__(self, *, threshold: float = 0.5) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"ANLS: threshold: got {threshold}; allowed: above 0, up to 1")
        self.threshold = threshold

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"anls": mean_of_best(self.measure_similarity, predictions, references)}

    def measure_similarity(self, prediction: str, reference: str) -> float:
        """Similarity in [0, 1] of two texts."""
        given, wanted = normalize_text(prediction), normalize_text(reference)
        distance = count_edits(given, wanted) / max(len(given), len(wanted), 1)
        return 1 - distance if distance < self.threshold else 0.0
