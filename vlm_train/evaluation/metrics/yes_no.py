"""Answers of yes and no, as POPE counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from data_pipelines.object_names import split_words


class YesNo:
    """Accuracy, F1, precision and recall of "yes", and how often the answer is yes.

    An answer is no if its first sentence has the word "no" or "not", else yes. Source: evaluate.py of
    github.com/AoiDragon/POPE, which divides by zero where nothing is yes; here F1, precision and recall are then 0.
    """

    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "accuracy": True,
        "f1": True,
        "precision": True,
        "recall": True,
        "yes_share": False,  # a model that sees what is not there says yes too often
    }

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        said, true = [says_yes(text) for text in predictions], [says_yes(texts[0]) for texts in references]
        both = sum(a and b for a, b in zip(said, true, strict=True))
        precision, recall = both / max(sum(said), 1), both / max(sum(true), 1)
        return {
            "accuracy": sum(a == b for a, b in zip(said, true, strict=True)) / len(said),
            "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
            "precision": precision,
            "recall": recall,
            "yes_share": sum(said) / len(said),
        }


def says_yes(answer: str) -> bool:
    """Whether an answer is yes: its first sentence does not say no."""
    return not {"no", "not"} & {*split_words(answer.split(".")[0])}
