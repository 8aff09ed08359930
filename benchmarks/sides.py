"""The same training in four hands: ours as `fit` drives it, a plain loop, bare Lightning, and the HF Trainer.

Same model object, batches, objectives, optimizer with its groups, schedule, gradient clipping, fp32. Ours does more: it
normalizes over the whole step, logs means of every loss, rates and the gradient norm, watches for bad samples, losses
that are not finite and signals.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.work import CLIP, LOG_EVERY, Clock, Work
from vlm_train.contracts.batch import Batch
from vlm_train.training.callbacks.loop import Checkpoints, Evaluation
from vlm_train.training.module import VLMModule
from vlm_train.training.trainer import loop_callbacks, make_strategy, make_trainer

NEVER = 10**9
"""A step that is never reached."""


def plain(work: Work, steps: int) -> Clock:
    """A loop as one writes it."""
    clock, batches = work.clock(), work.batches(steps)
    optimizer, schedule = work.optimizers(steps)
    work.model.train()
    losses = []
    for step, batch in enumerate(batches, start=1):
        loss = work.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(work.learned, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            losses.append(loss.item())
        clock.tick()
    return clock


class _Marks(pl.Callback):
    """Ticks at the end of every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.tick()


class _Made:
    """A loader of batches that are there already. (Lightning takes a list for several loaders.)"""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def ours(work: Work, steps: int, saves: list[float] | None = None, look: Callable[[Path], None] | None = None) -> Clock:
    """The path of `fit`: module, trainer, callbacks. Saves only if `saves`, which gets seconds that each one blocks, is
    given (as `trainer.save_every` says); `look` sees the run folder before it is removed."""
    clock = work.clock()
    with _quiet() as folder:
        plan: Any = SimpleNamespace(world=1, steps=steps)
        last = plan if saves is not None else SimpleNamespace(world=1, steps=NEVER)
        module = VLMModule(
            work.model,
            work.objectives,
            work.policy,
            work.make_optimizer,
            partial(work.make_schedule, steps=steps),
            seed=0,
            total_steps=steps,
            max_grad_norm=work.cfg.trainer.max_grad_norm,
            folder=folder,
        )
        evaluation, facts = Evaluation(None, {}, folder), {"run_id": "benchmark", "frozen": []}
        callbacks = loop_callbacks(work.cfg, last, module, evaluation, facts, None, held_out=False)
        if saves is not None:
            _time_saves(callbacks, saves)
        trainer = make_trainer(work.cfg, plan, make_strategy(work.cfg, plan.world), [_Marks(clock), *callbacks], folder)
        trainer.fit(module, _Made(work.batches(steps)))
        if look:
            look(folder)
    return clock


def _time_saves(callbacks: Iterable[Any], saves: list[float]) -> None:
    (checkpoints,) = (one for one in callbacks if isinstance(one, Checkpoints))
    save = checkpoints.save

    def timed(*args: Any, **options: Any) -> None:
        start = time.perf_counter()
        save(*args, **options)
        saves.append(time.perf_counter() - start)

    checkpoints.save = timed  # type: ignore[method-assign]


class _Bare(pl.LightningModule):
    """What one writes for Lightning."""

    def __init__(self, work: Work, steps: int) -> None:
        super().__init__()
        self.model, self.work, self.steps = work.model, work, steps

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.work.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.work.optimizers(self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bare_lightning(work: Work, steps: int) -> Clock:
    """Lightning's Trainer with nothing but a module; it logs nothing."""
    clock = work.clock()
    with _quiet() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=CLIP,
            logger=False,
            callbacks=[_Marks(clock)],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(_Bare(work, steps), _Made(work.batches(steps)))
    return clock


class _WithLoss(nn.Module):
    """A model as the HF Trainer wants it: it returns its loss."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.model, self.work = work.model, work

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.work.loss(batch)}


def hf_trainer(work: Work, steps: int) -> Clock:
    """`transformers.Trainer`, which logs the loss as often."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = work.clock()

    class Marks(TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            clock.tick()

    with _quiet() as folder:
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=1,
            max_steps=steps,
            max_grad_norm=CLIP,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        Trainer(
            model=_WithLoss(work),
            args=arguments,
            data_collator=lambda rows: rows[0],
            train_dataset=[{"batch": batch} for batch in work.batches(steps)],  # type: ignore[arg-type]
            optimizers=work.optimizers(steps),
            callbacks=[Marks()],
        ).train()
    return clock


@contextmanager
def _quiet() -> Iterator[Path]:
    """A folder for a run, and nothing printed."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(folder)
