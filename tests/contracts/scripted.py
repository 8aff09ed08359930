"""A metric and an evaluator of a user's own package: their values are written down beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vlm_train.contracts.evaluator import Findings, ResultRow


class ScriptedMetric:
    """Returns `values`, one a call, whatever the answers are; the last one again when they are used up."""

    def __init__(self, *, values: list[float], higher_is_better: bool = False) -> None:
        self.values, self.calls = values, 0
        self.higher_is_better = {"distance": higher_is_better}

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        assert len(predictions) == len(references) > 0
        self.calls += 1
        return {"distance": self.values[min(self.calls, len(self.values)) - 1]}


class Undefined:
    """An evaluator with one value that is no number, and one that is."""

    at_validation = True
    needs: tuple[str, ...] = ()
    primary = "bad"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"bad": True, "good": False}

    def run(self, model: Any, processor: Any, folder: Path, *, final: bool) -> Findings:
        values = {"bad": float("nan"), "good": 3.0}
        rows = tuple(ResultRow("own", value, metric=name) for name, value in values.items())
        return Findings(values, self.primary, self.higher_is_better, rows if final else ())


class Undeclared(Undefined):
    """Finds another metric than it declares."""

    def run(self, model: Any, processor: Any, folder: Path, *, final: bool) -> Findings:
        return Findings({"other": 1.0}, "other", {"other": True})


class NotAnEvaluator:
    """Has no `needs`, and says of no metric whether higher is better."""

    at_validation = True

    def run(self, model: Any, processor: Any, folder: Path, *, final: bool) -> dict[str, float]:
        return {"accuracy": 1.0}
