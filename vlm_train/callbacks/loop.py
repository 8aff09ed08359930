"""What happens at intervals of a run: checkpoints, evaluation, stops. Every interval counts optimizer steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import lightning.pytorch as pl

from vlm_train import record
from vlm_train.callbacks.watchdog import EVALUATION, mark
from vlm_train.checkpoint.generators import set_rng_state
from vlm_train.checkpoint.resume import Resume
from vlm_train.checkpoint.save import Writer
from vlm_train.checkpoint.state import restore
from vlm_train.contracts.evaluator import Evaluator
from vlm_train.data.batch import Batch, ends_step
from vlm_train.data.processor import Processor
from vlm_train.errors import Interrupted
from vlm_train.evaluation.run import run_evaluator


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
    """Saves every `every` optimizer steps and at the end; BEST follows `metric` of the validation.

    A step that is validated is saved after its validation, so that no resumed run lacks it. A run that is asked to stop
    saves the step it is in and raises `Interrupted`, on every rank; a validation that this cuts off is made up for.

    Args:
        facts: what the manifest says about the run besides the step.
        val_every: as `Accumulation` has it; None: no validation.
        metric: of the validation, "loss" or one of an evaluator.
        resumed: the checkpoint that this run goes on from.
    """

    def __init__(
        self,
        writer: Writer,
        facts: dict[str, Any],
        *,
        every: int | None,
        val_every: int | None,
        total: int,
        metric: str,
        resumed: Resume | None = None,
    ) -> None:
        self.writer, self.facts, self.metric, self.resumed = writer, facts, metric, resumed
        self.every, self.val_every, self.total = every, val_every, total
        self.best: float | None = None
        self.written = set() if resumed is None else {resumed.step}  # others of the same step may be damaged

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore what learns; make up for the validation that a stop cut off."""
        if self.resumed is not None:
            restore(trainer.strategy, cast(Any, pl_module).policy.named, self.resumed.folder)
            rates = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
            for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
                group["lr"] = rate
            for state in cast(Any, pl_module).generators:
                set_rng_state(state)
        step = trainer.global_step
        if step and self._validated(step):
            held = {row["step"] for row in record.metrics(self.writer.root.parent) if row["split"] == "val"}
            if trainer.strategy.broadcast(step not in held):
                trainer.validating = True
                trainer.fit_loop.epoch_loop.val_loop.run()
                trainer.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not ends_step(batch):
            return
        if pl_module.stopping:
            self._stop(trainer, pl_module)
        if self._due(step) and not self._validated(step):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.strategy.broadcast(pl_module.validation_metrics.get(self.metric))  # type: ignore[operator,union-attr]
        lower = self.writer.keep.lower
        best = value is not None and (self.best is None or (value < self.best if lower else value > self.best))
        self.best = value if best else self.best
        if best or self._due(trainer.global_step):
            self._save(trainer, best=best, value=value)
        if pl_module.asked_to_stop():  # type: ignore[operator]
            self._stop(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if pl_module.asked_to_stop():  # type: ignore[operator]
            self._stop(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writer.finish(must=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.writer.abandon()

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step not in self.written or self.writer.failures:
            self._save(trainer, must=True)
        self.writer.finish(must=True)
        if trainer.is_global_zero:
            record.update(self.writer.root.parent, status="interrupted")
        trainer.strategy.barrier()  # the first that leaves is the end of the others where `srun` or torchrun look on
        raise Interrupted(pl_module.interrupt or signal.SIGTERM, trainer.global_step)  # type: ignore[arg-type]

    def _validated(self, step: int) -> bool:
        return bool(self.val_every) and (step == self.total or step % (self.val_every or 1) == 0)

    def _due(self, step: int) -> bool:
        return step == self.total or bool(self.every and step % self.every == 0)

    def _save(self, trainer: pl.Trainer, *, best: bool = False, value: float | None = None, must: bool = False) -> None:
        mark(trainer, "save")
        trainer.lightning_module.require_healthy()  # type: ignore[operator]
        step = trainer.global_step
        trusted, self.written = step in self.written, self.written | {step}
        facts = self.facts | {"metric": value, "world": trainer.world_size}
        self.writer.save(
            trainer, step=step, facts=facts, best=best, must=must or step == self.total, rewrite=not trusted
        )


class Evaluation(pl.Callback):
    """Runs the evaluators on their validation sets whenever the validation loss is measured.

    Args:
        every: optimizer steps between two runs where there is no validation set, hence no validation loss; else None.
        val_every: steps between validations; one at another step, the last, leaves them to the end of the run.
    """

    def __init__(
        self,
        processor: Processor,
        evaluators: Mapping[str, Evaluator],
        folder: Path,
        *,
        every: int | None,
        val_every: int | None,
    ) -> None:
        self.processor, self.folder, self.every, self.val_every = processor, folder, every, val_every
        self.evaluators = {name: one for name, one in evaluators.items() if one.at_validation}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.every and ends_step(batch) and trainer.global_step % self.every == 0:
            pl_module.on_validation_start()
            self._run(trainer, pl_module)
            pl_module.on_validation_end()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = self.val_every and trainer.global_step % self.val_every == 0
        if due:
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mark(trainer, EVALUATION)
        if not (trainer.is_global_zero or trainer.strategy.shards_model):  # type: ignore[attr-defined]
            return
        model = cast(Any, pl_module).model
        with results_folder(self.folder / "eval", trainer.is_global_zero) as folder:
            for name, evaluator in self.evaluators.items():
                findings = run_evaluator(name, evaluator, model, self.processor, folder / name, final=False)
                found = {f"{name}/{metric}": value for metric, value in findings.metrics.items()}
                pl_module.validation_metrics |= found  # type: ignore[operator]
                pl_module.write("val", found)  # type: ignore[operator]


@contextmanager
def results_folder(folder: Path, real: bool) -> Iterator[Path]:
    """`folder`, or one that is thrown away: where weights are in shards all ranks evaluate, and one keeps results."""
    if real:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        yield Path(temporary)
