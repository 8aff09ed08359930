"""A sweep's page: best run, every run, parallel coordinates, the metric over its cost. One file, readable offline."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from data_pipelines.atomic_write import atomic_write
from vlm_train.errors import ConfigError
from vlm_train.report.charts import plotly_script
from vlm_train.report.read import read_report
from vlm_train.report.sweep_charts import Row, cost_chart, draw_coordinates
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.sweep import records
from vlm_train.runs.sweep.records import Job, Sweep
from vlm_train.runs.sweep.summary import format_duration, shorten_value

PAGE_NAME = "sweep.html"
RANKED = "One line a run: the best is orange, the worst are grey. Drag along an axis to see only some."
FRONT = "One point a run, with its job's number; the best is orange. No cheaper one beats those on the dotted line."


def write_page(folder: Path, path: Path | None = None) -> Path:
    """Writes `sweep.html` into a sweep's folder, or `path`, and returns its path. Raises ConfigError for any other
    folder."""
    path = path or folder / PAGE_NAME
    with atomic_write(path) as file:
        file.write(render_page(records.read_sweep(folder), folder))
    return path


def render_page(sweep: Sweep, folder: Path) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=PackageLoader("vlm_train.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["duration"] = format_duration
    rows = [_make_row(sweep, job, folder) for job in sweep.rank_jobs()]
    scored = [row for row in rows if row.score is not None]
    charts = [
        ("Parallel coordinates", RANKED, draw_coordinates(sweep, scored, "coordinates")),
        (f"{sweep.metric} over cost", FRONT, cost_chart(sweep, scored, "cost")),
    ]
    last = max((job.written for job in sweep.jobs), default=0.0)
    statuses = [job.status for job in sweep.jobs]
    return environment.get_template("sweep.html.j2").render(
        sweep=sweep,
        rows=rows,
        best=scored[0] if scored else None,
        counts=[(status, statuses.count(status)) for status in dict.fromkeys(statuses)],
        written=f"{datetime.fromtimestamp(last, UTC):%d %B %Y, %H:%M} UTC",
        charts=[entry for entry in charts if entry[-1]],
        plotly=plotly_script(),
    )


def _make_row(sweep: Sweep, job: Job, folder: Path) -> Row:
    run = _run_folder(job, folder)
    report = RunFolder(run).report
    link = os.path.relpath(report, folder) if report.is_file() else None
    values = [shorten_value(job.value_of(key)) for key in sweep.keys]
    return Row(job, values, sweep.score_of(job), _training_seconds(run) or job.seconds, link)


def _run_folder(job: Job, folder: Path) -> Path:
    """Where the job's run is now: beside the sweep's folder, which may have been moved with it, or as written."""
    beside = folder.parent / Path(job.run).name
    return beside if beside.is_dir() else Path(job.run)


def _training_seconds(run: Path) -> float:
    """The time between the first and the last metric of a run or of a schedule's stages; 0 where it is not known."""
    try:
        return sum(stage.seconds for stage in read_report(run).stages)
    except ConfigError:
        return 0.0
