"""The sweep's own process, while its jobs run in others: it prints how they end, and ends them on a signal."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm_train.errors import Interrupted
from vlm_train.runs.sweep import records, summary

INTERVAL = 1.0  # seconds between two looks at the records


@contextmanager
def announce_ends(folder: Path) -> Iterator[None]:
    """Says meanwhile how jobs in other processes end: their own words may go to files on another machine."""
    told = {id_: job.written for id_, job in _ended_jobs(folder)}
    over = threading.Event()

    def look_for_ends() -> None:
        for id_, job in _ended_jobs(folder):
            if told.get(id_) != job.written:
                told[id_] = job.written
                summary.announce_end(job, records.read_sweep(folder))

    def watch_folder() -> None:
        while not over.wait(INTERVAL):
            look_for_ends()

    thread = threading.Thread(target=watch_folder, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look_for_ends()


def _ended_jobs(folder: Path) -> list[tuple[str, records.Job]]:
    jobs = records.read_sweep(folder).jobs
    return [(" ".join(job.overrides), job) for job in jobs if job.status != "running"]


@contextmanager
def passing_on(folder: Path) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the jobs of this machine, which save first, and start no others. A
    second one kills."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def stop_jobs(number: int, _: Any) -> None:
        signal.signal(number, previous[number])
        received.append(number)
        (folder / records.STOP).touch()
        for job in records.read_sweep(folder).jobs:
            if job.status == "running" and job.host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(job.pid, signal.SIGTERM)

    for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(handled) is not signal.SIG_IGN:  # nohup means it
            previous[handled] = signal.signal(handled, stop_jobs)
    try:
        yield
    except Exception as error:  # launchers stumble over jobs that ended otherwise
        if received:
            raise Interrupted(received[0]) from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])
