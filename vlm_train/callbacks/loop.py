"""What happens at intervals of a run: checkpoints, evaluation, stops. Every interval counts optimizer steps."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from vlm_train import checkpoint, record
from vlm_train.callbacks.watchdog import EVALUATION, mark
from vlm_train.data.batch import Batch
from vlm_train.errors import Interrupted
from vlm_train.modules.base import ends_step


class Log(pl.Callback):
    """Writes the training metrics every `every` optimizer steps and at the end. Comes before `Checkpoints`: a resumed
    run goes on with the sums since the last line."""

    def __init__(self, *, every: int, total: int) -> None:
        self.every, self.total = every, total

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if ends_step(batch) and (step % self.every == 0 or step == self.total):
            pl_module.log_training()  # type: ignore[operator]


class Checkpoints(pl.Callback):
    """Saves every `every` optimizer steps and at the end; BEST follows the lowest validation loss.

    A step that is validated is saved after its validation, so that no resumed run lacks it. A run that is asked to stop
    saves the step it is in and raises `Interrupted`, on every rank; a validation that this cuts off is made up for.

    Args:
        facts: what the manifest says about the run besides the step.
        resumed: the step of the checkpoint that this run goes on from.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        *,
        every: int | None,
        val_every: int | None,
        total: int,
        keep_last: int,
        resumed: int | None = None,
    ) -> None:
        self.root, self.facts = folder / "checkpoints", facts
        self.every, self.val_every, self.total, self.keep_last = every, val_every, total, keep_last
        self.lowest = float("inf")
        self.written = set() if resumed is None else {resumed}  # others of the same step may be damaged

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest = state_dict["lowest"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not ends_step(batch):
            return
        if pl_module.stopping:
            self._stop(trainer, pl_module)
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
        if trainer.state.fn == "fit" and pl_module.asked_to_stop():  # type: ignore[operator]
            self._stop(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for the validation that a stop cut off."""
        step = trainer.global_step
        if step and self.val_every and step % self.val_every == 0:
            held = {row["step"] for row in record.metrics(self.root.parent) if row["split"] == "val"}
            if trainer.strategy.broadcast(step not in held):
                trainer.validating = True
                trainer.fit_loop.epoch_loop.val_loop.run()
                trainer.training = True

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.state.fn == "fit" and pl_module.asked_to_stop():  # type: ignore[operator]
            self._stop(trainer, pl_module)

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step not in self.written:
            self._save(trainer, best=False)
        if trainer.is_global_zero:
            record.update(self.root.parent, status="interrupted")
        trainer.strategy.barrier()  # the first that leaves is the end of the others where `srun` or torchrun look on
        raise Interrupted(pl_module.interrupt or signal.SIGTERM, trainer.global_step)  # type: ignore[arg-type]

    def _due(self, step: int) -> bool:
        return step == self.total or bool(self.every and step % self.every == 0)

    def _save(self, trainer: pl.Trainer, *, best: bool) -> None:
        mark(trainer, "save")
        trainer.lightning_module.require_healthy()  # type: ignore[operator]
        step = trainer.global_step
        trusted, self.written = step in self.written, self.written | {step}
        checkpoint.save(
            trainer,
            self.root,
            step=step,
            best=best,
            keep_last=self.keep_last,
            facts=self.facts,
            rewrite=not trusted,
        )


class Evaluation(pl.Callback):
    """Runs the evaluators on their validation sets whenever the validation loss is measured.

    Args:
        every: optimizer steps between two runs where there is no validation set, hence no validation loss; else None.
    """

    def __init__(self, built: Any, evaluators: dict[str, Any], folder: Path, *, every: int | None) -> None:
        self.built, self.folder, self.every = built, folder, every
        self.evaluators = {name: one for name, one in evaluators.items() if getattr(one, "at_validation", True)}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.every and ends_step(batch) and trainer.global_step % self.every == 0:
            pl_module.on_validation_start()
            self._run(trainer, pl_module)
            pl_module.on_validation_end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":  # at the end of a run they run in full
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mark(trainer, EVALUATION)
        if not trainer.is_global_zero:
            return
        for name, evaluator in self.evaluators.items():
            result = evaluator.run(self.built, self.folder / "eval" / name, final=False)
            pl_module.write("val", {f"{name}/accuracy": result["accuracy"]})  # type: ignore[operator]
