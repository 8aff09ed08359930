"""Sweeps without training: what happens to failed jobs, what the same command runs again, what is refused.

The child that would train is a function here; `tests/runs/sweep/test_sweep_runs.py` starts real ones with every
launcher.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from vlm_train import cli
from vlm_train.config.run_identity import run_dir
from vlm_train.errors import Interrupted
from vlm_train.runs import launch, record
from vlm_train.runs.sweep import records

STAGE = "recipe=llava15_stage1"
OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "sweep_metric=val_loss")

PAIR = """schedule:
  name: pair
  stages:
    - recipe: first
    - recipe: second
      init_from: [{run: first, parts: [connector]}]
"""
PAGE = Path(__file__).resolve().parents[3] / "docs" / "sweeps.md"
COMMANDS = re.findall(r"```bash\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


class Children:
    """Stands for the processes that train: `broken` learning rates fail, the others leave a finished run."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.broken: set[float] = set()
        self.interrupting: set[float] = set()
        self.heard: list[str] = []
        self.hear: Callable[[], str] = str

    def __call__(self, cfg: DictConfig, devices: int) -> dict[str, Any]:
        lr, folder = cfg.optim.lr, run_dir(cfg)
        self.started.append(lr)
        self.heard.append(self.hear())
        if lr in self.interrupting:
            raise Interrupted(15)
        if lr in self.broken:
            raise launch.ChildError(f"fit of {folder.name} failed (exit code 1).\n    | TrainingError: loss is nan", 1)
        metrics = {"val_loss": abs(lr - 0.3), "loss": lr}
        record.update_record(folder, status="done", metrics=metrics)
        return metrics


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Children:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "VLM_TRAIN_TRACEBACK", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlm_train.check.check.missing_assets", lambda *_: [])
    monkeypatch.setattr("vlm_train.runs.schedule.missing_assets", lambda *_: [])
    monkeypatch.setattr(
        "vlm_train.config.origins.find_origins", lambda *_: {}
    )  # they take longer than everything else here
    stub = Children()
    monkeypatch.setattr(launch, "run_child", stub)
    return stub


def the_sweep() -> Path:
    (folder,) = Path("runs").glob("sweep-*")
    return folder


def statuses() -> dict[str, str]:
    return {job.value_of("optim.lr"): job.status for job in records.read_sweep(the_sweep()).jobs}


def test_a_failed_job_stops_no_other_and_alone_runs_again(
    children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", STAGE, "optim.lr=0.1,0.2,0.4"]
    children.broken, children.hear = {0.1}, lambda: capsys.readouterr().err
    assert cli.main(sweep) == 1
    said = capsys.readouterr()
    assert children.started == [0.1, 0.2, 0.4]
    assert statuses() == {"0.1": "failed", "0.2": "done", "0.4": "done"}
    at_once = children.heard[1]  # when the second job started
    assert "Job 0 failed (optim.lr=0.1): TrainingError: loss is nan fit of llava15_stage1-" in at_once
    assert "SweepError: 1 of 3 jobs are not done." in said.err and "Traceback" not in said.err

    children.broken = set()
    assert cli.main(sweep) == 0
    said = capsys.readouterr()
    assert children.started[3:] == [0.1], "done jobs must not run again"
    assert set(statuses().values()) == {"done"}
    assert "Job 1 was already done (optim.lr=0.2), val_loss 0.1" in said.out
    rows = said.out.split("\nsweep-llava15_stage1-")[1].splitlines()[1:5]
    assert [row.split()[:4] for row in rows] == [
        ["job", "optim.lr", "val_loss", "status"],
        ["1", "0.2", "0.1", "done"],
        ["2", "0.4", "0.1", "done"],
        ["0", "0.1", "0.2", "done"],
    ]


@pytest.mark.slow
def test_batches_go_on_after_a_failure(children: Children) -> None:
    children.broken = {0.1}
    assert cli.main(["-m", STAGE, "optim.lr=0.1,0.2", "hydra.sweeper.max_batch_size=1"]) == 1
    assert children.started == [0.1, 0.2]


@pytest.mark.slow
def test_a_job_that_is_refused_is_a_failed_job(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", STAGE, "optim.lr=-1,0.2"]) == 2, "another start changes nothing"
    assert children.started == [0.2]
    said = capsys.readouterr().err
    assert "Job 0 failed (optim.lr=-1): optim.lr: expected a number >= 0 and <= 1000, got -1." in said


@pytest.mark.slow
def test_what_no_job_could_run_is_refused_before_any(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", STAGE, "optim.lrr=0.1,0.2"]) == 2
    assert "Did you mean optim.lr?" in capsys.readouterr().err
    assert children.started == []


def test_an_interrupted_sweep_goes_on_where_it_stopped(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["-m", STAGE, "optim.lr=0.1,0.2,0.4"]
    children.interrupting = {0.2}
    assert cli.main(sweep) == 143
    assert children.started == [0.1, 0.2], "an interruption must stop the sweep"
    assert statuses() == {"0.1": "done", "0.2": "interrupted"}
    assert "Interrupted: SIGTERM" in capsys.readouterr().err
    children.interrupting = set()
    assert cli.main(sweep) == 0
    assert children.started[2:] == [0.2, 0.4]


@pytest.mark.slow
def test_a_run_name_does_not_make_jobs_equal(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    """The second job's run is done, but with another configuration."""
    cli.main(["-m", STAGE, "optim.lr=0.1,0.2", "run_name=same"])
    assert children.started == [0.1, 0.2]


def test_same_folder_for_the_same_overrides_in_any_order_and_with_any_launcher() -> None:
    from vlm_train.runs.sweep.command import folder_of

    first = folder_of([STAGE, "optim.lr=0.1,0.2", "paths.runs=/r"])
    assert first == folder_of(["paths.runs=/r", "optim.lr=0.1,0.2", STAGE, "hydra/launcher=joblib"])
    assert first.parent == Path("/r") and first.name.startswith("sweep-llava15_stage1-")
    assert first != folder_of([STAGE, "optim.lr=0.1,0.3", "paths.runs=/r"])
    params = [STAGE, "paths.runs=/r", "hydra/sweeper=optuna", "hydra.sweeper.params={optim.lr: 'choice(1,2)'}"]
    assert folder_of(params) != folder_of(params[:3])


@pytest.mark.slow
def test_nothing_is_imported_for_jobs_that_are_done(children: Children) -> None:
    sweep = ["-m", STAGE, "optim.lr=0.1,0.2"]
    assert cli.main(sweep) == 0
    script = (
        "import sys, json\nfrom vlm_train.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = [m for m in ('torch', 'transformers', 'lightning') if m in sys.modules]\n"
        "print(json.dumps([code, heavy]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *sweep], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []], done.stderr
    assert done.stdout.count("was already done") == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["hydra/sweeper=optuna"], "sweep_metric: hydra/sweeper=optuna needs a metric"),
        (["hydra.sweep.dir=elsewhere"], "hydra.sweep.dir: a sweep's folder is named after its overrides"),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=8"], "launch.devices=<n>"),
        (["hydra/launcher=submitit_slurm"], "there is no SLURM here"),
    ],
)
def test_refused_before_any_job(
    more: list[str], says: str, children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["-m", STAGE, "optim.lr=0.1,0.2", *more]) == 2
    assert says in capsys.readouterr().err
    assert children.started == [] and not Path("runs").exists()


def test_several_processes_would_each_run_the_sweep(
    children: Children, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["-m", STAGE, "optim.lr=0.1,0.2"]) == 2
    assert "torchrun started several processes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_metric_that_no_run_has_fails_the_job(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", STAGE, "optim.lr=0.1", "sweep_metric=val_los"]) == 2
    assert "no 'val_los' here. Did you mean val_loss?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_schedule_can_be_swept(
    children: Children, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "run_child", lambda cfg, devices=1: children(cfg, devices))
    for folder, name, text in (
        ("recipe", "first", "batch: {samples: 4}\n"),
        ("recipe", "second", 'batch: {samples: 8}\ninit_from: [{run: "???", parts: [connector]}]\n'),
        ("schedule", "pair", PAIR),
    ):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    sweep = ["--config-dir", str(Path().absolute()), "-m", "schedule=pair", "optim.lr=0.1,0.2"]
    children.broken = {0.1}
    assert cli.main(sweep) == 1
    assert children.started == [0.1, 0.2, 0.2], "a failed stage must stop its schedule, not the sweep"
    children.broken = set()
    assert cli.main(sweep) == 0
    assert children.started[3:] == [0.1, 0.1]
    assert all(Path(job.run, "schedule.json").is_file() for job in records.read_sweep(the_sweep()).jobs)
    assert "Job 1 was already done (optim.lr=0.2)" in capsys.readouterr().out


def optuna(*more: str) -> list[str]:
    pytest.importorskip("optuna")
    return ["-m", STAGE, "optim.lr=interval(0.1,0.9)", *OPTUNA, *more]


@pytest.mark.slow
def test_optuna_proposes_the_same_again_and_finds_its_runs_done(children: Children) -> None:
    assert cli.main(optuna()) == 0
    first = list(children.started)
    assert len(set(first)) == 3
    assert cli.main(optuna()) == 0
    assert children.started == first
    assert cli.main(optuna("hydra.sweeper.n_trials=4")) == 0
    assert len(children.started) == 4, "one more trial"


@pytest.mark.slow
def test_optuna_goes_on_after_a_failed_trial(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(optuna())
    children.broken, children.started = {children.started[2]}, []
    assert cli.main(optuna("seed=7")) == 1
    assert len(children.started) == 3
    assert "SweepError: 1 of 3 jobs" in capsys.readouterr().err
    children.broken = set()
    again, children.started = children.started[2], []
    assert cli.main(optuna("seed=7")) == 0
    assert children.started == [again]


@pytest.mark.slow
def test_optuna_without_a_single_result_says_so(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(optuna())
    children.broken = set(children.started)
    assert cli.main(optuna("seed=7")) == 1
    assert "SweepError: 3 of 3 jobs" in capsys.readouterr().err


def test_optuna_seeks_what_is_better() -> None:
    def direction(metric: str, *more: str) -> list[str]:
        from vlm_train.runs.sweep.command import optuna_defaults

        found = optuna_defaults(["hydra/sweeper=optuna", f"sweep_metric={metric}", *more])
        return [line.partition("=")[2] for line in found if line.startswith("hydra.sweeper.direction=")]

    assert direction("val_loss") == ["minimize"] and direction("answers/exact_match") == ["maximize"]
    error_rate = ["recipe=easyvqa_stage2", "optim.lr=1e-4,1e-3", "+metric@eval.answers.metrics.cer=cer"]
    assert direction("answers/cer", *error_rate) == ["minimize"], "as the metric says"
    assert direction("answers/cer", "schedule=easyvqa", *error_rate[1:]) == ["minimize"]
    assert direction("answers/exact_match", *error_rate) == ["maximize"]
    assert direction("val_loss", "hydra.sweeper.direction=maximize") == []


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_of_the_page_work(line: str, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_child", lambda cfg, devices=1: children(cfg, devices))
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "vlm_train"]
    if "hydra/sweeper=optuna" in words:
        pytest.importorskip("optuna")
        words.append("hydra.sweeper.n_trials=2")
    here = [word for word in words[3:] if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    assert cli.main(here) == 0
    assert len(records.read_sweep(the_sweep()).jobs) >= 2
