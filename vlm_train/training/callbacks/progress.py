"""How far a training is, in a terminal: one bar over all of its steps. Elsewhere the log lines say it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlm_train.contracts.batch import Batch


class ProgressBar(pl.Callback):
    """A bar on rank 0: steps done and in all, those before a resume included; the time left at the speed of this start.

    Args:
        total: the last step.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        counted = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
        self.bar = Progress(
            *counted, TextColumn("left"), TimeRemainingColumn(), speed_estimate_period=600, transient=True
        )
        self.bar.add_task("", total=self.total, completed=trainer.global_step)
        self.bar.start()  # lines that are printed meanwhile come above it

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
