"""What metrics of texts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def normalize_text(text: str) -> str:
    """Text as answers are compared: without outer blanks, in lower case."""
    return text.strip().lower()


def mean_of_best(
    score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """Mean over the questions of `score(prediction, reference)`, each with the reference that scores highest."""
    best = [max(score(text, one) for one in allowed) for text, allowed in zip(predictions, references, strict=True)]
    return sum(best) / len(best)


def count_edits(one: str, other: str) -> int:
    """Levenshtein distance: characters to insert, delete or replace so that `one` becomes `other`."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            replaced = diagonal + (character != wanted)
            diagonal, row[place] = row[place], min(replaced, row[place] + 1, row[place - 1] + 1)
    return row[-1]
