"""The HTML report of a run or of a schedule: one file, readable offline, made from what the run folder holds."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.atomic_write import atomic_write
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.sweep.records import SWEEP


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Write `report.html` into a run or schedule folder, or `sweep.html` into a sweep's, and return its path.

    `path`: another place for the page.

    Reads `run.json` or `schedule.json`, `metrics.jsonl`, `config.yaml`, `params.json` and `eval/*/predictions.jsonl`;
    whatever is missing is left out. Raises `ConfigError` where the folder holds neither JSON file.
    """
    if is_sweep(folder):
        from vlm_train.report.sweep_page import write_page

        return write_page(Path(folder), path)
    from vlm_train.report.page import render_page  # plotly and jinja2 only where a report is written
    from vlm_train.report.read import read_report

    path = path or RunFolder(folder).report
    with atomic_write(path) as file:
        file.write(render_page(read_report(Path(folder))))
    return path


def is_sweep(folder: Path) -> bool:
    """Whether the folder is a sweep's."""
    return (Path(folder) / SWEEP).is_file()


def results_table(folder: Path) -> str:
    """The results of a run or schedule next to its controls, or a sweep's runs, as plain text; empty without any."""
    if is_sweep(folder):
        from vlm_train.runs.sweep import records, summary

        return summary.format_table(records.read_sweep(Path(folder)))
    from vlm_train.report.read import read_report

    report = read_report(Path(folder))
    if not report.results:
        return ""
    table = [("", "metric", "result", "n", "")]
    for one in report.results:
        table.append((one.name, one.metric, one.text, "" if one.n is None else f"{one.n:,}", one.note))
    columns = [0, 1, 2, 3] if report.names_metrics else [0, 2, 3]
    widths = {column: max(len(row[column]) for row in table) for column in columns}
    lines = []
    for row in table:
        cells = [f"{row[c]:>{widths[c]}}" if c in (2, 3) else f"{row[c]:<{widths[c]}}" for c in columns]
        lines.append("  ".join([*cells, row[4]]).rstrip())
    return "\n".join(lines)
