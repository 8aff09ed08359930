"""Process trees: what a child gets, what comes back, signals, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import DictConfig

from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import load_config, save_config
from vlm_train.config.run_identity import run_dir
from vlm_train.errors import ConfigError, Interrupted
from vlm_train.runs import launch, process, record, torchrun

FAKE_CHILD = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1]).parent
status = folder / "run.json"
seen = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ}
status.write_text(json.dumps({"status": "running", "seen": seen, "config": sys.argv[1]}))
print("a line from the child", flush=True)
"""


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    """A configuration whose run folder is temporary."""
    monkeypatch.chdir(tmp_path)
    return compose_config(["recipe=llava15_stage1", "run_name=first"])


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces the child's module by a small script that ends as the test says."""

    def write(ending: str) -> None:
        (tmp_path / "fake_child.py").write_text(FAKE_CHILD + textwrap.dedent(ending))
        paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        monkeypatch.setattr(launch, "CHILD", "fake_child")

    return write


DONE = 'status.write_text(json.dumps({"status": "done", "seen": seen, "metrics": {"val/loss": 0.5}}))'


def test_child_gets_the_config_and_its_metrics_come_back(cfg: DictConfig, child, capsys) -> None:
    child(DONE)
    assert launch.run_child(cfg) == {"val/loss": 0.5}
    folder = run_dir(cfg)
    assert load_config(folder / "config.yaml") == cfg
    assert "a line from the child" in capsys.readouterr().out
    assert "a line from the child" in (folder / "output.log").read_text()


def test_child_sees_no_other_process_group(cfg: DictConfig, child, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "7")
    child(DONE)
    launch.run_child(cfg)
    assert record.read_record(run_dir(cfg))["seen"] == {}


def test_a_child_is_read_where_its_log_cannot_be_written(cfg: DictConfig, child, capsys) -> None:
    (run_dir(cfg) / "output.log").mkdir(parents=True)
    child(f"print('x' * 300_000); {DONE}")  # more than a pipe holds
    assert launch.run_child(cfg) == {"val/loss": 0.5}
    assert "xxx" in capsys.readouterr().out


def test_failure_names_the_code_and_the_last_lines(cfg: DictConfig, child) -> None:
    child('print("the reason"); sys.exit(3)')
    with pytest.raises(
        launch.ChildError, match=r"(?s)fit of first failed \(exit code 3\).*output\.log.*the reason"
    ) as e:
        launch.run_child(cfg)
    assert e.value.code == 3
    assert record.read_record(run_dir(cfg))["status"] == "failed"


def test_killed_child_is_named_by_its_signal(cfg: DictConfig, child) -> None:
    child("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(launch.ChildError, match="killed by SIGKILL"):
        launch.run_child(cfg)


def test_exit_code_0_without_a_finished_run_is_a_failure(cfg: DictConfig, child) -> None:
    child("sys.exit(0)")
    with pytest.raises(
        launch.ChildError, match=r"fit of first ended without finishing \(exit code 0, status 'failed'\)"
    ):
        launch.run_child(cfg)
    assert record.read_record(run_dir(cfg))["status"] == "failed"


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(143)", 143), ("sys.exit(130)", 130), ("os.kill(os.getpid(), signal.SIGTERM)", 143)],
)
def test_child_stopped_by_others_counts_as_interrupted(cfg: DictConfig, child, ending: str, code: int) -> None:
    child(ending)
    with pytest.raises(Interrupted) as caught:
        launch.run_child(cfg)
    assert caught.value.code == code
    assert record.read_record(run_dir(cfg))["status"] == "interrupted"


def test_only_training_writes_the_runs_config(cfg: DictConfig, child) -> None:
    child("sys.exit(0)")
    cfg.mode = "eval"
    launch.run_child(cfg)
    assert not run_dir(cfg).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_child(cfg: DictConfig, child, tmp_path: Path, number: signal.Signals) -> None:
    child(  # a clean exit of a run that is not done
        """
        def stop(received, _):
            status.write_text(json.dumps({"status": "stopped", "signal": received}))
            sys.exit(0)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGUSR1, stop)
        (folder / "ready").touch()
        time.sleep(30)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", SUPERVISOR], cwd=tmp_path, stdout=subprocess.DEVNULL)
    folder = run_dir(cfg)
    _wait_for(folder / "ready")
    parent.send_signal(number)
    assert parent.wait(timeout=20) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}[number]
    assert record.read_record(folder) == {"status": "stopped", "signal": number}


def test_a_signal_while_a_child_starts_reaches_it(cfg: DictConfig, child, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(subprocess.Popen):
        """Sends us a signal as soon as the process exists."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGINT)

    child("time.sleep(30)")
    monkeypatch.setattr(launch.subprocess, "Popen", Started)
    with pytest.raises(Interrupted) as caught:
        launch.run_child(cfg)
    assert caught.value.code == 130


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_child_dies_with_a_killed_supervisor(cfg: DictConfig, child, tmp_path: Path) -> None:
    child("(folder / 'pid').write_text(str(os.getpid())); time.sleep(30)")
    parent = subprocess.Popen([sys.executable, "-c", SUPERVISOR], cwd=tmp_path, stdout=subprocess.DEVNULL)
    _wait_for(run_dir(cfg) / "pid")
    pid = int((run_dir(cfg) / "pid").read_text())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its supervisor")


SUPERVISOR = (
    "import sys; from vlm_train.config import compose; from vlm_train.runs import launch, process; "
    "launch.CHILD = 'fake_child'; cfg = compose.compose_config(['recipe=llava15_stage1', 'run_name=first']); "
    "sys.exit(process.run_guarded(lambda: launch.run_child(cfg)))"
)


def _wait_for(path: Path) -> None:
    for _ in range(200):
        if path.is_file() and (path.name != "pid" or path.read_text()):
            return
        time.sleep(0.1)
    pytest.fail(f"{path} did not appear")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torchrun's own handlers stay")
def test_a_signal_reaches_every_worker_once_and_they_end_themselves(cfg: DictConfig, child, tmp_path: Path) -> None:
    child(
        """
        import threading
        from vlm_train.runs import torchrun
        torchrun.exit_with_agent()
        received, rank = [], os.environ["RANK"]
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        (folder / f"ready{rank}").touch()
        while not received:
            time.sleep(0.05)
        time.sleep(1)
        (folder / f"received{rank}").write_text(str(len(received)))
        while not all((folder / f"received{one}").is_file() for one in "01"):
            time.sleep(0.05)  # the first to end makes torchrun end the other, with a signal of its own
        sys.exit(143)
        """
    )
    command = [sys.executable, "-c", SUPERVISOR.replace("run_child(cfg)", "run_child(cfg, 2)")]
    parent = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = run_dir(cfg)
    for rank in "01":
        _wait_for(folder / f"ready{rank}")
    parent.send_signal(signal.SIGTERM)
    output, _ = parent.communicate(timeout=30)
    assert parent.returncode == 143 and "Traceback" not in output, output
    assert [(folder / f"received{rank}").read_text() for rank in "01"] == ["1", "1"]
    assert record.read_record(folder)["status"] == "interrupted"


@pytest.mark.parametrize(("code", "status"), [(2, "running"), (3, "failed")])
def test_exit_code_of_a_worker_comes_through(cfg: DictConfig, child, code: int, status: str, capsys) -> None:
    child(f"sys.exit({code})")
    with pytest.raises(launch.ChildError) as caught:
        launch.run_child(cfg, 2)
    assert caught.value.code == code and "Traceback" not in capsys.readouterr().out
    assert record.read_record(run_dir(cfg))["status"] == status, "a refused command says nothing of the run"


@pytest.mark.parametrize("devices", [1, 2])
def test_a_refused_child_ends_the_command_with_its_code(cfg: DictConfig, child, devices: int, capsys) -> None:
    child("sys.exit(2)")
    assert process.run_guarded(lambda: launch.run_child(cfg, devices)) == 2
    said = capsys.readouterr().err
    assert "failed (exit code 2)" in said and "has to be corrected" in said and "resumes" not in said
    child("sys.exit(3)")
    assert process.run_guarded(lambda: launch.run_child(cfg, devices)) == 1


def test_the_loser_of_two_equal_commands_leaves_the_winners_record(cfg: DictConfig, child) -> None:
    child("sys.exit(3)")
    with record.lock_folder(run_dir(cfg)), pytest.raises(launch.ChildError):  # the winner trains
        launch.run_child(cfg)
    assert record.read_record(run_dir(cfg))["status"] == "running"
    with pytest.raises(launch.ChildError):
        launch.run_child(cfg)
    assert record.read_record(run_dir(cfg))["status"] == "failed"


@pytest.mark.skipif(sys.platform == "win32", reason="processes of Unix")
def test_the_command_ends_though_a_process_outlives_its_child(
    cfg: DictConfig, child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the pipe of the child's output, as loader workers of a killed rank did."""
    monkeypatch.setattr(launch, "DRAINING", 0.2)
    child(
        """
        import subprocess
        left = subprocess.Popen(["sleep", "300"], start_new_session=True)
        (folder / "left").write_text(str(left.pid))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    with pytest.raises(launch.ChildError, match="killed by SIGKILL"):
        launch.run_child(cfg)
    os.kill(int((run_dir(cfg) / "left").read_text()), signal.SIGKILL)  # it is still there: an error here otherwise


def test_an_interruption_is_said_once(cfg: DictConfig, child, capsys) -> None:
    child("print('Interrupted: SIGINT at step 3, which is saved.'); sys.exit(130)")
    assert process.run_guarded(lambda: launch.run_child(cfg)) == 130
    said = capsys.readouterr()
    assert (said.out + said.err).count("Interrupted: ") == 1
    child("sys.exit(130)")
    assert process.run_guarded(lambda: launch.run_child(cfg)) == 130
    assert "Interrupted: SIGINT" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torchrun ends the others, later")
def test_the_first_error_is_named_last_and_those_that_wait_end_soon(cfg: DictConfig, child) -> None:
    """Rank 0 waits as in a collective, where no handler runs; it notices the failure of rank 1 and fails as well."""
    child(
        """
        from vlm_train.runs import torchrun
        folder /= os.environ["RANK"]
        folder.mkdir()
        if os.environ["RANK"] == "1":
            while not (folder.parent / "0").is_dir():
                time.sleep(0.1)
            try:
                with torchrun.record_error():
                    raise ValueError("the original error")
            finally:
                (folder / "raised").touch()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while not (folder.parent / "1" / "raised").exists():
            time.sleep(0.1)
        try:
            with torchrun.record_error():
                raise RuntimeError("connection closed by peer")
        except RuntimeError:
            pass
        for tick in range(6000):
            (folder / "ticks").write_text(str(tick))
            time.sleep(0.1)
        """
    )
    with pytest.raises(
        launch.ChildError, match=r"(?s)exit code 1.*Rank 1 failed first: ValueError: the original error$"
    ):
        launch.run_child(cfg, 2)
    assert int((run_dir(cfg) / "0" / "ticks").read_text()) < 200, "torchrun takes 30 s"


def test_a_worker_that_torchrun_ended_is_not_the_first_failure(tmp_path, capsys) -> None:
    """On a busy machine torchrun collects the killed worker, and ends the other, before we see either."""
    failures = {
        0: SimpleNamespace(pid=10, exitcode=-signal.SIGTERM, timestamp=2),
        1: SimpleNamespace(pid=11, exitcode=-signal.SIGKILL, timestamp=2),
    }
    first = torchrun.FirstFailure(pid=10, code=-signal.SIGTERM, time=1)
    assert torchrun._report_first_failure(failures, first, tmp_path) == 137
    assert "Rank 1 was killed by SIGKILL" in capsys.readouterr().err
    alone = {0: failures[0]}
    assert torchrun._report_first_failure(alone, first, tmp_path) == 143, "somebody else's SIGTERM"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torchrun's choice stands")
def test_a_killed_worker_is_named(cfg: DictConfig, child) -> None:
    child("os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(600)")
    with pytest.raises(launch.ChildError, match=r"exit code 137(?s:.*)Rank 1 was killed by SIGKILL"):
        launch.run_child(cfg, 2)


def test_the_callers_handler_gets_the_signal_when_all_is_saved(cfg: DictConfig, child, tmp_path: Path) -> None:
    """As submitit's, which requeues the job."""
    child(
        """
        def stop(number, _):
            (folder / "saved").touch()
            sys.exit(143)
        signal.signal(signal.SIGUSR2, stop)
        (folder / "ready").touch()
        time.sleep(30)
        """
    )
    folder = run_dir(cfg)
    requeue = f"lambda *_: sys.exit(77 if Path({str(folder)!r}, 'saved').exists() else 78)"
    code = f"import signal; from pathlib import Path; {SUPERVISOR}".replace(
        "sys.exit(process", f"signal.signal(signal.SIGUSR2, {requeue}); sys.exit(process"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL)
    _wait_for(folder / "ready")
    parent.send_signal(signal.SIGUSR2)
    assert parent.wait(timeout=20) == 77
    assert record.read_record(folder)["status"] == "interrupted"


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch._collect_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.skipif(sys.platform == "win32", reason="flock is Unix's")
def test_a_live_run_is_left_alone(cfg: DictConfig) -> None:
    import fcntl

    folder = launch.prepare_folder(cfg, "origins")
    before = (folder / "config.yaml").read_text()
    cfg.seed = 43
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"run_name: .*first is being trained by another process"):
            launch.prepare_folder(cfg, "others")
    assert (folder / "config.yaml").read_text() == before
    assert (folder / "config_origins.txt").read_text() == "origins\n"
    launch.prepare_folder(cfg, "others")


def test_record_drops_what_is_none(tmp_path: Path) -> None:
    record.update_record(tmp_path, status="failed", exit_code=1)
    record.update_record(tmp_path, status="running", exit_code=None)
    assert record.read_record(tmp_path) == {"status": "running"}


def test_several_devices_go_through_torchrun(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def supervise(command: list[str], folder: Path) -> launch.Ended:
        seen.append(command)
        record.update_record(folder, status="done")
        return launch.Ended(0)

    monkeypatch.setattr(launch, "_supervise_child", supervise)
    launch.run_child(cfg, 1)
    launch.run_child(cfg, 4)
    path = str(run_dir(cfg) / "config.yaml")
    assert seen[0][1:] == ["-m", "vlm_train.runs.process", path]
    agent = ["vlm_train.runs.torchrun", "--standalone", "--nproc-per-node", "4"]
    assert seen[1][1:] == ["-m", *agent, "-m", "vlm_train.runs.process", path]


def test_child_reports_its_errors_without_a_traceback(cfg: DictConfig, tmp_path: Path, capsys) -> None:
    cfg.connector._target_ = "os.system"
    save_config(cfg, tmp_path / "config.yaml")
    assert process.main([str(tmp_path / "config.yaml")]) == 2
    assert "connector._target_: 'os.system' is not trusted" in capsys.readouterr().err


def test_folder_of_another_configuration_is_refused(cfg: DictConfig) -> None:
    folder = launch.prepare_folder(cfg, "origins")
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert launch.prepare_folder(cfg, "origins") == folder
    cfg.seed = 43
    with pytest.raises(ConfigError, match=r"seed: 42 -> 43.*run_name"):
        launch.prepare_folder(cfg, "origins")


def test_only_training_runs_in_several_processes(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg.mode, cfg.launch.kind = "eval", "torchrun"
    with pytest.raises(ConfigError, match="mode: eval runs in one process, but torchrun started several"):
        launch.check_environment(cfg)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "local"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "srun"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, "local"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "local"),
    ],
)
def test_started_by(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.started_by() == expected


def test_status_of_a_missing_run_is_empty(tmp_path: Path) -> None:
    assert record.read_record(tmp_path) == {}
    (tmp_path / "run.json").write_text(json.dumps({"status": "done"}))
    assert launch.read_result(tmp_path) == {}


def test_another_agent_that_leaves_first_is_no_news() -> None:
    """torch logs a traceback where the machine that had the rendezvous is done before the others."""
    import logging

    from vlm_train.runs import torchrun

    name = "torch.distributed.elastic.agent.server.api"
    said = [
        logging.LogRecord(name, logging.ERROR, "api.py", 1, text, (1.0,), None)
        for text in ("Error waiting on exit barrier. Elapsed: %s seconds", "Something else after %s seconds")
    ]
    assert [torchrun._is_cause(one) for one in said] == [False, True]


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_of_several_that_is_done_leaves_the_interpreter_standing(ranks: int) -> None:
    """What aborts while the interpreter is taken down cannot turn a finished run into a failed one."""
    code = """
        import atexit, os, sys, threading, time
        from vlm_train.runs.torchrun import run_and_exit
        class Last:
            def __del__(self, abort=os.abort):
                abort()
        sys.last = Last()
        atexit.register(print, "exit function")
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
        run_and_exit(lambda: print("work", end=" ") or 0)
    """
    environment = {**os.environ, **({"RANK": "1"} if ranks == 2 else {"SLURM_NTASKS": "1"})}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "work thread\nexit function\n"
    assert ended.returncode == (0 if ranks == 2 else -signal.SIGABRT)
