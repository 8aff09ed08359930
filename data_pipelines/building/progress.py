"""Progress of a command: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 10.0  # between lines


class Progress:
    """`total` steps of any size, each with a number of records; says records per second and the time left."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._start = self._said = time.monotonic()
        self._steps = self._records = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        more = (TextColumn(f"{unit}, {{task.fields[rate]:.0f}} records/s,"), TimeRemainingColumn())
        self._bar = Bar(*columns, *more, console=Console(stderr=True)) if sys.stderr.isatty() else None
        self._task = self._bar.add_task(name, total=total, rate=0.0) if self._bar else None

    def add_records(self, records: int) -> None:
        """One more step is done."""
        self._steps, self._records = self._steps + 1, self._records + records
        now = time.monotonic()
        rate = self._records / max(now - self._start, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, rate=rate)
        elif now - self._said > PLAIN_SECONDS:
            self._said = now
            left = (now - self._start) / self._steps * (self._total - self._steps)
            done = f"{self._steps}/{self._total} {self._unit}, {self._records} records"
            print(f"{self._name}: {done}, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
