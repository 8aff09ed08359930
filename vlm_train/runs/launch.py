"""How processes are started: `run_child` is the one way a process tree starts.

Several devices, every stage of a schedule and every job of a multirun go through it. Lightning never spawns processes.
What a child runs is `process.py`.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlm_train.config.run_file import load_config, save_config
from vlm_train.config.run_identity import run_dir, training_config
from vlm_train.distributed import exit_with_parent, require_devices
from vlm_train.errors import ENDING, PREEMPTING, REFUSED, ConfigError, Interrupted, TrainingError
from vlm_train.runs import record, torchrun
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.rollback import read_rollbacks

log = logging.getLogger("vlm_train")

PARALLEL_MODES = ("fit",)
"""Modes that use several devices; the others run in one process."""

INHERITED_STATE = (
    torchrun.PID, torchrun.ERRORS,
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""Variables of another process group, which a fresh process tree must not see."""

CHILD = "vlm_train.runs.process"
"""The module that a child process runs."""

FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""NCCL's last collectives are kept, and written to `<run>/nccl-trace-<rank>` when one times out."""

LAST_LINES = 15

DRAINING = 5.0
"""Seconds that the last output of a child which has ended may take."""


class ChildError(TrainingError):
    """A child process that ended with an error. `code` is its exit code, negative for a signal; only that of a refused
    setting becomes the command's own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def started_by() -> str:
    """Who started this process: torchrun, srun, or local (the user, or `run_child`)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        return "torchrun"
    in_step = "SLURM_STEP_ID" in os.environ  # a batch script has a SLURM_PROCID too, but no step
    return "srun" if in_step and int(os.environ.get("SLURM_NTASKS", 1)) > 1 else "local"


def check_environment(cfg: DictConfig) -> None:
    """Raises ConfigError when `launch` contradicts the way this process was started."""
    found, kind = started_by(), cfg.launch.kind
    if found != "local" and cfg.mode not in PARALLEL_MODES:
        raise ConfigError(f"mode: {cfg.mode} runs in one process, but {found} started several. Start it without.")
    if kind == "local" and found != "local":
        raise ConfigError(f"launch.kind: got local, but {found} started this process. Use launch={found}.")
    if kind == "torchrun" and "RANK" not in os.environ:
        raise ConfigError("launch.kind: torchrun starts the processes: torchrun --nproc-per-node 8 -m vlm_train ...")
    if kind == "srun" and "SLURM_PROCID" not in os.environ:
        raise ConfigError("launch.kind: srun starts the processes: srun python -m vlm_train ...")
    if cfg.mode == "fit" and not cfg.dry_run and cfg.trainer.accelerator == "gpu":
        require_devices(cfg)  # before a folder is filled and data are read


def prepare_folder(cfg: DictConfig, origins: str) -> Path:
    """Fills a new run folder: `config.yaml` with interpolations kept, and `config_origins.txt`. Returns the folder.

    Raises ConfigError when the folder holds checkpoints of another training configuration, or a run that is going on.
    """
    folder = run_dir(cfg)
    with record.lock_folder(folder):  # a training holds it: nothing of a live run is overwritten
        pass
    run = RunFolder(folder)
    previous = run.config
    if previous.is_file() and any(run.checkpoints.glob("*/")):
        _refuse_other_run(cfg, load_config(previous), folder)
    save_config(cfg, previous)
    run.origins.write_text(origins + "\n", encoding="utf-8")
    return folder


def _refuse_other_run(cfg: DictConfig, previous: DictConfig, folder: Path) -> None:
    from vlm_train.config.origins import flatten_leaves

    new, old = flatten_leaves(training_config(cfg)), flatten_leaves(training_config(previous))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        scalars = [key for key in changed if not isinstance(new.get(key, old.get(key)), list)] or changed
        listed = "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in scalars[:8])
        raise ConfigError(
            f"run_name: {folder} holds checkpoints of another configuration ({listed}). "
            "Choose another run_name, or start from its weights with init_from."
        )


def run_child(cfg: DictConfig, devices: int | None = None) -> dict[str, Any]:
    """Runs `cfg` in a fresh process tree of `devices` processes and returns the final metrics from its run.json.

    The child's output goes to our terminal, or, where there is none, to our output and `<run>/output.log`.
    Signals are forwarded; a run that goes back to a checkpoint is started again. Raises ChildError with the exit code
    and where to look, also when a training ended without being done, and Interrupted when a signal ended it.
    """
    devices = cfg.launch.devices if devices is None else devices
    folder = run_dir(cfg)
    with _config_file(cfg, folder) as path:
        several = (
            ["vlm_train.runs.torchrun", "--standalone", "--nproc-per-node", str(devices), "-m"] if devices > 1 else []
        )
        command = [sys.executable, "-m", *several, CHILD, str(path)]
        start = partial(_supervise_child, command, folder if cfg.mode == "fit" else None)
        rollbacks = 0 if cfg.resume == "restart" else len(read_rollbacks(folder))
        ended = start()
        while not ended.signal and len(read_rollbacks(folder)) > rollbacks:  # the child has prepared to go back
            rollbacks = len(read_rollbacks(folder))
            again = cfg.copy()
            again.resume = "auto"
            save_config(again, path)
            ended = start()
    trains = cfg.mode == "fit" and not cfg.dry_run
    if ended.code == 0 and (not trains or record.read_record(folder).get("status") == "done"):
        return read_result(folder)
    if trains:
        _mark_ended(folder, ended)
    if ended.signal:
        _tell_caller(ended.signal)
        raise Interrupted(ended.signal, said=ended.says("Interrupted: "))
    raise ChildError(_describe_end(cfg, folder, ended), ended.code)


def _tell_caller(number: int) -> None:
    """A handler that was there before us gets the signal too, now that all is saved: submitit's requeues the job."""
    handler = signal.getsignal(number)
    if number in PREEMPTING and callable(handler) and threading.current_thread() is threading.main_thread():
        handler(number, None)


def read_result(folder: Path) -> dict[str, Any]:
    """The final metrics that a finished run left in its run.json; empty without one."""
    return dict(record.read_record(folder).get("metrics") or {})


@contextmanager
def _config_file(cfg: DictConfig, folder: Path) -> Iterator[Path]:
    """The configuration on disk for a child: the run's own when training, else a temporary one."""
    if cfg.mode == "fit" and not cfg.dry_run:
        save_config(cfg, RunFolder(folder).config)
        yield RunFolder(folder).config
    else:
        with tempfile.TemporaryDirectory(prefix="vlm_train-") as temporary:
            save_config(cfg, RunFolder(temporary).config)
            yield RunFolder(temporary).config


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, its last lines where we see them, and the signal that stopped it, or 0."""

    code: int
    last: list[str] = field(default_factory=list)
    signal: int = 0

    def says(self, start: str) -> bool:
        """Whether one of its last lines begins so."""
        return any(line.startswith(start) for line in self.last)


def _supervise_child(command: Sequence[str], folder: Path | None) -> Ended:
    """Starts a process tree, forwards signals and waits for its end."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in INHERITED_STATE and not name.startswith("TORCHELASTIC_")
    }
    if folder:
        environment = FLIGHT_RECORDER | {"TORCH_FR_DUMP_TEMP_FILE": f"{folder.absolute()}/nccl-trace-"} | environment
    piped = not sys.stdout.isatty()
    sys.stdout.flush()
    last: deque[str] = deque(maxlen=LAST_LINES)
    with _collect_signals() as received:  # before the child exists: a signal in between would end us, and leave it
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE if piped else None,
            stderr=subprocess.STDOUT if piped else None,
            start_new_session=True,  # Ctrl-C reaches the child once, through us
            preexec_fn=exit_with_parent if sys.platform == "linux" else None,
        )
        copying = threading.Thread(target=_copy_output, args=(child, folder, last), daemon=True)
        if piped:
            copying.start()
        forwarded = 0
        while child.poll() is None:
            for number in received[forwarded:]:
                child.send_signal(number)
                forwarded += 1
            time.sleep(0.05)
        copying.join(DRAINING if piped else 0.0)  # a process that outlives the child may hold the pipe
    return Ended(child.returncode, [*last], received[0] if received else _stopping_signal(child.returncode))


def _stopping_signal(code: int) -> int:
    """The signal that stopped a child which got it from others than us, a batch system for example; 0 for none."""
    return next((int(number) for number in ENDING if code in (-number, 128 + number)), 0)


@contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Yields a list that the signals which would end us are added to. Handlers need the main thread."""
    previous = {}
    received: list[int] = []
    try:
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                previous[number] = signal.signal(number, lambda number, _: received.append(number))
    except ValueError:
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _copy_output(child: subprocess.Popen[bytes], folder: Path | None, last: deque[str]) -> None:
    """Copies the child's output to ours and to `<run>/output.log`, and keeps the last lines.

    A full disk, or a reader of ours that is gone, does not end the child.
    """
    assert child.stdout is not None
    with _open_log(folder) as copy:
        for line in child.stdout:
            last.append(line.decode(errors="replace").rstrip())
            with suppress(OSError):
                copy.write(line)
            with suppress(OSError, ValueError):  # gone, closed, or of another encoding
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()


def _open_log(folder: Path | None) -> io.RawIOBase:
    """`<folder>/output.log`; nowhere without one, or where it cannot be opened: the child must be read all the same."""
    with suppress(OSError):
        return open(RunFolder(folder).output if folder else os.devnull, "ab", buffering=0)
    return open(os.devnull, "ab", buffering=0)


def _describe_end(cfg: DictConfig, folder: Path, ended: Ended) -> str:
    if ended.code == 0:
        how = f"ended without finishing (exit code 0, status {record.read_record(folder).get('status', 'missing')!r})"
    else:
        code = ended.code
        how = f"failed ({f'exit code {code}' if code > 0 else f'killed by {signal.Signals(-code).name}'})"
    where = f"Its output: {RunFolder(folder).output}" if ended.last and cfg.mode == "fit" else "Its messages are above"
    tail = "".join(f"\n    | {line}" for line in ended.last if line)
    again = "a setting has to be corrected" if ended.code == REFUSED else "the same command resumes"
    return f"{cfg.mode} of {folder.name} {how}. {where}; {again}.{tail}"


def _mark_ended(folder: Path, ended: Ended) -> None:
    """A child that was killed could not say so itself. One that was refused says nothing of the run, nor does any while
    another process trains it: the same command, started twice."""
    if ended.code == REFUSED:
        return
    with suppress(ConfigError), record.lock_folder(folder):
        if record.read_record(folder).get("status") == "running":
            record.update_record(folder, status="interrupted" if ended.signal else "failed", exit_code=ended.code)
