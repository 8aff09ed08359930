"""Callbacks that do to weights what nobody may: they write to frozen ones, or keep the optimizer from reaching them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from vlm_train.training.weights_watch import _local_part


class Touch(pl.Callback):
    """Writes to the frozen weight `name` before the first step, on the rank that `rank` says."""

    def __init__(self, *, name: str, rank: int = 0) -> None:
        self.name, self.rank = name, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and trainer.global_rank == self.rank:
            held = _local_part(pl_module.model.get_parameter(self.name))
            assert held.numel()
            held.view(-1)[0] += 1.0


class Hold(pl.Callback):
    """Puts the weights of a part back after every update, as if the optimizer had others."""

    def __init__(self, *, part: str) -> None:
        self.part = part

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        held = [_local_part(p) for n, p in pl_module.model.named_parameters() if n.startswith(f"{self.part}.")]
        kept = [tensor.clone() for tensor in held]
        assert held
        inner = trainer.strategy.optimizer_step

        def optimizer_step(*args: Any, **kwargs: Any) -> Any:
            made = inner(*args, **kwargs)
            with torch.no_grad():
                for tensor, before in zip(held, kept, strict=True):
                    tensor.copy_(before)
            return made

        trainer.strategy.optimizer_step = optimizer_step
