"""What the sides of the trainer's benchmarks train: a small LLaVA on made batches, or a model without work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vlm_train.build import build_lr_schedule, build_model, build_objectives, build_optimizer
from vlm_train.config.compose import compose_config
from vlm_train.contracts.batch import IGNORE, Batch, MediaBatch, Slots, TokenStream, Window
from vlm_train.contracts.family import Family
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.models.vision.example import blank_input
from vlm_train.training.meta_batch import visual_tokens
from vlm_train.training.params import Policy, apply_policy

LOG_EVERY = 10
CLIP = 1.0


@dataclass
class Clock:
    """Times of the ends of steps."""

    skip: int = 3
    ends: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.ends.append(time.perf_counter())

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
    clock: Callable[[], Clock] = Clock

    def loss(self, batch: Batch) -> Tensor:
        """The loss as one writes it: means of this batch."""
        total = torch.zeros(())
        for objective in self.objectives.values():
            for loss in objective(self.model, batch, StepContext()).values():
                total = total + loss.weight * loss.sum / loss.count
        return total

    def optimizers(self, steps: int) -> tuple[Any, Any]:
        """A fresh optimizer and its schedule."""
        optimizer = self.make_optimizer([group.as_dict() for group in self.policy.groups])
        return optimizer, self.make_schedule(optimizer, steps)

    def make_optimizer(self, groups: Any) -> Any:
        return build_optimizer(self.cfg, groups)

    def make_schedule(self, optimizer: Any, steps: int) -> Any:
        return build_lr_schedule(self.cfg, optimizer, total_steps=steps)

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
                    positions_total=text.ids.numel(),
                    supervised=int(count),
                ),
            )
            for step in range(steps)
        ]


def small_llava(rows: int, *overrides: str) -> Work:
    """The quickstart's LLaVA with rows of 180 tokens: made ids and pixels; connector and language model learn."""
    cfg = _config("recipe=easyvqa_stage2", "llm.config.vocab_size=2048", *overrides)
    model = build_model(cfg)
    return _work(cfg, model, build_objectives(cfg), _batch(model, rows, text=120, supervised=40))


class Toy(Family):
    """One weight matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width, width), 1e-3))


class ToyObjective(Objective):
    """A loss that costs nothing but reading one row."""

    streams = ("llm",)

    def __call__(self, model: nn.Module, batch: Batch, context: StepContext) -> dict[str, Loss]:
        return {"toy": Loss(model.get_parameter("weight")[0].sum(), torch.ones(()))}


def toy(width: int, *overrides: str) -> Work:
    """Nothing to compute: `width` squared parameters."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    media = MediaBatch(row=torch.zeros(0, dtype=torch.long))
    batch = Batch(text={"llm": _stream(ids, slots=0, supervised=1)}, media=media)
    cfg = _config("recipe=easyvqa_stage2", "params=all", *overrides)
    return _work(cfg, Toy(width), {"toy": ToyObjective()}, batch)


def _config(*overrides: str) -> DictConfig:
    fixed = ["init_from=[]", "eval=none", f"trainer.log_every={LOG_EVERY}", f"trainer.max_grad_norm={CLIP}"]
    fixed += ["trainer.val_every=null", "trainer.save_every=null", "trainer.accelerator=cpu"]
    return compose_config([*fixed, *overrides])


def _work(cfg: DictConfig, model: nn.Module, objectives: dict[str, Objective], batch: Batch) -> Work:
    policy = apply_policy(model, cfg.params.rules, weight_decay=cfg.optim.weight_decay)
    return Work(cfg, model, objectives, policy, batch)


def _batch(model: Any, rows: int, *, text: int, supervised: int) -> Batch:
    slots, images = visual_tokens(model), blank_input(model.vision, rows)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 2000, (rows, slots + text), generator=generator)
    images.values.random_(0, 256, generator=generator)
    media = MediaBatch(
        inputs={"vision": images},
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
