"""What happens at intervals of a run: checkpoints, evaluation, stops. Every interval counts optimizer steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import lightning.pytorch as pl

from vlm_train.checkpoint.resume import Resume
from vlm_train.checkpoint.run_state import restore_run
from vlm_train.checkpoint.save import CheckpointWriter
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.evaluator import Evaluator
from vlm_train.data.processor import Processor
from vlm_train.errors import Interrupted
from vlm_train.evaluation.run import evaluate_before, run_evaluator
from vlm_train.runs import record
from vlm_train.runs.folder import RunFolder
from vlm_train.training.callbacks.watchdog import EVALUATION, begin_phase


class AfterStep(pl.Callback):
    """What follows an optimizer step, in this order: log, stop where a rank is asked to, validate, save.

    A step that is validated is saved after its validation, so that no resumed run lacks it. A validation that a stop
    cuts off is made up for when the run goes on.

    Args:
        log_every, save_every: optimizer steps between two; also at the end.
        val_every: between two validations, held-out loss and evaluators; None: none. The held-out loss is also measured
            at the end, where evaluators run anyway.
        total: the last step.
        held_out: whether there are samples for a held-out loss.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        checkpoints: Checkpoints,
        *,
        log_every: int,
        val_every: int | None,
        save_every: int | None,
        total: int,
        held_out: bool,
    ) -> None:
        self.evaluation, self.checkpoints = evaluation, checkpoints
        self.log_every, self.val_every, self.save_every = log_every, val_every, save_every
        self.total, self.held_out = total, held_out

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        window = batch.window
        if window is None or window.micro + 1 < window.micro_count:
            return
        step, module = trainer.global_step, cast(Any, pl_module)
        logs = step == self.total or step % self.log_every == 0
        validates = self._measures_loss(step) or self._evaluates(step)
        if logs or validates or module.stopping or self._saves(step):
            module.settle_update()
        if logs:
            module.log_training()
        if module.stopping:
            self.checkpoints.stop(trainer)
        if validates:
            self._validate(trainer, module)
        elif self._saves(step):
            self.checkpoints.save(trainer)

    def _validate(self, trainer: pl.Trainer, module: Any) -> None:
        """Held-out loss and evaluators, then a checkpoint if it is the best, or due."""
        module.meter.pause_clock()
        module.validation_metrics = {}
        if self._measures_loss(trainer.global_step):
            run_validation_loop(trainer)
        if self._evaluates(trainer.global_step):
            self.evaluation.run(trainer, module)
        value, best = self.checkpoints.judge(trainer, module.validation_metrics)
        if best or self._saves(trainer.global_step):
            self.checkpoints.save(trainer, best=best, value=value)
        if module.asked_to_stop():
            self.checkpoints.stop(trainer)
        module.meter.go_on()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate what the run begins with, where that is asked for; make up for a validation that a stop cut off."""
        step = trainer.global_step
        if not step and self.evaluation.first:
            self.evaluation.run_first(trainer, pl_module)
        if step and (self._measures_loss(step) or self._evaluates(step)):
            held = {row["step"] for row in record.read_metrics(Path(trainer.default_root_dir)) if row["split"] == "val"}
            if trainer.strategy.broadcast(step not in held):
                self._validate(trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if cast(Any, pl_module).asked_to_stop():
            self.checkpoints.stop(trainer)

    def _measures_loss(self, step: int) -> bool:
        return self.held_out and (step == self.total or step % (self.val_every or self.total) == 0)

    def _evaluates(self, step: int) -> bool:
        return bool(self.evaluation.evaluators and self.val_every) and step % (self.val_every or 1) == 0

    def _saves(self, step: int) -> bool:
        return step == self.total or bool(self.save_every and step % self.save_every == 0)


def run_validation_loop(trainer: pl.Trainer) -> None:
    """Lightning's, now. It does the same where it counts batches to find out when; we count optimizer steps."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    first = connector._first_loop_iter
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first


class Checkpoints(pl.Callback):
    """The checkpoints of a run: restored when it starts, written when `AfterStep` asks for it; BEST follows `metric`.

    Args:
        facts: what the manifest says about the run besides the step.
        metric: of the validation, "loss" or one of an evaluator.
        total: the last step, whose checkpoint must be written.
        resumed: the checkpoint that this run goes on from.
    """

    def __init__(
        self, writer: CheckpointWriter, facts: dict[str, Any], *, metric: str, total: int, resumed: Resume | None = None
    ) -> None:
        self.writer, self.facts, self.metric, self.total, self.resumed = writer, facts, metric, total, resumed
        self.best: float | None = None
        self.written = set() if resumed is None else {resumed.step}  # others of the same step may be damaged

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed is not None:
            restore_run(trainer, self.resumed)

    def judge(self, trainer: pl.Trainer, metrics: Mapping[str, float]) -> tuple[float | None, bool]:
        """The metric that BEST follows, None where it was not measured, and whether it is the best yet."""
        value: float | None = trainer.strategy.broadcast(metrics.get(self.metric))
        lower = self.writer.keep.lower
        best = value is not None and (self.best is None or (value < self.best if lower else value > self.best))
        self.best = value if best else self.best
        return value, best

    def save(self, trainer: pl.Trainer, *, best: bool = False, value: float | None = None, must: bool = False) -> None:
        """Write the checkpoint of this step, which a validation gave `value`. `must`: wait for it."""
        begin_phase(trainer, "save")
        cast(Any, trainer.lightning_module).require_healthy()
        step = trainer.global_step
        trusted, self.written = step in self.written, self.written | {step}
        facts = self.facts | {"metric": value, "world": trainer.world_size}
        must = must or step == self.total
        self.writer.save_checkpoint(trainer, step=step, facts=facts, best=best, must=must, rewrite=not trusted)

    def stop(self, trainer: pl.Trainer) -> None:
        """Save the step and raise `Interrupted`, on every rank."""
        if trainer.global_step not in self.written or self.writer.failures:
            self.save(trainer, must=True)
        self.writer.wait_for_save(must=True)
        if trainer.is_global_zero:
            record.update_record(self.writer.root.parent, status="interrupted")
        trainer.strategy.barrier()  # `srun` and torchrun end all ranks when the first one exits
        raise Interrupted(cast(Any, trainer.lightning_module).interrupt or signal.SIGTERM, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writer.wait_for_save(must=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.writer.abandon_save()


class Evaluation:
    """Runs the evaluators on their validation sets, but for those that run at the end only.

    Args:
        first: also run all of them before the first step, as at the end.
    """

    def __init__(
        self, processor: Processor, evaluators: Mapping[str, Evaluator], folder: Path, *, first: bool = False
    ) -> None:
        self.processor, self.folder, self.first, self.all = processor, folder, first and bool(evaluators), evaluators
        self.evaluators = {name: one for name, one in evaluators.items() if one.at_validation}

    def run(self, trainer: pl.Trainer, module: Any) -> None:
        """On rank 0, or on all ranks where they hold shards. Results go to the log and into `validation_metrics`."""
        begin_phase(trainer, EVALUATION)
        if not (trainer.is_global_zero or cast(Any, trainer.strategy).shards_model):
            return
        with results_folder(RunFolder(self.folder).evaluation, trainer.is_global_zero) as folder:
            for name, evaluator in self.evaluators.items():
                findings = run_evaluator(name, evaluator, module.model, self.processor, folder / name, final=False)
                found = {f"{name}/{metric}": value for metric, value in findings.metrics.items()}
                module.validation_metrics |= found
                module.write_metrics("val", found)

    def run_first(self, trainer: pl.Trainer, module: Any) -> None:
        """All evaluators, as at the end. The results go to the log at step 0, and later into the table."""
        begin_phase(trainer, EVALUATION)
        if not (trainer.is_global_zero or cast(Any, trainer.strategy).shards_model):
            return
        with results_folder(RunFolder(self.folder).evaluation, trainer.is_global_zero) as folder:
            found, rows = evaluate_before(module.model, self.processor, self.all, folder)
        module.write_metrics("before", found)
        if trainer.is_global_zero:
            record.update_record(self.folder, results_before=rows)


@contextmanager
def results_folder(folder: Path, real: bool) -> Iterator[Path]:
    """`folder`, or a temporary one: where weights are in shards all ranks evaluate, and one keeps results."""
    if real:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        yield Path(temporary)
