"""Ends a run that makes no progress, and writes where it hangs: a hang costs as much as training."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from vlm_train.runs import record
from vlm_train.runs.folder import RunFolder

EVALUATION = "evaluation"
"""The phase that may last: it makes no marks, and other ranks wait for the one that evaluates."""

FIRST = 4.0
"""How much longer the first step may take: compilation, caches, connections."""

POLL = 5.0
"""Seconds between two looks, or less when the limit is short."""


class Watchdog(pl.Callback):
    """A thread on every rank. When nothing was finished for `minutes` (a micro-batch, an update, a held-out batch, a
    save), it writes all Python stacks to `<run>/stacks-<rank>.txt` and to stderr and ends the process with exit code 1.

    What happened between looks counts, not the clock: a process that was stopped, or a machine that slept, is not hung.
    Comes before the callbacks that save and evaluate, which call `mark`.

    Args:
        minutes: None: off. Below the collective timeout, or the ranks that wait end before the one that hangs.
    """

    def __init__(self, folder: Path, *, minutes: float | None) -> None:
        self.folder = folder
        self.limit = float("inf") if minutes is None else 60.0 * minutes
        self.poll = min(POLL, self.limit / 20)
        self.phase, self.stood, self.factor = "start", 0.0, FIRST
        self.ended = threading.Event()
        self.trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.factor = FIRST
        self.begin_phase("start")
        self.ended = threading.Event()
        if self.limit < float("inf"):
            threading.Thread(target=self._watch_progress, args=(self.ended,), name="watchdog", daemon=True).start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.ended.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.ended.set()

    def begin_phase(self, phase: str) -> None:
        """Something was finished, and `phase` begins."""
        self.phase, self.stood = phase, 0.0
        if phase == EVALUATION:
            self.factor = float("inf")

    def on_train_batch_start(self, *args: Any) -> None:
        self.phase, self.stood = "forward and backward", 0.0

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.phase, self.stood = "optimizer", 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        self.factor = 1.0  # also after an evaluation: no rank gets here before all are back
        self.phase, self.stood = "data", 0.0

    def on_validation_batch_start(self, *args: Any) -> None:
        self.phase, self.stood = "validation", 0.0

    def on_validation_batch_end(self, *args: Any) -> None:
        self.phase, self.stood = "validation data", 0.0

    def on_validation_end(self, *args: Any) -> None:
        self.phase, self.stood = "after validation", 0.0

    def _watch_progress(self, ended: threading.Event) -> None:
        while not ended.wait(self.poll):
            self.stood += self.poll
            if self.stood > self.limit * self.factor:
                self._end_process(ended)

    def _end_process(self, ended: threading.Event) -> None:
        assert self.trainer is not None
        rank, path = self.trainer.global_rank, RunFolder(self.folder).stacks_file(self.trainer.global_rank)
        said = (
            f"Rank {rank} has stood still for {self.stood / 60:.3g} minutes (trainer.watchdog_minutes) after step "
            f"{self.trainer.global_step}, phase: {self.phase}. Its stacks: {path}. The same command resumes.\n"
        )
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            file.write(said)
            file.flush()
            faulthandler.dump_traceback(file)
        if rank == 0:
            with suppress(OSError):
                record.update_record(self.folder, status="failed")
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]
            print(said, file=sys.__stderr__, end="", flush=True)
        time.sleep(3 * self.poll)  # the first to leave is the end of the others, which have stacks to write too
        if not ended.is_set():
            os._exit(1)


def begin_phase(trainer: pl.Trainer, phase: str) -> None:
    """Tell the watchdog of a training, if it has one, that `phase` begins."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Watchdog):
            callback.begin_phase(phase)
