"""F1 over words, as SQuAD has it (arXiv 1606.05250, section 6.1, and its `evaluate-v1.1.py`)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

from vlm_train.evaluation.metrics.texts import mean_of_best

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TokenF1:
    """Mean F1 of the words that prediction and reference share; letter case, punctuation and articles aside."""

    higher_is_better: ClassVar[Mapping[str, bool]] = {"token_f1": True}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"token_f1": mean_of_best(token_f1, predictions, references)}


def token_f1(prediction: str, reference: str) -> float:
    """F1 in [0, 1] of two texts as bags of words; of two empty ones 1."""
    given, wanted = split_words(prediction), split_words(reference)
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()
