"""What a run says of itself, `run.json` and `metrics.jsonl`: read with tolerance, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_train.errors import ConfigError

log = logging.getLogger("vlm_train")

RECORD, METRICS = "run.json", "metrics.jsonl"


def read(folder: Path) -> dict[str, Any]:
    """The run.json of a run folder; empty without one. A corrupt one counts as none, and the log says so."""
    return read_json(folder / RECORD)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; empty without one. A corrupt one counts as none, and the log says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and is ignored: %s", path, error)
        return {}
    if not isinstance(content, dict):
        log.warning("%s is ignored: expected an object, got %s", path, type(content).__name__)
        return {}
    return content


def update(folder: Path, **changes: Any) -> None:
    """Merges `changes` into the run.json of a run folder, which is created where missing. None removes a key."""
    kept = {key: value for key, value in read(folder).items() if key not in changes}
    write_json(folder / RECORD, kept | {key: value for key, value in changes.items() if value is not None})


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that readers see the old file or the new one, never a part, whichever process writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that a kill cut short is left out."""
    path, rows = folder / METRICS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def last_loss(folder: Path, split: str) -> dict[str, Any]:
    """The last line of metrics.jsonl that has a loss of this split; empty without one."""
    found = [row for row in metrics(folder) if row["split"] == split and "loss" in row]
    return found[-1] if found else {}


def keep_metrics(folder: Path, step: int) -> None:
    """Drop the log lines after a step, which will be written again."""
    kept = [row for row in metrics(folder) if row["step"] <= step]
    partial = folder / f"{METRICS}.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(folder / METRICS)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run folder, so that the same command, started twice, does not write to it twice.

    Raises:
        ConfigError: another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:  # closing it gives the lock back
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run_name: {folder} is being trained by another process.") from None
        # Loader processes may outlive a killed run for seconds: they must not go on holding it.
        os.register_at_fork(after_in_child=file.close)
        yield
