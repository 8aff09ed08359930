"""One job of a sweep, in the process where the launcher wants it: it starts a fresh process tree and keeps the record.

Nothing of the training runs here, so that nothing leaks from job to job and a crash ends that job alone.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from data_pipelines.errors import DataError
from data_pipelines.nearest import did_you_mean
from vlm_train.check.hydra_errors import Composition, explain_errors
from vlm_train.config.run_file import load_config
from vlm_train.config.run_identity import run_dir, training_hash
from vlm_train.config.size import finish_config
from vlm_train.errors import FAILED, REFUSED, ConfigError, Interrupted, VLMTrainError
from vlm_train.runs import launch, record
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.sweep import records, summary

FAILURES = (VLMTrainError, DataError, OSError, *Composition)


class JobError(VLMTrainError):
    """A job that failed, for sweepers: they must know, and other processes must be able to send it."""


def carry_out(cfg: DictConfig) -> float | None:
    """Carries out one job and returns what a sweeper optimises: the metric named by `sweep_metric`.

    A job that is done already is only reported. Raises JobError where a sweeper other than Hydra's own counts failures.
    """
    state = HydraConfig.get()
    place = _locate_job(state)
    overrides = [str(override) for override in state.overrides.task]
    entry = records.Job(int(state.job.num), overrides, host=socket.gethostname(), pid=os.getpid())
    started = time.monotonic()
    if not place.here:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us through the sweep's own process
    try:
        return _run_recorded(entry, cfg, state, place, started)
    except (Interrupted, KeyboardInterrupt):
        _record_end(entry, place, started, "interrupted")
        if place.here:
            raise
        return None
    except FAILURES as error:
        problems = (
            explain_errors(overrides, place.dirs, error) if isinstance(error, Composition) else _error_lines(error)
        )
        entry.refused = isinstance(error, Composition) or getattr(error, "code", FAILED) == REFUSED
        _record_end(entry, place, started, "failed", error=" ".join(problems))
        if place.counts_failures:
            raise JobError(f"job {entry.number} failed") from None
        return None
    except BaseException as error:  # a bug of ours, whose traceback Hydra shows at the end
        _record_end(entry, place, started, "failed", error=f"{type(error).__name__}: {error}")
        raise


@dataclass(frozen=True)
class _Place:
    """Where a job is carried out: its sweep's folder, and whether that is the process which the user started."""

    folder: Path
    here: bool
    counts_failures: bool
    dirs: list[str]


def _locate_job(state: Any) -> _Place:
    choices = state.runtime.choices
    dirs = [source.path for source in state.runtime.config_sources if source.provider == "command-line"]
    here, own = choices["hydra/launcher"] == "basic", choices["hydra/sweeper"] == "basic"
    return _Place(Path(state.sweep.dir).absolute(), here, not own, dirs)


def _run_recorded(entry: records.Job, cfg: DictConfig, state: Any, place: _Place, started: float) -> float | None:
    """The job between its record's first and last state."""
    from vlm_train.runs import process
    from vlm_train.runs.single import run

    cfg = finish_config(cfg, state.runtime.choices, entry.overrides)
    folder, done = _run_of(cfg, entry.overrides, place.dirs)
    entry.run, entry.devices, entry.already = str(folder), cfg.launch.devices * cfg.launch.nodes, done
    entry.write_file(place.folder)
    if (place.folder / records.STOP).exists():  # looked for after we can be found
        raise Interrupted(signal.SIGTERM)
    if done:
        result = launch.read_result(folder)
    else:
        mark = "" if place.here else f"[{entry.number}] "
        with (
            _Lines(sys.stdout, mark) as lines,
            redirect_stdout(lines),
            _shorten_messages(),
            process.interrupt_on_signals(),
        ):
            result = run(entry.overrides, place.dirs, fresh=True) or {}
    value = _metric_value(cfg, result)
    entry.metrics = {key: float(number) for key, number in result.items() if isinstance(number, int | float)}
    _record_end(entry, place, started, "done")
    return value


def _run_of(cfg: DictConfig, overrides: list[str], dirs: list[str]) -> tuple[Path, bool]:
    """The folder of the job's run or schedule, and whether nothing is left to do there."""
    trains = cfg.mode == "fit" and not cfg.dry_run
    if cfg.schedule is not None:
        from vlm_train.runs import schedule

        name, stages = schedule.plan_schedule(overrides, dirs)
        return schedule.folder_of(name, stages), trains and all(stage.done for stage in stages)
    folder = run_dir(cfg)
    if not trains or cfg.resume != "auto" or record.read_record(folder).get("status") != "done":
        return folder, False
    same = training_hash(load_config(RunFolder(folder).config)) == training_hash(cfg)
    return folder, same  # a `run_name` may stand for another configuration, which is then refused


def _metric_value(cfg: DictConfig, result: dict[str, Any]) -> float | None:
    """The metric named by `sweep_metric`."""
    if cfg.sweep_metric is None:
        return None
    if cfg.sweep_metric not in result:
        suggestion = did_you_mean(cfg.sweep_metric, result)
        raise ConfigError(f"sweep_metric: no {cfg.sweep_metric!r} here.{suggestion} The run has: {', '.join(result)}.")
    return float(result[cfg.sweep_metric])


def _record_end(entry: records.Job, place: _Place, started: float, status: str, error: str = "") -> None:
    """Records how the job ended and, in the process that the user started, says so."""
    entry.status, entry.error, entry.seconds = status, error, time.monotonic() - started
    entry.write_file(place.folder)
    if place.here:
        summary.announce_end(entry, records.read_sweep(place.folder))


def _error_lines(error: BaseException) -> list[str]:
    """What an error says, in one line each; of a child's last lines, which are in its log, the one that says why."""
    if isinstance(error, ConfigError):
        return error.problems
    if isinstance(error, launch.ChildError):
        first, *last = str(error).splitlines()
        why = [match[1] for line in last if (match := re.search(r"((?:[A-Z]\w*)?Error: .*)", line))]
        return [*why[-1:], first]
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {error.strerror}"]
    return [str(error).partition("\n")[0]]


@contextmanager
def _shorten_messages() -> Iterator[None]:
    """Leaves out what every job would repeat: where its keys come from, and tracebacks of errors that speak for
    themselves. `run_hydra` asks Hydra for these, not the child; VLM_TRAIN_TRACEBACK=1 asks both.
    """
    log = logging.getLogger("vlm_train")
    level, traceback = log.level, os.environ.pop("HYDRA_FULL_ERROR", None)
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
        if traceback is not None:
            os.environ["HYDRA_FULL_ERROR"] = traceback


class _Lines(io.TextIOBase):
    """No terminal, so that a child's output also goes to its log. Whole lines, marked where several jobs share ours."""

    def __init__(self, target: Any, mark: str) -> None:
        self.target, self.mark, self.rest = target, mark, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.target.write("".join(f"{self.mark}{line}\n" for line in lines))
            self.target.flush()
        return len(text)

    def close(self) -> None:
        if self.rest:
            self.write("\n")
        super().close()
