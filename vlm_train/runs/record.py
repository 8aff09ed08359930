"""`run.json` and `metrics.jsonl` of a run: damaged files are tolerated, and writing is atomic."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from vlm_train.errors import ConfigError
from vlm_train.runs.folder import RunFolder

log = logging.getLogger("vlm_train")


TYPES: dict[str, type] = {"status": str, "step": int, "total_steps": int, "metrics": dict, "results": list,
                         "results_before": list}  # fmt: skip
"""What the code reads of a run.json, and as which type."""


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a run folder; empty without one. A corrupt one counts as none, as do values of a wrong type, and
    the log says so."""
    path = RunFolder(folder).record
    found = read_json(path)
    wrong = [key for key, kind in TYPES.items() if found.get(key) is not None and type(found[key]) is not kind]
    for key in wrong:
        log.warning("%s: %s is ignored: expected %s, got %.40r", path, key, TYPES[key].__name__, found.pop(key))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of ours; empty without one. A corrupt one counts as none, and the log says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets nested by the thousand
        log.warning("%s cannot be read and is ignored: %s", path, error)
        return {}
    if not isinstance(content, dict):
        log.warning("%s is ignored: expected an object, got %s", path, type(content).__name__)
        return {}
    return content


def update_record(folder: Path, **changes: Any) -> None:
    """Merges `changes` into the run.json of a run folder, which is created where missing. None removes a key."""
    kept = {key: value for key, value in read_record(folder).items() if key not in changes}
    write_json(RunFolder(folder).record, kept | {key: value for key, value in changes.items() if value is not None})


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that readers see the old file or the new one, never a part, whichever process writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: objects with a step and a split. Others, such as a last one that a kill cut short,
    are left out."""
    return [row for row in read_lines(RunFolder(folder).metrics) if _is_metrics(row)]


def _is_metrics(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int and isinstance(row.get("split"), str)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; damaged lines are left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def last_loss(folder: Path, split: str) -> dict[str, Any]:
    """The last line of metrics.jsonl that has a loss of this split; empty without one."""
    found = [row for row in read_metrics(folder) if row["split"] == split and "loss" in row]
    return found[-1] if found else {}


def keep_metrics(folder: Path, step: int) -> None:
    """Drop the log lines after a step, which will be written again."""
    kept = [row for row in read_metrics(folder) if row["step"] <= step]
    with atomic_write(RunFolder(folder).metrics) as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds a run folder, so that the same command, started twice, does not write to it twice. A process that ends, or
    is killed, releases it; its loader processes, which may outlive it for seconds, do not hold it.

    Raises:
        ConfigError: another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(RunFolder(folder).lock, fallback_to_soft=False)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"run_name: {folder} is being trained by another process.") from None
    try:
        yield
    finally:
        held.release()
