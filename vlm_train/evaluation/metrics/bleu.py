"""BLEU, as `torchmetrics` has it (aclanthology.org/P02-1040)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vlm_train.errors import ConfigError


class BLEU:
    """BLEU of all predictions together, without smoothing; letter case and punctuation aside.

    Args:
        n_gram: longest run of words that is compared. Texts of fewer words add nothing to it.
    """

    def __init__(self, *, n_gram: int = 4) -> None:
        if n_gram < 1:
            raise ConfigError(f"BLEU: n_gram: got {n_gram}; allowed: 1 or more")
        self.n_gram = n_gram
        self.higher_is_better: Mapping[str, bool] = {f"bleu_{n_gram}": True}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        from torchmetrics.functional.text import bleu_score

        given = [_join_words(text) for text in predictions]
        wanted = [[_join_words(text) for text in texts] for texts in references]
        return {f"bleu_{self.n_gram}": float(bleu_score(given, wanted, n_gram=self.n_gram))}


def _join_words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
