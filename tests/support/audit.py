"""A callback that writes down which samples a rank trains on, and kills its process at a given step."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch


class Audit(pl.Callback):
    """Lines `[step, micro, keys]` in `<folder>/audit-<rank>.jsonl`; rank `victim` dies before step `kill_at`."""

    def __init__(self, *, folder: str, kill_at: int = -1, victim: int = 0) -> None:
        self.folder, self.kill_at, self.victim = Path(folder), kill_at, victim

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.window.step == self.kill_at and trainer.global_rank == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"audit-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([batch.window.step, batch.window.micro, batch.keys]) + "\n")


def drawn(folder: Path, rank: int) -> dict[tuple[int, int], Any]:
    """The keys of every micro-batch; of one trained twice, because it came after the last checkpoint, the later."""
    rows = [json.loads(line) for line in (folder / f"audit-{rank}.jsonl").read_text().splitlines()]
    return {(step, micro): keys for step, micro, keys in rows}


class Kill(pl.Callback):
    """Kills its process (-9) in the middle of something: of an accumulation, of writing a checkpoint, of a validation.

    Args:
        when: accumulation | save | validation.
        step: optimizer step, counted from 1, in or after which.
    """

    def __init__(self, *, when: str, step: int, victim: int = 0) -> None:
        self.when, self.step, self.victim = when, step, victim
        self.mine = False

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from vlm_train.checkpoint import files

        self.mine = trainer.global_rank == self.victim
        inner = files.write_tensors

        def write(path: Path, tensors: Any) -> Any:
            if self.mine and self.when == "save" and trainer.global_step == self.step:
                path.write_bytes(b"half")
                self._die()
            return inner(path, tensors)

        files.write_tensors = write

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = batch.window.step + 1 == self.step and batch.window.micro == 1
        if self.mine and self.when == "accumulation" and now:
            self._die()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.mine and self.when == "validation" and trainer.global_step == self.step:
            self._die()


class Rotary(pl.Callback):
    """Asserts, in every step, that the frequencies of rotary positions are exact: fp32, and those of a fresh model."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        found = [b for name, b in pl_module.named_buffers() if name.endswith("inv_freq")]
        assert found
        for buffer in found:
            exponents = torch.arange(len(buffer), dtype=torch.float32) / len(buffer)
            assert buffer.dtype == torch.float32 and torch.allclose(buffer, 10000.0**-exponents, rtol=1e-6)


class Stop(pl.Callback):
    """Asks the run to stop after a step, as a signal would."""

    def __init__(self, *, after: int) -> None:
        self.after = after

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.window.step == self.after - 1:
            pl_module.interrupt = signal.SIGTERM  # type: ignore[assignment]


class StopInValidation(pl.Callback):
    """Asks the run to stop at the very end of the validation of a step."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            pl_module.interrupt = signal.SIGTERM  # type: ignore[assignment]


class Poison(pl.Callback):
    """Multiplies what the model gives in some steps of one rank, as a bad sample might."""

    def __init__(self, *, steps: list[int], rank: int, factor: float = float("nan")) -> None:
        self.steps, self.rank, self.factor = steps, rank, factor
        self.now = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        inner = pl_module.model.forward  # type: ignore[union-attr]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = inner(*args, **kwargs)
            return hidden * self.factor if self.now else hidden

        pl_module.model.forward = forward  # type: ignore[union-attr]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.now = batch.window.step + 1 in self.steps and trainer.global_rank == self.rank


class Draw(pl.Callback):
    """Writes down a number of each global generator after every step, in `<path>-<rank>`."""

    def __init__(self, *, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.global_step:
            random.seed(7 + trainer.global_rank)
            np.random.seed(7 + trainer.global_rank)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.window.micro + 1 == batch.window.micro_count:
            with open(f"{self.path}-{trainer.global_rank}", "a") as file:
                file.write(f"{random.random()} {np.random.rand()} {torch.rand(()).item()}\n")
