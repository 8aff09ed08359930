"""Paired measurements: A and B alternate in one run, and what counts is the median of their ratios.

The machine's mood (other programs, clocks, caches) changes within seconds and hits both sides of a pair about alike, so
ratios hold where absolute times do not.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Run = Callable[[], float]
"""One measurement: returns a rate, or a time."""

Tick = Callable[[], None]
"""Says that a step is done; returns when the next one may begin."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table.

    Attributes:
        value: median of the paired ratios, or the number itself.
        low, high: quartiles of the paired ratios.
        must, aim: the goals; `less`: a value below them is good.
        ours, theirs: medians of both sides, in `unit`.
    """

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    must: float | None = None
    aim: float | None = None
    less: bool = False
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """aim, must, or MISSED; empty without a goal or a value."""
        if self.value is None or self.must is None:
            return ""
        sign = -1.0 if self.less else 1.0
        if self.aim is not None and sign * self.value >= sign * self.aim:
            return "aim"
        return "must" if sign * self.value >= sign * self.must else "MISSED"


def paired(name: str, ours: Run, theirs: Run, *, pairs: int, **about: Any) -> Line:
    """The ratio ours / theirs, after one pair of warm-up. The side that goes first alternates."""
    ours(), theirs()
    found: list[tuple[float, float]] = []
    for number in range(pairs):
        if number % 2:
            second = theirs()
            found.append((ours(), second))
        else:
            found.append((ours(), theirs()))
    return ratio(name, found, **about)


def ratio(name: str, pairs: Sequence[tuple[float, float]], **about: Any) -> Line:
    """The median ratio of measured pairs, ours and theirs."""
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(pairs) > 1 else ratios * 3
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Line(name=name, value=middle, low=low, high=high, pairs=len(pairs), ours=ours, theirs=theirs, **about)


def in_turns(first: Callable[[Tick], Any], second: Callable[[Tick], Any], steps: int) -> list[tuple[float, float]]:
    """Seconds of the steps of two programs, each in a process of its own, which take turns: A, B, A, B ...

    What the machine does to one step it does to its neighbour: hundreds of short pairs say more than a few long ones.

    Args:
        first, second: picklable; each makes `steps` steps and calls what it is given after every one.
    """
    context = get_context("spawn")
    lines, processes = [], []
    for program in (first, second):
        line, far = context.Pipe()
        processes.append(context.Process(target=_take_turns, args=(program, far, torch.get_num_threads()), daemon=True))
        processes[-1].start()
        far.close()
        lines.append(line)
    found = [(_one(lines[0]), _one(lines[1])) for _ in range(steps)]
    for line, process in zip(lines, processes, strict=True):
        line.send(None)
        process.join()
    return found


def _one(line: Any) -> float:
    line.send(None)
    return float(line.recv())


def _take_turns(program: Callable[[Tick], Any], line: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    began = 0.0

    def wait() -> None:
        nonlocal began
        line.recv()
        began = time.perf_counter()

    def tick() -> None:
        line.send(time.perf_counter() - began)
        wait()

    wait()
    program(tick)


def rate(batches: Iterable[Any], size: Callable[[Any], int], skip: int = 2) -> float:
    """Samples per second, from batch `skip` on (those before it start workers and fill queues)."""
    count, start = 0, time.perf_counter()
    for number, batch in enumerate(batches):
        if number < skip:
            start = time.perf_counter()
        else:
            count += size(batch)
    return count / (time.perf_counter() - start)


@dataclass
class Report:
    """The lines of a run, printed as they come, and written as JSON."""

    settings: dict[str, Any]
    lines: list[Line] = field(default_factory=list)

    def add(self, line: Line) -> None:
        self.lines.append(line)
        shown = "-" if line.value is None else f"{line.value:.3g}"
        print(f"{line.name}: {shown} {line.verdict} {line.note}".rstrip(), flush=True)

    def show(self) -> None:
        """Print the table."""
        table = Table("line", "value", "quartiles", "goal (aim)", "", "ours", "theirs", "unit", "note")
        for line in self.lines:
            table.add_row(line.name, *_cells(line))
        Console(width=None if os.isatty(1) else 180).print(table)
        print(f"{self.about()['machine']}; load {os.getloadavg()[0]:.1f}: ratios count, rates are noise")

    def markdown(self) -> str:
        """The table for a README."""
        rows = [["line", "value", "quartiles", "goal (aim)", "", "ours", "theirs", "unit", "note"], ["---"] * 9]
        rows += [[line.name, *_cells(line)] for line in self.lines]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def about(self) -> dict[str, Any]:
        """When and where."""
        return {"date": date.today().isoformat(), "machine": machine(), "cores": os.cpu_count(), **self.settings}

    def run(self, lines: Iterable[Iterable[Line]], output: str) -> None:
        """Measure on one thread a process, print and write what is found. A line is measured when it is asked for."""
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        torch.set_num_threads(1)
        for some in lines:
            for line in some:
                self.add(line)
        self.show()
        self.write(Path(output))
        print(f"written: {output}")

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{**asdict(line), "verdict": line.verdict} for line in self.lines]
        path.write_text(json.dumps({"about": self.about(), "lines": lines}, indent=1) + "\n", encoding="utf-8")


def _cells(line: Line) -> list[str]:
    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"

    sign = "<=" if line.less else ">="
    goal = "" if line.must is None else f"{sign} {number(line.must)}" + (f" ({number(line.aim)})" if line.aim else "")
    spread = "" if line.low is None else f"{number(line.low)} - {number(line.high)}"
    sides = [number(line.ours), number(line.theirs)]
    return [number(line.value, 4), spread, goal, line.verdict, *sides, line.unit, line.note]


def machine() -> str:
    """The processor's name."""
    try:
        names = [one for one in Path("/proc/cpuinfo").read_text().splitlines() if one.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0].split(':', 1)[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"
