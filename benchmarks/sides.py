"""The same training in four hands: ours as `fit` drives it, a plain loop, bare Lightning, and the HF Trainer.

Same model object, batches, objectives, optimizer with its groups, schedule, gradient clipping, fp32. Ours does more: it
normalises over the whole step, logs means of every loss, rates and the gradient norm, watches for bad samples, losses
that are not finite and signals.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from vlm_train import config
from vlm_train.build import build_model
from vlm_train.callbacks.loop import Checkpoints, Evaluation
from vlm_train.data.batch import IGNORE, Batch, MediaBatch, Slots, TokenStream, Window
from vlm_train.dryrun.trace import image_size, visual_tokens
from vlm_train.modules.base import VLMModule
from vlm_train.objectives.base import Loss, Objective, identity_gather
from vlm_train.params import Policy, apply_policy
from vlm_train.trainer import loop_callbacks, make_trainer

LOG_EVERY = 10
CLIP = 1.0
NEVER = 10**9


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What time is: `cpu` is that of this process, which other programs disturb less."""


@dataclass
class Clock:
    """Times of the ends of steps."""

    kind: str = "wall"
    skip: int = 3
    ends: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.ends.append(CLOCKS[self.kind]())

    @property
    def step(self) -> float:
        """Seconds a step, from step `skip` on (those before it fill caches)."""
        return (self.ends[-1] - self.ends[self.skip - 1]) / (len(self.ends) - self.skip)


@dataclass
class Work:
    """What every side trains."""

    cfg: DictConfig
    model: nn.Module
    objectives: dict[str, Objective]
    policy: Policy
    batch: Batch
    clock: str = "wall"

    def loss(self, batch: Batch) -> Tensor:
        """The loss as one writes it: means of this batch."""
        total = torch.zeros(())
        for objective in self.objectives.values():
            for loss in objective(self.model, batch, identity_gather).values():
                total = total + loss.weight * loss.sum / loss.count
        return total

    def optimizers(self, steps: int) -> tuple[Any, Any]:
        """A fresh optimizer and its schedule."""
        optimizer = self.make_optimizer([group.as_dict() for group in self.policy.groups])
        return optimizer, self.make_schedule(optimizer, steps)

    def make_optimizer(self, groups: Any) -> Any:
        return instantiate(self.cfg.optim, _partial_=True, _convert_="all")(groups)

    def make_schedule(self, optimizer: Any, steps: int) -> Any:
        return instantiate(self.cfg.lr_schedule, _partial_=True, _convert_="all")(optimizer, total_steps=steps)

    @property
    def learned(self) -> list[nn.Parameter]:
        return [p for group in self.policy.groups for p in group.parameters]

    def batches(self, steps: int) -> list[Batch]:
        """The batch, as the first of every step."""
        text = next(iter(self.batch.text.values()))
        count = float(text.weights.sum())
        rows = len(text.ids)
        return [
            replace(
                self.batch,
                window=Window(
                    step=step,
                    micro=0,
                    micro_count=1,
                    sums={name: {"made": count} for name in self.batch.text} | {"samples": {"made": float(rows)}},
                    samples=rows,
                    tokens=text.ids.numel(),
                    places=text.ids.numel(),
                    supervised=int(count),
                ),
            )
            for step in range(steps)
        ]


def small_llava(rows: int, *overrides: str) -> Work:
    """The quickstart's LLaVA with rows of 180 tokens: made ids and pixels; connector and language model learn."""
    cfg = _config("recipe=easyvqa_stage2", "llm.config.vocab_size=2048", *overrides)
    model = build_model(cfg)
    objectives = {name: instantiate(node) for name, node in cfg.objective.items() if node is not None}
    return _work(cfg, model, objectives, _batch(model, rows, text=120, supervised=40))


class Toy(nn.Module):
    """One weight matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width, width), 1e-3))


class ToyObjective:
    """A loss that costs nothing but reading one row."""

    stream = "llm"

    def __call__(self, model: nn.Module, batch: Batch, gather: Any) -> dict[str, Loss]:
        return {"toy": Loss(model.get_parameter("weight")[0].sum(), torch.ones(()))}


def toy(width: int, *overrides: str) -> Work:
    """Nothing to compute: `width` squared parameters."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    media = MediaBatch(pixels=torch.zeros(1, 3, 8, 8, dtype=torch.uint8), row=torch.zeros(0, dtype=torch.long))
    batch = Batch(text={"llm": _stream(ids, slots=0, supervised=1)}, media=media)
    cfg = _config("recipe=easyvqa_stage2", "params=all", *overrides)
    return _work(cfg, Toy(width), {"toy": ToyObjective()}, batch)


def _config(*overrides: str) -> DictConfig:
    fixed = ["init_from=[]", "eval=none", f"trainer.log_every={LOG_EVERY}", f"trainer.clip_norm={CLIP}"]
    fixed += ["trainer.val_every=null", "trainer.save_every=null", "trainer.accelerator=cpu"]
    return config.compose([*fixed, *overrides])


def _work(cfg: DictConfig, model: nn.Module, objectives: dict[str, Objective], batch: Batch) -> Work:
    policy = apply_policy(model, cfg.params.rules, weight_decay=cfg.optim.weight_decay)
    return Work(cfg, model, objectives, policy, batch)


def _batch(model: Any, rows: int, *, text: int, supervised: int) -> Batch:
    slots, size = visual_tokens(model), image_size(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 2000, (rows, slots + text), generator=generator)
    media = MediaBatch(
        pixels=torch.randint(0, 256, (rows, 3, size.height, size.width), dtype=torch.uint8, generator=generator),
        view_counts=(1,) * rows,
        slot_counts=(slots,) * rows,
        row=torch.arange(rows),
        keys=tuple(str(row) for row in range(rows)),
    )
    return Batch(text={"llm": _stream(ids, slots=slots, supervised=supervised)}, media=media)


def _stream(ids: Tensor, *, slots: int, supervised: int) -> TokenStream:
    """Rows `[B, T]` of `slots` image tokens and text, of which the last `supervised` tokens are learned."""
    rows, length = ids.shape
    labels = torch.full_like(ids, IGNORE)
    labels[:, length - supervised :] = ids[:, length - supervised :]
    places = torch.arange(rows * length).view(rows, length)
    return TokenStream(
        ids=ids,
        labels=labels,
        weights=(labels != IGNORE).float(),
        positions=torch.arange(length).expand(1, rows, length),
        segment_ids=torch.ones_like(ids, dtype=torch.int32),
        attention_group=torch.zeros_like(ids, dtype=torch.int32),
        slots=Slots(index=places[:, :slots].flatten(), placeholders=rows * slots),
        supervised=places[:, length - supervised :].flatten(),
        plain_causal=True,
    )


def plain(work: Work, steps: int) -> Clock:
    """A loop as one writes it."""
    clock, batches = Clock(work.clock), work.batches(steps)
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
    clock = Clock(work.clock)
    with _quiet() as folder:
        plan: Any = SimpleNamespace(world=1, steps=steps)
        last = plan if saves is not None else SimpleNamespace(world=1, steps=NEVER)
        callbacks = loop_callbacks(
            work.cfg, last, Evaluation(None, {}, folder, every=None), folder, {"run_id": "benchmark"}, None
        )
        if saves is not None:
            _time_saves(callbacks, saves)
        module = VLMModule(
            work.model,
            work.objectives,
            work.policy,
            work.make_optimizer,
            partial(work.make_schedule, steps=steps),
            seed=0,
            total_steps=steps,
            folder=folder,
        )
        trainer = make_trainer(work.cfg, plan, [_Marks(clock), *callbacks], folder)
        trainer.fit(module, _Made(work.batches(steps)))
        if look:
            look(folder)
    return clock


def _time_saves(callbacks: Iterable[Any], saves: list[float]) -> None:
    (checkpoints,) = (one for one in callbacks if isinstance(one, Checkpoints))
    save = checkpoints._save

    def timed(*args: Any, **options: Any) -> None:
        start = time.perf_counter()
        save(*args, **options)
        saves.append(time.perf_counter() - start)

    checkpoints._save = timed  # type: ignore[method-assign]


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
    clock = Clock(work.clock)
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

    clock = Clock(work.clock)

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
    import warnings

    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(folder)
