"""Faults for tests: a callback that breaks a run at one place, on one rank. The environment says which, so that the
same command goes on without it: `FAULT="<what> <rank or all> <step>"`."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl

OVERRIDES = ["+callbacks.fault._target_=tests.faults.Fault", "allow_targets=[tests.faults]"]


def sleeping_beauty() -> None:
    """Stands still, under a name that stacks show."""
    time.sleep(600)


class Fault(pl.Callback):
    """Acts when the first micro-batch of the step after `step` begins."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        what, rank, step = os.environ.get("FAULT", "none 0 0").split()
        here = rank in ("all", str(trainer.global_rank))
        if here and trainer.global_step == int(step) and batch.window.micro == 0:
            self.act(what)

    def act(self, what: str) -> None:
        if what == "raise":
            raise ValueError("the original error")
        if what == "hang":
            sleeping_beauty()
        if what.startswith("SIG"):
            number, _, count = what.partition("*")
            for _ in range(int(count or 1)):
                os.kill(os.getpid(), getattr(signal, number))
