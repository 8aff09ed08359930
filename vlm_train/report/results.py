"""What `run.json` says of evaluations: rows of the results table, and what their metrics are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """What an evaluation measured, as `run.json` describes it."""

    evaluation: str
    name: str
    primary: bool
    higher_is_better: bool


@dataclass(frozen=True)
class Result:
    """One row of the results table: the run's own result or a control."""

    name: str
    value: float
    n: int | None
    note: str
    evaluation: str = ""  # rows of one evaluation share it
    metric: str = ""
    higher_is_better: bool = True

    @property
    def is_fraction(self) -> bool:
        """Whether `value` is shown as a percentage: a share of what is right."""
        return self.higher_is_better and 0.0 <= self.value <= 1.0

    @property
    def text(self) -> str:
        """The value, with its 95 % sampling error (normal approximation) where the number of questions is known."""
        if not self.is_fraction:
            return f"{self.value:.4g}"
        error = 196 * math.sqrt(self.value * (1 - self.value) / self.n) if self.n else 0.0
        return f"{100 * self.value:.1f} %" + (f" ± {error:.1f}" if error >= 0.05 else "")


def read_metrics(evaluators: object) -> dict[str, Metric]:
    """`<evaluation>/<metric>` -> what it is, from `evaluators` of `run.json`."""
    found = {}
    for label, one in evaluators.items() if isinstance(evaluators, dict) else ():
        directions = one.get("higher_is_better") if isinstance(one, dict) else None
        for name, higher in directions.items() if isinstance(directions, dict) else ():
            found[f"{label}/{name}"] = Metric(str(label), str(name), name == one.get("primary"), higher is not False)
    return found


def read_results(rows: object, metrics: Mapping[str, Metric]) -> list[Result]:
    """The valid rows of `results`, each once; a name that another evaluation used before is followed by its own."""
    found: list[Result] = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and is_number(row.get("value")):
            n = int(row["n"]) if is_number(row.get("n")) else None
            name, note, evaluation, metric = (str(row.get(key) or "") for key in ("name", "note", "eval", "metric"))
            known = metrics.get(f"{evaluation}/{metric}")
            higher = known is None or known.higher_is_better
            found.append(Result(name, float(row["value"]), n, note, evaluation, metric, higher))
    first = {(row.name, row.metric): row for row in reversed(found)}
    shown = []
    for row in found:
        before = first[row.name, row.metric]
        if row.evaluation != before.evaluation and row == replace(before, evaluation=row.evaluation):
            continue  # a published value, which every evaluation repeats
        other = row.evaluation != before.evaluation
        shown.append(replace(row, name=f"{row.name} ({row.evaluation})") if other else row)
    return shown


def is_number(value: object) -> bool:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
