"""A sweep's table and page, from invented jobs."""

from __future__ import annotations

import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.report import fake
from vlm_train.errors import ConfigError
from vlm_train.report import __main__ as command
from vlm_train.report.sweep_page import write_page
from vlm_train.runs.sweep import records, summary

START = ["recipe=easyvqa_stage2", "optim.lr=1e-4,1e-3,1e-2", "batch.samples=8,16", "connector=linear,mlp2x_gelu"]
POOR = "<script>alert(1)</script>"


def write_sweep(runs: Path, metric: str | None = None) -> Path:
    """Twelve jobs, all done but one that failed and one that was killed; the first has a run folder of its own."""
    folder = runs / "sweep-easyvqa_stage2-5e1f"
    records.start_sweep(folder, [*START, *([f"sweep_metric={metric}"] if metric else [])])
    number = 0
    for lr in (1e-4, 1e-3, 1e-2):
        for samples in (8, 16):
            for connector in ("linear", "mlp2x_gelu"):
                loss = 0.4 + 0.3 * abs(math.log10(lr / 1e-3)) + 0.05 * (connector == "linear") - samples / 200
                overrides = [START[0], f"optim.lr={lr}", f"batch.samples={samples}", f"connector={connector}"]
                job = records.Job(number, overrides, "done", str(runs / f"run-{number}"), host=socket.gethostname())
                job.metrics = {"val_loss": loss, "answers/exact_match": 1 - loss / 2}
                job.seconds = 60.0 + 4 * samples + 7 * (connector != "linear") + number
                if number == 3:
                    job.status, job.error, job.metrics = "failed", f"TrainingError: {POOR}", {}
                if number == 4:
                    job.status, job.metrics, job.pid = "running", {}, gone()
                job.write_file(folder)
                number += 1
    fake.write_run(runs / "run-0", "easyvqa_stage2")
    (runs / "run-0" / "report.html").write_text("")
    return folder


def gone() -> int:
    """The id of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def test_ranks_by_validation_loss_or_by_the_metric(folder: Path, tmp_path: Path) -> None:
    sweep = records.read_sweep(folder)
    assert sweep.keys == ["optim.lr", "batch.samples", "connector"]
    ranked = sweep.rank_jobs()
    assert (sweep.metric, sweep.lower, ranked[0].number, ranked[0].value_of("optim.lr")) == (
        "val_loss",
        True,
        7,
        "0.001",
    )
    scores = [sweep.score_of(job) for job in ranked]
    assert scores[:10] == sorted(scores[:10]) and [job.number for job in ranked[10:]] == [3, 4]
    other = records.read_sweep(write_sweep(tmp_path / "other", "answers/exact_match"))
    assert (other.metric, other.lower, other.rank_jobs()[0].number) == ("answers/exact_match", False, 7)


def test_a_killed_job_is_not_running(folder: Path) -> None:
    assert records.read_sweep(folder).jobs[4].status == "interrupted"


def test_starting_again_forgets_what_is_not_done(folder: Path) -> None:
    records.start_sweep(folder, START)
    assert {job.status for job in records.read_sweep(folder).jobs} == {"done"}
    assert len(records.read_sweep(folder).jobs) == 10


def test_table(folder: Path) -> None:
    lines = summary.format_table(records.read_sweep(folder)).splitlines()
    assert lines[0].split() == ["job", "optim.lr", "batch.samples", "connector", "val_loss", "status", "run"]
    assert lines[1].split() == ["7", "0.001", "16", "mlp2x_gelu", "0.32", "done", "run-7"]
    assert lines[-1].split() == ["4", "0.001", "8", "linear", "interrupted", "run-4"]


def test_page(folder: Path) -> None:
    page = write_page(folder).read_text(encoding="utf-8")
    assert page.count("<h2>") == 4
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page), "it must work offline"
    assert '<a href="../run-0/report.html">run-0</a>' in page
    assert POOR not in page and "TrainingError: &lt;script&gt;" in page
    (drawn,) = re.findall(r'Plotly\.newPlot\(\s*"coordinates",\s*(\[.*?\]),\s*\{', page, re.DOTALL)
    (trace,) = json.loads(drawn)
    axes = {axis["label"]: axis for axis in trace["dimensions"]}
    assert list(axes) == ["optim.lr", "batch.samples", "connector", "training time (s)", "val_loss"]
    assert axes["connector"]["ticktext"] == ["linear", "mlp2x_gelu"]
    assert axes["optim.lr"]["tickvals"] == [-4, -3, -2] and axes["optim.lr"]["ticktext"][0] == "0.0001"
    colors = trace["line"]["color"]
    losses = axes["val_loss"]["values"]
    assert len(losses) == 10 and losses[colors.index(max(colors))] == min(losses)


def test_the_report_command_knows_sweeps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(folder), "--table"]) == 0
    said = capsys.readouterr().out
    assert f"report: {folder / 'sweep.html'}" in said and "mlp2x_gelu" in said


def test_what_cannot_be_read_is_left_out(folder: Path, tmp_path: Path) -> None:
    broken: list[Any] = ["{", "[]", '{"number": 1}', '{"number": 0, "overrides": [], "metrics": {"loss": "high"}}']
    for index, text in enumerate(broken):
        (folder / "jobs" / f"broken{index}.json").write_text(text)
    assert len(records.read_sweep(folder).jobs) == 12
    with pytest.raises(ConfigError, match="is not a sweep"):
        records.read_sweep(tmp_path)
