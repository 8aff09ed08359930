"""Faults for tests: a callback that breaks a run at one place, on one rank. The environment says which, so that the
same command goes on without it: `FAULT="<what> <rank or all> <step>"`."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl

from vlm_train.data.loader import MicroBatches
from vlm_train.training.callbacks import signals

OVERRIDES = ["+callbacks.fault._target_=tests.support.faults.Fault", "allow_targets=[tests.support.faults]"]


def sleeping_beauty() -> None:
    """Stands still, under a name that stacks show."""
    time.sleep(600)


class Fault(pl.Callback):
    """Acts within the first micro-batch of the step after `step`.

    What: `raise`; `data` (the loader raises at the batch of that number); `hang`; a signal's name, or that with `*2`
    for two at once; `leave` (a second signal, later than those that count as one); `warn-` and a signal's name: to the
    process that `STEP_PID` names, or our parent, which hands it on.
    """

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        what, rank, step = os.environ.get("FAULT", "none 0 0").split()
        inner = pl_module.training_step

        def training_step(batch: Any, batch_idx: int) -> Any:
            here = rank in ("all", str(trainer.global_rank))
            if here and trainer.global_step == int(step) and batch.window.micro == 0:
                act(what, pl_module)
            return inner(batch, batch_idx)

        if what == "data" and rank == str(trainer.global_rank):
            MicroBatches.__iter__ = _breaking(MicroBatches.__iter__, int(step))
        elif what != "none":
            pl_module.training_step = training_step


def _breaking(inner: Any, after: int) -> Any:
    def iterate(self: MicroBatches) -> Any:
        for number, batch in enumerate(inner(self)):
            if number == after:
                raise ValueError("the original error")
            yield batch

    return iterate


def act(what: str, pl_module: Any) -> None:
    if what == "raise":
        raise ValueError("the original error")
    if what == "hang":
        sleeping_beauty()
    if what == "leave":
        signals.REPEATED = -1.0
    if what.startswith("warn-"):
        os.kill(int(os.environ.get("STEP_PID", os.getppid())), getattr(signal, what.removeprefix("warn-")))
        while not pl_module.interrupt:
            time.sleep(0.01)
    if what.startswith("SIG") or what == "leave":
        number, _, count = "SIGUSR1*2".partition("*") if what == "leave" else what.partition("*")
        for _ in range(int(count or 1)):
            os.kill(os.getpid(), getattr(signal, number))
