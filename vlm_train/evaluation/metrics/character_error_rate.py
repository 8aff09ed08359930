"""Character error rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from vlm_train.evaluation.metrics.texts import count_edits


class CharacterErrorRate:
    """Edits that turn the predictions into their references, per character of the references: 0 is perfect, and long
    predictions reach more than 1. Letter case counts, outer blanks do not.

    Of several references the one with the fewest edits counts, and of those the longest.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {"cer": False}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        edits, length = 0, 0
        for prediction, allowed in zip(predictions, references, strict=True):
            texts = [reference.strip() for reference in allowed]
            fewest, shorter = min((count_edits(prediction.strip(), text), -len(text)) for text in texts)
            edits, length = edits + fewest, length - shorter
        return {"cer": edits / max(length, 1)}
