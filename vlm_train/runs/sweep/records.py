"""What a sweep leaves in its folder: `sweep.json` and, each written by its own process, `jobs/<hash>.json`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from vlm_train.errors import ConfigError
from vlm_train.runs import record
from vlm_train.runs.sweep.direction import direction_of

SWEEP, JOBS, STOP = "sweep.json", "jobs", "stop"
FALLBACK = ("val_loss", "loss")
"""What runs are ranked by without `sweep_metric`: the first that one of them has."""

PARAMS = "hydra.sweeper.params"


@dataclass
class Job:
    """One job: what was asked, where it ran and how it ended. `seconds` counts the last start only."""

    number: int
    overrides: list[str]
    status: str = "running"  # running | done | failed | interrupted
    run: str = ""  # folder of the run or schedule
    error: str = ""
    refused: bool = False  # a setting is wrong, which another start does not change
    metrics: dict[str, float] = field(default_factory=dict)  # final ones
    devices: int = 1
    seconds: float = 0.0
    already: bool = False  # was done before this start of the sweep
    host: str = ""
    pid: int = 0  # of the process that supervises it
    written: float = 0.0  # seconds since the epoch

    def value_of(self, key: str) -> str:
        """The text that its overrides give `key`; empty without one."""
        return next((text for name, text in map(split_override, reversed(self.overrides)) if name == key), "")

    def make_label(self, keys: Iterable[str]) -> str:
        """What tells it from the other jobs: `optim.lr=0.001 seed=2`."""
        return " ".join(f"{key}={self.value_of(key)}" for key in keys) or " ".join(self.overrides)

    def write_file(self, folder: Path) -> None:
        """Replaces its file below the sweep's folder."""
        self.written = time.time()
        record.write_json(folder / JOBS / f"{hash_overrides(sorted(self.overrides))}.json", asdict(self))


@dataclass(frozen=True)
class Sweep:
    """A sweep as its folder tells it."""

    name: str
    jobs: list[Job]
    keys: list[str]  # what is swept
    metric: str | None
    lower: bool  # whether lower values of the metric are better

    def score_of(self, job: Job) -> float | None:
        """The metric of a job that is done."""
        value = job.metrics.get(self.metric or "")
        return float(value) if job.status == "done" and value is not None and math.isfinite(value) else None

    def rank_jobs(self) -> list[Job]:
        """Jobs, best first; then those without the metric, in their order."""
        sign = 1 if self.lower else -1
        scores = {id(job): self.score_of(job) for job in self.jobs}
        return sorted(
            self.jobs,
            key=lambda job: (scores[id(job)] is None, sign * (scores[id(job)] or 0.0), job.number),
        )


def hash_overrides(overrides: Sequence[str]) -> str:
    """Eight hexadecimal digits that name overrides."""
    return hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]


def split_override(override: str) -> tuple[str, str]:
    """An override's key, without `+`, and the text of its value."""
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def value_given(overrides: Iterable[str], key: str) -> str | None:
    """The text that the last override of `key` gives it."""
    return next((text for name, text in map(split_override, reversed(list(overrides))) if name == key), None)


def start_sweep(folder: Path, overrides: Sequence[str]) -> None:
    """Writes `sweep.json` and drops the jobs that are not done, which this start runs again."""
    (folder / STOP).unlink(missing_ok=True)
    for path in (folder / JOBS).glob("*.json"):
        if (_read_json(path) or {}).get("status") != "done":
            path.unlink()
    metric, direction = value_given(overrides, "sweep_metric"), value_given(overrides, "hydra.sweeper.direction")
    direction = direction or (direction_of(metric, overrides) if metric else None)
    content = {"name": folder.name, "overrides": list(overrides), "keys": swept_keys(overrides), "metric": metric}
    record.write_json(folder / SWEEP, content | {"direction": direction})


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that the command line gives several values, or that the sweeper gives them."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    keys = [override.key_or_group for override in parsed if override.is_sweep_override()]
    for override in parsed:
        value = override.value() if not override.is_sweep_override() else None
        if override.key_or_group == PARAMS and isinstance(value, dict):
            keys += map(str, value)
    return [key for key in dict.fromkeys(keys) if not key.startswith("hydra")]


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder; files that cannot be read are left out. Raises ConfigError without a `sweep.json`."""
    content = _read_json(folder / SWEEP)
    if content is None:
        raise ConfigError(f"'{folder}' is not a sweep: it holds no {SWEEP}")
    found = [job for path in (folder / JOBS).glob("*.json") if (job := _parse_job(_read_json(path)))]
    for job in found:
        if job.status == "running" and _is_gone(job):
            job.status = "interrupted"
    jobs = sorted(found, key=lambda job: (job.number, job.overrides))
    names = dict.fromkeys(split_override(override)[0] for job in jobs for override in job.overrides)
    differ = [key for key in names if len({job.value_of(key) for job in jobs}) > 1]
    keys = list(dict.fromkeys([*map(str, content.get("keys") or []), *differ]))
    metric = content.get("metric") or next((name for name in FALLBACK if any(name in j.metrics for j in jobs)), None)
    lower = content.get("direction") or direction_of(str(metric), content.get("overrides") or [])
    return Sweep(str(content.get("name", folder.name)), jobs, keys, metric, lower == "minimize")


def _parse_job(content: dict[str, Any] | None) -> Job | None:
    """A job from its file; None where the file is of another kind."""
    known = {f.name for f in fields(Job)}
    try:
        job = Job(**{key: value for key, value in (content or {}).items() if key in known})
        job.overrides = [str(override) for override in job.overrides]
        job.metrics = {str(key): float(value) for key, value in job.metrics.items()}
        return job
    except (TypeError, ValueError, AttributeError):
        return None


def _is_gone(job: Job) -> bool:
    """Whether the process of a job on this machine was killed before it could say so."""
    if job.host != socket.gethostname():
        return False
    try:
        os.kill(job.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return False


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
