"""`run.json`, the record of a run, and other small JSON files: read with tolerance, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger("vlm_train")

RECORD = "run.json"


def read(folder: Path) -> dict[str, Any]:
    """The run.json of a run folder; empty without one. A corrupt one counts as none, and the log says so."""
    path = folder / RECORD
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
    """Merges `changes` into the run.json of a run folder, which is created where missing."""
    write_json(folder / RECORD, read(folder) | changes)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that readers see the old file or the new one, never a part, whichever process writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
