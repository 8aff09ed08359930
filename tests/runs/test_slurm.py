"""The batch scripts of docs/slurm, run by bash against stand-ins for srun and scontrol: two tasks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import faults
from tests.support.small_run import command, make_data
from tests.training.test_fit import metrics
from vlm_train.runs import record, slurm_requeue

SCRIPTS = sorted((Path(__file__).parents[2] / "docs" / "slurm").glob("*.sbatch"))

SRUN = """#!{python}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
step = os.environ | dict(SLURM_STEP_ID="0", STEP_PID=str(os.getpid()))
started = []
signal.signal(signal.SIGUSR1, lambda number, _: [os.killpg(one.pid, number) for one in started if one.poll() is None])
for rank in range(tasks):
    node = str(rank // int(os.environ["SLURM_NTASKS_PER_NODE"]))
    own = dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % int(os.environ["SLURM_NTASKS_PER_NODE"])))
    started.append(subprocess.Popen(command, env=step | own | dict(SLURM_NODEID=node), start_new_session=True))
codes = [one.wait() for one in started]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
"""Starts the tasks of a step and signals every process group of it, as SLURM does. Its code is the highest."""

SCONTROL = """#!/bin/bash
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) touch "$REQUEUED" ;;
esac
"""

LAYOUTS = {
    "one_node": {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "2"},
    "torchrun": {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "1"},
    "srun": {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"},
}
"""Two processes, however a script comes to them."""


def test_every_script_is_tried() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(LAYOUTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    for line in ("--requeue", "--signal=USR1@300", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, without what an outer one has set."""
    shared = tmp_path / "shared"
    (shared / "env" / "bin").mkdir(parents=True)
    for name, text in (("srun", SRUN.replace("{python}", sys.executable)), ("scontrol", SCONTROL)):
        (shared / "env" / "bin" / name).write_text(text)
        (shared / "env" / "bin" / name).chmod(0o755)
    (shared / "env" / "bin" / "activate").write_text(
        f'export PATH="{shared}/env/bin:{Path(sys.executable).parent}:$PATH"\n'
    )
    make_data(shared / "data")
    root = str(Path(__file__).parents[2])
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "127.0.0.1"}
    job |= {"SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1", "REQUEUED": str(tmp_path / "requeued")}
    return {**outer, **job, "PYTHONPATH": root}


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_warned_job_saves_is_requeued_and_goes_on(script: Path, cluster: dict[str, str], tmp_path: Path) -> None:
    """SLURM's warning reaches the step; the script requeues itself; the second start ends the run."""
    shared, job = tmp_path / "shared", cluster | LAYOUTS[script.stem]
    job |= {"SLURM_NNODES": job["SLURM_JOB_NUM_NODES"]}
    job["SLURM_NTASKS"] = str(int(job["SLURM_JOB_NUM_NODES"]) * int(job["SLURM_NTASKS_PER_NODE"]))
    (tmp_path / "job.sbatch").write_text(script.read_text().replace("/shared/", f"{shared}/"))
    given = [one for one in command(shared / "data", shared / "runs", "batch.micro=1", *faults.OVERRIDES)
             if not one.startswith(("paths.", "run_name=", "trainer.save_every"))]  # fmt: skip
    given += ["trainer.export=false", *(["run_name=job"] if script.stem == "one_node" else [])]
    codes, output = [], ""
    for attempt, fault in enumerate(("warn-SIGUSR1 1 2", "none 0 0", "none 0 0")):
        Path(job["REQUEUED"]).unlink(missing_ok=True)
        ended = subprocess.run(
            ["bash", tmp_path / "job.sbatch", *given],
            env=job | {"SLURM_RESTART_COUNT": str(attempt), "FAULT": fault},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        output += ended.stdout
        codes.append(ended.returncode)
        if not Path(job["REQUEUED"]).exists():
            break
    assert codes == [0, 0], output  # of the requeue, and of the run
    assert "Exit code 143: starting again, it goes on from its newest checkpoint." in output
    assert "Exit code 0: not starting again, done." in output and "Traceback" not in output
    (run,) = (path.parent for path in (shared / "runs").rglob("run.json"))
    assert f"resuming from {run}/checkpoints/step-" in output
    assert record.read_record(run)["status"] == "done"
    assert [row["step"] for row in metrics(run)] == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_submitit_requeues_what_has_saved(tmp_path: Path) -> None:
    """submitit's handler for SIGUSR2, which ends the job at once, runs after the training has saved its step."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    overrides = command(make_data(tmp_path / "data"), tmp_path / "runs", "trainer.export=false", *faults.OVERRIDES)
    ended = subprocess.run(
        [sys.executable, "-m", "vlm_train", "-m", *overrides, "hydra/launcher=submitit_local", "optim.lr=1e-3"],
        env={**os.environ, "FAULT": "warn-SIGUSR2 0 2", "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    logs = "".join(path.read_text() for path in (tmp_path / "runs").rglob("*_log.*"))
    assert ended.returncode == 0, ended.stdout + ended.stderr + logs
    assert "at step 3, which is saved" in logs and "Requeued job" in logs and "resuming from" in logs
    run = tmp_path / "runs" / "run"
    assert record.read_record(run)["status"] == "done" and [row["step"] for row in metrics(run)] == list(range(1, 7))


def point(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "LATEST").write_text(f"step-{step:08d}\n")


def test_restarts_without_progress_end(tmp_path: Path) -> None:
    point(tmp_path / "run", 500)
    assert slurm_requeue.decide_restart(tmp_path, 1, first=True)[0], "a checkpoint"
    assert (
        slurm_requeue.decide_restart(tmp_path, 1, first=False)[0]
        and slurm_requeue.decide_restart(tmp_path, 137, first=False)[0]
    )
    assert slurm_requeue.decide_restart(tmp_path, 1, first=False) == (
        False,
        "3 attempts in a row have ended without a new checkpoint",
    )
    point(tmp_path / "run", 1000)
    assert slurm_requeue.decide_restart(tmp_path, 1, first=False)[0], "progress"
    point(tmp_path / "second", 500)
    assert slurm_requeue.decide_restart(tmp_path, 1, first=False)[0], "progress of another stage"


def test_a_run_that_never_saves_is_not_started_for_ever(tmp_path: Path) -> None:
    found = [slurm_requeue.decide_restart(tmp_path, 143, first=attempt == 0)[0] for attempt in range(3)]
    assert found == [True, True, False]
    assert slurm_requeue.decide_restart(tmp_path, 143, first=True)[0], "a new job"


@pytest.mark.parametrize(("code", "why"), [(0, "done"), (2, "a setting is wrong"), (130, "Ctrl-C")])
def test_what_is_not_started_again(code: int, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point(tmp_path, 500)
    assert slurm_requeue.main([str(tmp_path), str(code)]) == 1
    assert why in capsys.readouterr().out
