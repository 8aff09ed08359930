"""Sweeps that train, with each launcher: one process tree a job, failures, what the same command runs again, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.small_run import command, make_data
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import run_dir
from vlm_train.runs import record
from vlm_train.runs.sweep import records

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 240  # seconds: a hang is a failure
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LIMIT + 40)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def overrides(data: Path, runs: Path, *more: str) -> list[str]:
    fixed = [line for line in command(data, runs) if not line.startswith(("run_name=", "trainer.max_steps="))]
    return [*fixed, *more, "trainer.export=false"]


def start(*arguments: str) -> subprocess.Popen[str]:
    """A sweep's process, in a process group of its own, as a terminal gives it one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "vlm_train", "-m", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=environment, text=True, start_new_session=True, **pipes)


def sweep(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a sweep. It is killed with all its jobs when it takes too long."""
    process = start(*arguments)
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_failing_job_of_three_on_two_processes_each(launcher: str, data: Path, tmp_path: Path) -> None:
    if launcher != "basic":
        pytest.importorskip(launcher)
    common = overrides(data, tmp_path, "launch.devices=2")
    line = [*common, "trainer.max_steps=2", "seed=1,2,3", *LAUNCHERS[launcher]]
    runs = [run_dir(compose_config([*common, "trainer.max_steps=2", f"seed={seed}"])) for seed in (1, 2, 3)]
    runs[1].mkdir(parents=True)
    (runs[1] / "checkpoints").write_text("in the way of the second job's checkpoints")

    code, out, err = sweep(*line)
    assert code == 1, out + err
    assert [record.read_record(run)["status"] for run in runs] == ["done", "failed", "done"]
    assert "Job 1 failed (seed=2):" in err and f"{runs[1]}/output.log" in err and "1 of 3 jobs are not done" in err
    assert "Traceback (most recent" not in err
    folders = {path.name for path in tmp_path.iterdir()}
    (folder,) = tmp_path.glob("sweep-*")
    assert folders == {folder.name, *(run.name for run in runs)}, "a process of a job started something of its own"
    assert [job.status for job in records.read_sweep(folder).jobs] == ["done", "failed", "done"]

    (runs[1] / "checkpoints").unlink()
    before = [(run / "run.json").read_bytes() for run in runs]
    code, out, err = sweep(*line)
    assert code == 0, out + err
    after = [(run / "run.json").read_bytes() for run in runs]
    assert [old == new for old, new in zip(before, after)] == [True, False, True], "only the failed job runs again"
    assert out.count("was already done") == 2 and out.count("is done after") == 1
    assert [job.status for job in records.read_sweep(folder).jobs] == ["done"] * 3
    page = (folder / "sweep.html").read_text(encoding="utf-8")
    assert all(f"../{run.name}/report.html" in page for run in runs)


def test_optuna_with_joblib(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    line = overrides(data, tmp_path, "trainer.max_steps=2", "optim.lr=interval(1e-4,1e-2)", "sweep_metric=val_loss")
    line += ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", *LAUNCHERS["joblib"]]
    code, out, err = sweep(*line)
    assert code == 0, out + err
    (folder,) = tmp_path.glob("sweep-*")
    found = records.read_sweep(folder)
    best = found.score_of(found.rank_jobs()[0])
    assert len(found.jobs) == 2
    assert f"best_value: {best}" in (folder / "optimization_results.yaml").read_text()
    code, out, err = sweep(*line)
    assert code == 0 and out.count("was already done") == 2, out + err


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_ctrl_c_saves_what_runs_and_starts_no_other(launcher: str, data: Path, tmp_path: Path) -> None:
    if launcher == "joblib":
        pytest.importorskip("joblib")
    running = 2 if launcher == "joblib" else 1
    long = ("trainer.epochs=null", "trainer.max_steps=20000", "trainer.save_every=20000")
    line = overrides(data, tmp_path, *long, "seed=1,2,3")
    process = start(*line, *LAUNCHERS[launcher])
    try:
        deadline = time.monotonic() + LIMIT
        while sum(path.stat().st_size > 0 for path in tmp_path.glob("*/metrics.jsonl")) < running:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130, out + err
    started = [path.parent for path in tmp_path.glob("*/run.json")]
    assert [record.read_record(run)["status"] for run in started] == ["interrupted"] * running
    assert all(any((run / "checkpoints").glob("step-*")) for run in started), "nothing was saved"
    (folder,) = tmp_path.glob("sweep-*")
    assert {job.status for job in records.read_sweep(folder).jobs} == {"interrupted"}
    assert "Interrupted: SIGINT" in out + err and "Traceback" not in out + err
