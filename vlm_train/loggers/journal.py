"""metrics.jsonl, the record of truth."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_train.record import METRICS


class Journal:
    """Appends lines to metrics.jsonl. One that cannot be written is printed, and waits for the next to be written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.waiting: list[str] = []

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, after those that wait."""
        self.waiting.append(json.dumps(line) + "\n")
        try:
            self._append("".join(self.waiting).encode())
        except OSError as error:
            print(f"{self.path}: cannot be written: {error}; waiting: {self.waiting[-1].strip()}", flush=True)
        else:
            self.waiting = []

    def _append(self, lines: bytes) -> None:
        """All of `lines` or nothing: a full disk may take half of them."""
        number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        end = os.fstat(number).st_size
        try:
            while lines:
                lines = lines[os.write(number, lines) :]
        except OSError:
            os.ftruncate(number, end)
            raise
        finally:
            os.close(number)


SHOWN = ("loss", "grad_norm", "samples_per_second", "skipped", "skipped_steps")


def shown(row: Mapping[str, float]) -> str:
    """What the terminal says of a line."""
    chosen = ((k, v) for k, v in row.items() if (k in SHOWN or k.endswith("/accuracy")) and (v or k != "skipped"))
    return "  ".join(f"{name} {value:.4g}" for name, value in chosen)
