"""Files of JSON lines that a run appends to: metrics.jsonl, the record of truth, and what was left out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonlWriter:
    """Appends lines to a file. One that cannot be written is printed, and waits for the next to be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def write_line(self, line: Mapping[str, Any]) -> None:
        """Append a line, after those that wait."""
        self.waiting.append(json.dumps(line) + "\n")
        try:
            self._append_lines("".join(self.waiting).encode())
        except OSError as error:
            print(f"{self.path}: cannot be written: {error}; waiting: {self.waiting[-1].strip()}", flush=True)
        else:
            self.waiting = []

    def _append_lines(self, lines: bytes) -> None:
        """All of `lines` or nothing: a full disk may take half of them."""
        number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        end = os.fstat(number).st_size
        if end and os.pread(number, 1, end - 1) != b"\n":
            lines = b"\n" + lines  # a killed process left half a line
        try:
            while lines:
                lines = lines[os.write(number, lines) :]
        except OSError:
            os.ftruncate(number, end)
            raise
        finally:
            os.close(number)


SHOWN = ("loss", "grad_norm", "samples_per_second", "skipped", "skipped_steps")


def format_row(row: Mapping[str, float]) -> str:
    """What the terminal says of a line: some of the values of training, with the highest learning rate; all that an
    evaluator found."""
    chosen = {name: value for name, value in row.items() if name in SHOWN} or dict(row)
    rates = [value for name, value in row.items() if name.startswith("lr/")]
    chosen |= {"lr": max(rates)} if rates else {}
    return "  ".join(f"{name} {value:.4g}" for name, value in chosen.items() if value or name != "skipped")
