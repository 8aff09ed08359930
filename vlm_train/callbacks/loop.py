"""What happens at intervals of a run: checkpoints and evaluation. Every interval counts optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from vlm_train import checkpoint
from vlm_train.data.batch import Batch


class Checkpoints(pl.Callback):
    """Saves every `every` optimizer steps and at the end; BEST follows the lowest validation loss.

    A step that is validated is saved after its validation, so that no resumed run lacks it.
    """

    def __init__(
        self, folder: Path, run_id: str, *, every: int | None, val_every: int | None, total: int, keep_last: int
    ) -> None:
        self.root = folder / "checkpoints"
        self.run_id, self.every, self.val_every, self.total, self.keep_last = run_id, every, val_every, total, keep_last
        self.lowest = float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest = state_dict["lowest"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step, window = trainer.global_step, batch.window
        if window is None or window.micro + 1 < window.micro_count:
            return
        if self._due(step) and not (self.val_every and step % self.val_every == 0):
            self._save(trainer, best=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = pl_module.validation_metrics.get("loss", float("inf"))  # type: ignore[operator,union-attr]
        best = loss < self.lowest
        self.lowest = min(loss, self.lowest)
        if best or self._due(trainer.global_step):
            self._save(trainer, best=best)

    def _due(self, step: int) -> bool:
        return step == self.total or bool(self.every and step % self.every == 0)

    def _save(self, trainer: pl.Trainer, *, best: bool) -> None:
        step = trainer.global_step
        checkpoint.save(trainer, self.root, run_id=self.run_id, step=step, keep_last=self.keep_last, best=best)


class Evaluation(pl.Callback):
    """Runs the evaluators on their validation sets whenever the validation loss is measured."""

    def __init__(self, built: Any, evaluators: dict[str, Any], folder: Path) -> None:
        self.built, self.evaluators, self.folder = built, evaluators, folder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for name, evaluator in self.evaluators.items():
            result = evaluator.run(self.built, self.folder / "eval" / name, final=False)
            pl_module.write("val", {"accuracy": result["accuracy"]})  # type: ignore[operator]
