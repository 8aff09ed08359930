"""VQA accuracy (arXiv 1505.00468, section 3; visualqa.org/evaluation): an answer that three people gave is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from vlm_train.evaluation.metrics.texts import normalize_text

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = ("a", "an", "the")


class VQAAccuracy:
    """Mean of `min(people who gave the answer / 3, 1)`, over all ways of leaving one of the people out.

    The references of a question are the answers of all people (`all_answers=true`). Of fewer than four people as many
    have to agree as are left; of one alone it is exact match. Compared are words in lower case without articles and
    punctuation, numbers up to ten as digits. It differs from the official code in one thing: apostrophes are dropped on
    both sides, where that has a list of contractions.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {"vqa_accuracy": True}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        scores = [measure_agreement(text, said) for text, said in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}


def measure_agreement(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of one prediction."""
    given = normalize_answer(prediction)
    agree = [normalize_answer(answer) == given for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    needed = min(3, len(agree) - 1)
    return sum(min(1.0, (sum(agree) - one) / needed) for one in agree) / len(agree)


def normalize_answer(text: str) -> str:
    """The words of an answer as they are compared."""
    text = re.sub(r"(?<=\d),(?=\d)", "", normalize_text(text).replace("'", "").replace("’", ""))
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.:]", " ", text)
    words = (str(NUMBERS.index(word)) if word in NUMBERS else word for word in text.split())
    return " ".join(word for word in words if word not in ARTICLES)
