"""Signals that ask a training to save and stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from vlm_train.errors import ENDING, PREEMPTING, REPEATED
from vlm_train.runs.folder import RunFolder


class StopSignals(pl.Callback):
    """Ctrl-C, a closed terminal, and what schedulers send: the first asks for a checkpoint and a stop at the end of the
    step, a later one leaves at once. The handler only sets a flag, on whichever rank; the ranks agree on it at the next
    step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = 0.0
        usual = {number: signal.getsignal(number) for number in ENDING}  # before Lightning sets its own
        self.usual = {number: handler for number, handler in usual.items() if handler is not signal.SIG_IGN}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def ask(number: int, frame: FrameType | None) -> None:
            if pl_module.interrupt:
                if time.monotonic() - self.asked > REPEATED:
                    self._end_by_signal(number)
                return
            self.asked = time.monotonic()
            pl_module.interrupt = number  # type: ignore[assignment]
            if number == signal.SIGHUP:
                _leave_terminal(RunFolder(self.folder).output)
            with suppress(OSError):  # whoever read our output may be gone
                if trainer.is_global_zero:
                    said = "stopping after this step or evaluation, and saving"
                    print(f"{signal.Signals(number).name}: {said}", flush=True)

        self._set_handlers(dict.fromkeys(self.usual, ask))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._set_handlers(self.usual)

    def _end_by_signal(self, number: int) -> None:
        """End the process as an unhandled signal does; every preempting signal counts as SIGTERM, for its exit code."""
        number = signal.SIGTERM if number in PREEMPTING else number
        signal.signal(number, self.usual[signal.SIGINT] if number == signal.SIGINT else signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _set_handlers(self, handlers: Mapping[signal.Signals, Any]) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses, and others handle signals
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _leave_terminal(output: Path) -> None:
    """What is still said goes to a file: a closed terminal takes nothing, and a step must not fail because of that."""
    with suppress(OSError, ValueError), open(output, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            if stream.isatty():
                os.dup2(file.fileno(), stream.fileno())
