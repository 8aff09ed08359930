"""Components that break their contract by what they return: not even a value of the right type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.media import Features
from vlm_train.contracts.objective import StepContext
from vlm_train.evaluation.metrics.exact_match import ExactMatch
from vlm_train.models.connectors.linear import Linear
from vlm_train.objectives.lm import LanguageModeling


class PlainFeatures(Linear):
    """Gives a tensor without grids."""

    def forward(self, features: Features) -> Any:
        return self.proj(features.values)


class NoLoss(LanguageModeling):
    """Returns nothing."""

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> Any:
        return None


class PlainValue(ExactMatch):
    """Gives a number without its name."""

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
        return 1.0
