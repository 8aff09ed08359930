"""What an evaluator and a metric of texts are, and what they hand back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

    from vlm_train.data.processor import Processor


@dataclass(frozen=True)
class ResultRow:
    """One row of the results table: what an evaluator measured, or a control that stands next to it.

    Args:
        name: who reached it: this run, images shuffled, a published model ...
        value: of `metric`.
        n: how many questions or images it was measured on; None: not known.
        note: how it was measured.
        metric: one of the findings' metrics.
    """

    name: str
    value: float
    n: int | None = None
    note: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Findings:
    """What an evaluator found.

    Args:
        metrics: name -> value.
        primary: the metric that stands for the evaluator where there is room for one.
        higher_is_better: metric -> whether a model is better where the value is higher.
        rows: for the results table. The first one is the run's own value of `primary`.

    Raises:
        ValueError: a metric has no direction, or `primary` is none of those that have.
    """

    metrics: Mapping[str, float]
    primary: str
    higher_is_better: Mapping[str, bool]
    rows: tuple[ResultRow, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.metrics, self.primary):
            if name not in self.higher_is_better:
                raise ValueError(f"higher_is_better: lacks {name!r}; it names {', '.join(self.higher_is_better)}")

    def without_undefined(self) -> Findings:
        """These findings without values that are no finite number, which JSON cannot hold."""
        return replace(
            self,
            metrics={name: value for name, value in self.metrics.items() if math.isfinite(value)},
            rows=tuple(row for row in self.rows if math.isfinite(row.value)),
        )


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model on held-out data, at validations and after training.

    A constructor reads no data and no model: the configuration is checked by constructing evaluators. Plain attributes
    do for the properties, of the class or of the object.
    """

    @property
    def at_validation(self) -> bool:
        """Whether it also runs at every validation."""

    @property
    def needs(self) -> tuple[type, ...]:
        """What the model must offer, protocols of `vlm_train.contracts.family` such as `Generates`."""

    @property
    def primary(self) -> str:
        """Name of the primary metric in its findings."""

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """Metric -> whether higher is better. Known before any run, so that `trainer.best` can follow every metric."""

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> Findings:
        """Measure the model.

        Args:
            folder: for files such as predictions; written by rank 0, and only if `final`.
            final: after training, with controls and rows; otherwise at a validation.
        """


@runtime_checkable
class TextMetric(Protocol):
    """Compares generated texts with reference texts. The same texts always give the same values."""

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """Name of every value that it returns -> whether higher is better. The first one is the primary one."""

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Name -> value over all questions.

        Args:
            predictions: one text a question, at least one question.
            references: the texts that count as right, one or more a question.
        """


def every_metric(evaluators: Mapping[str, Evaluator]) -> dict[str, bool]:
    """`<evaluator>/<metric>` -> whether higher is better."""
    return {
        f"{name}/{metric}": higher
        for name, evaluator in evaluators.items()
        for metric, higher in evaluator.higher_is_better.items()
    }


def validation_metrics(evaluators: Mapping[str, Evaluator]) -> dict[str, bool]:
    """`<evaluator>/<metric>` -> whether higher is better, of those that run at validations."""
    return every_metric({name: one for name, one in evaluators.items() if one.at_validation})
