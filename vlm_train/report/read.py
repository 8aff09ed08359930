"""Reading run and schedule folders. What is missing or broken is left out: a report never fails a run."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_train.config.redact import without_credentials
from vlm_train.errors import ConfigError
from vlm_train.report.results import Metric, Result, is_number, read_metrics, read_results
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.record import read_lines

PAUSE = 60.0  # seconds without a record after which nothing was running, if records usually come more often


@dataclass(frozen=True)
class Point:
    """A metric's value at one step, after `seconds` of training."""

    step: int
    seconds: float
    value: float


@dataclass(frozen=True)
class Prediction:
    """One answered question; `image` is a file inside the evaluation's folder."""

    question: str
    reference: str
    prediction: str
    correct: bool
    image: Path | None


@dataclass(frozen=True)
class Tried:
    """A held-out sample that was asked at every validation; `answers` are (step, text), where the text changed."""

    question: str
    reference: str
    answers: list[tuple[int, str]]
    image: Path | None


@dataclass
class Stage:
    """One run: its record, curves `(split, metric) -> points` in step order, predictions by evaluation, and what it
    answered while it was trained."""

    name: str
    folder: Path
    record: dict[str, Any]
    curves: dict[tuple[str, str], list[Point]] = field(default_factory=dict)
    predictions: dict[str, list[Prediction]] = field(default_factory=dict)
    tried: list[Tried] = field(default_factory=list)
    params: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""

    @property
    def metrics(self) -> dict[str, Metric]:
        """`<evaluation>/<metric>`, the name of a curve, -> what it is."""
        return read_metrics(self.record.get("evaluators"))

    @property
    def seconds(self) -> float:
        """Seconds of training up to the last recorded metric, pauses between two starts left out."""
        return max((points[-1].seconds for points in self.curves.values()), default=0.0)

    @property
    def status(self) -> str:
        """running | done | failed | interrupted | imported, or unknown."""
        return str(self.record.get("status", "unknown"))


@dataclass
class Report:
    """Everything that the page shows. `finished` is in seconds since the epoch."""

    title: str
    status: str
    finished: float | None
    stages: list[Stage]
    results: list[Result]

    @property
    def names_metrics(self) -> bool:
        """Whether results have to say of which metric they are: a name stands in several rows."""
        return len({row.name for row in self.results}) < len(self.results)


def read_report(folder: Path) -> Report:
    """Read a schedule folder (`schedule.json`) or a run folder (`run.json`)."""
    schedule, record = _read_json(RunFolder(folder).schedule), _read_json(RunFolder(folder).record)
    if isinstance(schedule, dict):
        entries = [entry for entry in schedule.get("stages") or [] if isinstance(entry, dict)]
        folders = [
            (_stage_folder(folder, str(entry.get("run"))), str(entry.get("recipe", "stage"))) for entry in entries
        ]
        stages = [read_stage(path, name) for path, name in folders if path is not None]
        title, expected = str(schedule.get("name", folder.name)), len(entries)
    elif isinstance(record, dict):
        stages = [read_stage(folder, str(record.get("recipe", folder.name)))]
        title, expected = str(record.get("run_id", folder.name)), 1
    else:
        raise ConfigError(f"'{folder}' is neither a run nor a schedule: it holds no run.json and no schedule.json")
    last = next((stage for stage in reversed(stages) if stage.record.get("results")), None)
    results = [] if last is None else read_results(last.record["results"], last.metrics)
    times = [_last_written(stage.folder) for stage in stages]
    return Report(title, _schedule_status(stages, expected), max(filter(None, times), default=None), stages, results)


def read_stage(folder: Path, name: str) -> Stage:
    """Read one run folder."""
    run = RunFolder(folder)
    record, params = _read_json(run.record), _read_json(run.parameters)
    return Stage(
        name=name,
        folder=folder,
        record=record if isinstance(record, dict) else {},
        curves=read_curves(run.metrics),
        predictions={
            path.parent.name: read_predictions(path) for path in sorted(run.evaluation.glob("*/predictions.jsonl"))
        },
        tried=read_tried(run.predictions),
        params=[row for row in params if isinstance(row, dict)] if isinstance(params, list) else [],
        config=_read_text(run.config),
    )


def read_curves(path: Path) -> dict[tuple[str, str], list[Point]]:
    """`(split, metric) -> points` in step order. A step repeated after a resume counts once, as it was last."""
    records = [row for row in read_lines(path) if is_number(row.get("step")) and is_number(row.get("time"))]
    seconds = training_seconds(records)
    curves: dict[tuple[str, str], dict[int, Point]] = {}
    for row, spent in zip(records, seconds, strict=True):
        for metric, value in row.items():
            if metric not in ("step", "time", "seconds", "split") and is_number(value):
                curve = curves.setdefault((str(row.get("split", "train")), metric), {})
                curve[int(row["step"])] = Point(int(row["step"]), spent, float(value))
    return {key: [curve[step] for step in sorted(curve)] for key, curve in curves.items()}


def training_seconds(records: list[dict[str, Any]]) -> list[float]:
    """The seconds of training at every record, as the run counted them. Records of older versions do not say it; then
    it is guessed from when they were written."""
    if all(is_number(row.get("seconds")) for row in records):
        return [float(row["seconds"]) for row in records]
    guessed = active_seconds([float(row["time"]) for row in records])
    return [guessed[float(row["time"])] for row in records]


def active_seconds(times: list[float]) -> dict[float, float]:
    """Time of a record -> seconds since the first one. A pause (a run that was stopped and resumed) hardly counts.

    A pause is longer than `PAUSE` and than ten usual gaps between records; it counts as one usual gap.
    """
    known = sorted(set(times))
    gaps = [after - before for before, after in itertools.pairwise(known)]
    usual = statistics.median(gaps) if gaps else 0.0
    counted = [gap if gap <= max(PAUSE, 10 * usual) else usual for gap in gaps]
    return dict(zip(known, itertools.accumulate(counted, initial=0.0), strict=False))


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of one evaluation. An image outside its folder is ignored: the file may come from anywhere."""
    predictions = []
    for row in read_lines(path):
        image = _image_path(path.parent, row)
        question, reference, prediction = (str(row.get(name, "")) for name in ("question", "reference", "prediction"))
        predictions.append(Prediction(question, reference, prediction, bool(row.get("correct")), image))
    return predictions


def read_tried(folder: Path) -> list[Tried]:
    """The sample predictions of a run, from `step-*.json`: the newest file says what was asked."""
    steps: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}
    for path in sorted(folder.glob("step-*.json")):
        rows, number = _read_json(path), path.stem.removeprefix("step-")
        if isinstance(rows, list) and number.isdecimal():
            known = [row for row in rows if isinstance(row, dict)]
            steps[int(number)] = {(str(row.get("key")), str(row.get("question"))): row for row in known}
    tried = []
    for key, row in steps[max(steps)].items() if steps else ():
        texts = [(step, str(rows[key].get("prediction", ""))) for step, rows in sorted(steps.items()) if key in rows]
        changes = [one for before, one in zip([(0, None), *texts], texts, strict=False) if one[1] != before[1]]
        question, reference = str(row.get("question", "")), str(row.get("reference", ""))
        tried.append(Tried(question, reference, changes, _image_path(folder, row)))
    return tried


def _image_path(folder: Path, row: dict[str, Any]) -> Path | None:
    """The image that a row names, if it is a file inside the folder."""
    image = (folder / str(row["image"])).resolve() if row.get("image") else None
    return image if image and image.is_relative_to(folder.resolve()) and image.is_file() else None


def _read_text(path: Path) -> str:
    """A file's text, without the users of addresses; empty where there is none."""
    return str(without_credentials(path.read_text(encoding="utf-8", errors="replace"))) if path.is_file() else ""


def _schedule_status(stages: list[Stage], expected: int) -> str:
    """The status of a whole schedule: the first of failed, interrupted, running that a stage has, else the last's."""
    statuses = [stage.status for stage in stages]
    worst = next((name for name in ("failed", "interrupted", "running") if name in statuses), None)
    return worst or (statuses[-1] if stages and len(stages) == expected else "incomplete")


def _stage_folder(schedule: Path, run: str) -> Path | None:
    """Where a stage's run is now: as written, below or beside the schedule's folder (which may have been moved)."""
    candidates = (schedule.parent / Path(run).name, schedule / run, Path(run))
    return next((path for path in candidates if path.is_dir()), None)


def _last_written(folder: Path) -> float | None:
    """When the run last wrote a metric, in seconds since the epoch."""
    times = [row["time"] for row in read_lines(RunFolder(folder).metrics) if is_number(row.get("time"))]
    return max(times, default=None)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
