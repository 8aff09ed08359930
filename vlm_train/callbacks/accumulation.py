"""Optimizer steps of any number of micro-batches. Lightning counts batches; our windows say which one ends a step."""

from __future__ import annotations

import lightning.pytorch as pl

from vlm_train.data.batch import Batch, ends_step

NEVER = 2**30
"""A number of batches that no count is a multiple of. A power of two: the loss is divided and multiplied by it."""


class Accumulation(pl.Callback):
    """Tells Lightning, before every micro-batch, whether it ends an optimizer step, and whether validation follows.

    Lightning knows only fixed numbers of batches for both. Its counters are left alone: it is asked for every batch
    whether the count is a multiple of 1 (always) or of `NEVER`.

    Args:
        val_every: optimizer steps between validations, one of which follows the last step; None: none.
        total: the last step.
    """

    def __init__(self, *, val_every: int | None, total: int) -> None:
        self.val_every, self.total = val_every, total

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        ends = ends_step(batch)
        step = trainer.global_step + 1
        due = ends and self.val_every is not None and (step % self.val_every == 0 or step == self.total)
        trainer.accumulate_grad_batches = 1 if ends else NEVER
        trainer.val_check_batch = 1 if due else NEVER
