"""The Lightning side: sums the objectives, normalizes over the global batch, logs. Plain nn.Modules do the work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch, Window
from vlm_train.contracts.family import Family
from vlm_train.contracts.objective import Objective, OneRank, StepContext
from vlm_train.data.source_weights import source_factors, weigh_sources
from vlm_train.distributed import of_all_ranks
from vlm_train.errors import TrainingError
from vlm_train.loggers.jsonl_writer import JsonlWriter, format_row
from vlm_train.runs.folder import RunFolder
from vlm_train.runs.sweep.summary import format_duration
from vlm_train.seeds import derive_seed
from vlm_train.training.bad_samples import BadSamples
from vlm_train.training.clipping import LateVerdict, clip_gradients, name_norms, read_norms
from vlm_train.training.first_step import FirstSteps, count_targets
from vlm_train.training.gather import RankGather, most_of_ranks
from vlm_train.training.guard import SCALE, Guard
from vlm_train.training.metrics import Meter, Work, all_finite
from vlm_train.training.params import Policy, freeze_eval


class VLMModule(pl.LightningModule):
    """Trains any family: `model` and `objectives` say what is computed, `policy` who learns.

    `training_step` is the whole step, in the order in which it happens.
    `reference` is a second, frozen model, moved and spread like the first and never saved; `lend_reference` is what
    objectives are given of it.
    """

    automatic_optimization = stopping = spread = False

    def __init__(
        self,
        model: Family,
        objectives: Mapping[str, Objective],
        policy: Policy,
        make_optimizer: Any,
        make_schedule: Any,
        *,
        reference: Family | None = None,
        lend_reference: Callable[[], AbstractContextManager[Any]] | None = None,
        seed: int,
        total_steps: int,
        max_grad_norm: float | None = None,
        normalize: str = "token",
        max_bad_samples: int = 100,
        max_bad_share: float = 0.05,
        strict: bool = False,
        min_supervised_ratio: float = 0.0,
        guard: Guard | None = None,
        first_steps: FirstSteps | None = None,
        folder: Path,
        count_work: Callable[[], Work | None] | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self.reference, self.lend_reference = model, reference, lend_reference
        self.policy, self.objectives = policy, dict(objectives)
        self.normalizers = {  # objective -> the entry of `Window.sums` that its losses are divided by
            name: "samples" if objective.normalized_by == "samples" else objective.streams[0]
            for name, objective in objectives.items()
        }
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule
        self.seed, self.total_steps, self.max_grad_norm, self.normalize = seed, total_steps, max_grad_norm, normalize
        self.folder = folder
        self.bad = BadSamples(folder, max_in_a_row=max_bad_samples, max_share=max_bad_share, strict=strict)
        least = min_supervised_ratio if any(o.normalized_by == "tokens" for o in objectives.values()) else 0.0
        self.meter = Meter(self.over_ranks, min_supervised=least, count_work=count_work, peak_tflops=peak_tflops)
        self.metrics_file = JsonlWriter(RunFolder(folder).metrics)
        self.held_out = self.held_out_bad = self.interrupt = 0
        self.validation_metrics: dict[str, float] = {}
        self.denominators: dict[str, float] = {}
        self.factors: dict[str, dict[str, float]] = {}  # stream -> source -> factor, with normalize=source
        self.guard, self.first_steps = guard or Guard(folder), first_steps or FirstSteps()
        self.keys: list[str] = []  # of the samples of the step
        self.left_out: str | None = None  # why the last step made no update
        self.late: LateVerdict | None = None  # on the last step, where a GPU itself vetoes
        self.grad_norms: dict[str, Tensor] = {}  # of the last optimizer step, by part and in all
        self.train()  # Lightning keeps the modes it finds, so they are set here

    def configure_model(self) -> None:
        """Spread the model, where the strategy does. Lightning calls this for every stage of its own."""
        if hasattr(self.trainer.strategy, "shard_model") and not self.spread:
            self.trainer.strategy.shard_model(self.model)
            self.policy.rebind_parameters(self.model)
            if self.reference is not None:
                self.trainer.strategy.shard_model(self.reference)
            self.spread = True

    def train(self, mode: bool = True) -> VLMModule:
        """Training mode, with frozen parts kept in eval mode."""
        super().train(mode)
        if mode:
            freeze_eval(self.model, self.policy.in_train_mode)
            if self.reference is not None:
                self.reference.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch. The last one of a step also makes the update.

        1. The batch is there: Lightning has moved it (`Batch.to`). The meter counts the wait for it.
        2. Randomness (dropout) gets its address: run, step, micro-batch, rank.
        3. The first micro-batch opens the step: denominators over all micro-batches and ranks, bad samples, a stop.
        4. `forward` gives the micro-batch's part of the loss, in the precision of the run.
        5. Backward. Gradients are added up; they cross ranks in the last micro-batch.
        6. The guard looks at the norm of the gradients: not finite, or a spike, means no update. Else they are clipped.
        7. The optimizer makes its step; the first ones are looked at. The schedule follows updates, not steps.
        8. The family keeps its bounds (the temperature of two towers).
        9. Log, stop, validate, save: `callbacks.loop.AfterStep`, each at its interval.
        """
        window, strategy = batch.window, cast(Any, self.trainer.strategy)
        assert window is not None
        self.meter.add_batch(batch)
        seed = derive_seed(self.seed, "step", window.step, window.micro, self.global_rank)
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` visits all backends, which takes 0.6 ms
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

        if window.micro == 0:
            self._open_step(window)
        self.keys += [key for row in batch.keys for key in row]

        last = window.micro + 1 == window.micro_count
        with strategy.gradients_cross_ranks(last):
            with strategy.precision_plugin.train_step_context():
                loss = strategy.model(batch)  # `forward`, through what the strategy has wrapped around this module
            self.manual_backward(loss)
        if not last:
            return

        if not strategy.clips_gradients:  # DeepSpeed does within its step, where it calls `objects_to`
            clip_gradients(self)
        cast(Any, self.optimizers()).step()
        self.zero_grad(set_to_none=True)
        self.left_out = self.left_out or (None if strategy.made_update() else SCALE)
        self.first_steps.look(self)
        if self.late is None:
            self._follow_update(self.global_step, self.keys)
        self.model.clamp_()

    def forward(self, batch: Batch) -> Tensor:
        """A micro-batch's part of the loss, `[]`: the sums of all objectives over the denominators of the whole step on
        all ranks, so that the gradient does not depend on how a step is cut."""
        if self.factors:
            batch = weigh_sources(batch, self.factors)
        total = torch.zeros((), device=self.device)
        for name, objective in self.objectives.items():
            denominator = max(self.denominators.get(self.normalizers[name], 0.0), 1e-8)
            for line, loss in objective(self.model, batch, self.context).items():
                total = total + loss.sum * (loss.weight / denominator)
                self.meter.train.add_loss(line, loss)
        return total * self.trainer.world_size  # strategies take the mean over ranks

    def _open_step(self, window: Window) -> None:
        """Start a step: one all-reduce gives denominators, bad samples, counts, and whether a rank is asked to stop."""
        names = sorted(set(self.normalizers.values()))  # the same on every rank
        sums = [sum(window.sums.get(name, {}).values()) for name in names]
        sums += [bool(self.interrupt), window.samples, len(window.problems), *count_targets(window)]
        if self.trainer.world_size > 1:
            local = torch.tensor(sums, dtype=torch.float64).to(self.device)
            sums = self.trainer.strategy.reduce(local, reduce_op="sum").tolist()
        *sums, asked, good, bad = self.first_steps.take_counts(sums)
        self.stopping = asked > 0
        self.denominators = dict(zip(names, sums, strict=True))
        if self.normalize == "source":  # ranks may hold other sources; "samples" weighs no targets
            streams = [name for name in names if name != "samples"]
            self.factors = {name: source_factors(self.over_ranks(dict(window.sums.get(name, {})))) for name in streams}
        self.meter.open_step(window)
        self.keys, self.left_out = [], None
        self.bad.count_problems(window.problems)
        self.bad.record_problems("train", window.step, window.problems, self.global_rank)
        reason = self.bad.reason_to_stop(round(good), round(bad), last=(last := window.step + 1 == self.total_steps))
        if reason or (last and self.bad.bad):  # on every rank
            self.bad.say_left_out(reason, self.over_ranks(dict(self.bad.kinds)), self.global_rank)

    def objects_to(self, norm: Tensor, of_parts: Mapping[str, Tensor] | None = None) -> bool:
        """Whether the update with gradients of this norm, over all ranks and parameters, is left out."""
        self.grad_norms = name_norms(norm, of_parts or {})
        self.left_out = self.guard.reason_to_skip(float(norm), self.global_step + 1)
        return self.left_out is not None

    def settle_update(self, *, opened: bool = False) -> None:
        """Hear, before the next update or log line, whether a GPU vetoed the last one. `opened`: the next has begun."""
        if (late := self.late) is not None:
            self.late, self.left_out = None, self.guard.reason_to_skip(late.read_norm(), late.step)
            self._follow_update(late.step, late.keys, opened=opened)
            self.left_out = None if opened else self.left_out

    def _follow_update(self, step: int, keys: list[str], *, opened: bool = False) -> None:
        """What an update that was made, or not, means for the schedule, the log and the guard."""
        if self.left_out is None:
            cast(Any, self.lr_schedulers()).step()
        else:
            self.meter.leave_out(opened=opened)
            self.guard.leave_out(step, self.left_out, keys, self.global_rank)

    def log_training(self) -> None:
        """Write what happened since the last log line, and check it."""
        row = self.meter.make_line(self.device)
        self._require_finite("training", row)
        groups = self.trainer.optimizers[0].param_groups
        row |= {f"lr/{g['name']}": max(o["lr"] for o in groups if o["name"] == g["name"]) for g in groups}
        row |= read_norms(self.grad_norms)
        self.write_metrics("train", row)

    def over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over ranks, by name. A rank may lack names: one without held-out samples has no sums to give."""
        everywhere = of_all_ranks(values, self.trainer.world_size)
        return {name: sum(one.get(name, 0.0) for one in everywhere) for one in everywhere for name in one}

    def _require_finite(self, what: str, row: Mapping[str, float]) -> None:
        if not all(math.isfinite(value) for value in row.values()):
            raise TrainingError(f"{what}: the loss is not finite at step {self.global_step}: {row}")

    def asked_to_stop(self) -> bool:
        """Whether any rank is. A collective: every rank calls it."""
        return self.over_ranks({"asked": float(bool(self.interrupt))})["asked"] > 0

    def require_healthy(self) -> None:
        """Raises TrainingError, on every rank, if a loss since the last log line or a weight is not finite."""
        held = [p for group in self.policy.groups for p in group.parameters]
        learned = [getattr(p, "ds_tensor", p) for p in held]  # ZeRO-3 keeps this rank's part there, and p empty
        if self.over_ranks({"sick": float(not all_finite([*learned, *self.meter.train.totals.values()]))})["sick"]:
            raise TrainingError(
                f"training: weights or loss are not finite at step {self.global_step}, so no checkpoint is written. "
                "The newest checkpoint is from before: lower optim.lr, or set trainer.max_grad_norm."
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the losses of a held-out batch."""
        self.held_out += len(batch.references)
        if batch.problems:
            self.held_out_bad += len(batch.problems)
            self.bad.record_problems("val", self.global_step, batch.problems, self.global_rank)
        together = cast(Any, self.trainer.strategy).shards_model  # a forward pass needs all ranks
        if not batch.references and not together:
            return
        # No gather: ranks may hold unequal numbers of held-out samples.
        context = StepContext(reference=self.lend_reference, most_of_ranks=most_of_ranks(self.trainer, self.device))
        for objective in self.objectives.values():
            for name, loss in objective(self.model, batch, context).items():
                self.meter.held_out.add_loss(name, replace(loss, metrics={}))

    def on_train_start(self) -> None:
        """Start the clock of the metrics."""
        self.first_steps.begin(self)
        gather = RankGather(self.device) if self.trainer.world_size > 1 else OneRank()
        self.context = StepContext(gather, self.lend_reference, most_of_ranks(self.trainer, self.device))
        self.meter.start_clock(self.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Wait for the next micro-batch, now that the callbacks are done."""
        self.meter.on_step_end()

    def on_validation_epoch_start(self) -> None:
        """Start the sums of the held-out loss."""
        self.meter.hold_out()
        self.held_out, self.held_out_bad = 0, 0

    def on_validation_epoch_end(self) -> None:
        """Compute and log the held-out loss."""
        seen = self.over_ranks({"good": float(self.held_out), "bad": float(self.held_out_bad)})
        self.bad.require_held_out(good=round(seen["good"]), bad=round(seen["bad"]))
        self.validation_metrics = self.meter.held_out.compute_means(self.over_ranks)
        self._require_finite("validation", self.validation_metrics)
        if self.validation_metrics:
            self.write_metrics("val", self.validation_metrics)

    def write_metrics(self, split: str, row: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl (the record of truth) and pass it to the loggers."""
        if self.global_rank:
            return
        clock = {"time": time.time(), "seconds": round(self.meter.count_seconds(), 3)}
        self.metrics_file.write_line({"step": self.global_step, **clock, "split": split, **row})
        for logger in self.trainer.loggers:
            logger.log_metrics({f"{split}/{k}": v for k, v in row.items()}, step=self.global_step)
        rest = self.meter.estimate_rest(self.global_step, self.total_steps) if split == "train" else 0.0
        said = f"{format_row(row)}{f'  left {format_duration(rest)}' if rest else ''}"
        print(f"step {self.global_step:>6}/{self.total_steps}  {split:<5}  {said}", flush=True)

    def configure_optimizers(self) -> Any:
        """One optimizer over the policy's groups, and its schedule."""
        optimizer = self.make_optimizer([group.as_dict() for group in self.policy.groups])
        return {"optimizer": optimizer, "lr_scheduler": self.make_schedule(optimizer)}
