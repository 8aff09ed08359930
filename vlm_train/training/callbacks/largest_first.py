"""Runs the largest micro-batches of the plan before the first step, so that too little memory shows at once.

What is trained afterwards is bit for bit what it is without: the passes make no update, and what they count, draw and
scale is put back.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray

from vlm_train.checkpoint.generators import rng_state, set_rng_state
from vlm_train.data.loader import WindowStream
from vlm_train.data.order.sample_plan import Plan
from vlm_train.errors import TrainingError
from vlm_train.training.device import peak_memory
from vlm_train.training.first_step import COUNTED
from vlm_train.training.metrics import Meter

SEARCH_SECONDS = 60.0
"""How long steps are looked at, at most: a long plan has many alike."""


class Place(NamedTuple):
    """A micro-batch of the plan, and its size on the rank where it is largest."""

    step: int
    micro: int
    positions: int
    patches: int


@dataclass
class LargestFirst(pl.Callback):
    """The micro-batch with the most places for tokens (rows x the longest of them), and that with the most patches.

    Args:
        data: the run's data module, with its plan. Lengths are measured, if they are not yet.
    """

    data: Any
    done: bool = field(default=False, init=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is restored and nothing is trained. All ranks run the same places: rank 0 looks for them."""
        if self.done:
            return
        self.done = True
        found: Any = self._find_places(trainer) if trainer.is_global_zero else None
        places, looked, total = trainer.strategy.broadcast(found)
        for place in places:
            self._rehearse_step(trainer, pl_module, place)
        if trainer.is_global_zero:
            said = "; ".join(
                f"{one.positions:,} tokens, {one.patches:,} patches (step {one.step + 1})" for one in places
            )
            part = "" if looked == total else f" of the next {looked:,} steps of {total:,}"
            peak = peak_memory(trainer.strategy.root_device) / 2**30
            print(f"largest first: the largest micro-batches{part} fit: {said}; peak {peak:.1f} GiB", flush=True)

    def _find_places(self, trainer: pl.Trainer) -> tuple[list[Place], int, int]:
        """The places, the number of steps that were looked at, and how many there are."""
        samples = copy.deepcopy(self.data.train)  # measuring would have training compare lengths
        sizes = samples.measure_lengths(self.data.cache)
        first, last = trainer.global_step, self.data.plan.steps
        found = find_largest(self.data.plan, sizes.tokens, sizes.patches, first, last)
        return (*found, last - first)

    def _rehearse_step(self, trainer: Any, module: Any, place: Place) -> None:
        """A step of one micro-batch without an update."""
        samples = copy.deepcopy(self.data.train)  # files of its own: loader processes inherit the others
        stream = WindowStream(samples, self.data.plan, place.step, trainer.global_rank, module.normalize)
        batch = stream.load_window(place.step)[place.micro]
        assert batch.window is not None
        batch = replace(batch, window=replace(batch.window, micro=0, micro_count=1, problems=()))
        try:
            with leave_no_trace(trainer, module):
                module.training_step(batch.to(trainer.strategy.root_device), 0)
        except torch.cuda.OutOfMemoryError as error:
            raise TrainingError(
                f"trainer.largest_first: the micro-batch {place.micro + 1} of step {place.step + 1} does not fit into "
                f"memory: {place.positions:,} tokens with padding, {place.patches:,} patches. Lower batch.micro, "
                "data.max_length, data.pack, or data.pack_patches, recompute activations "
                f"(trainer.activation_checkpointing=full), or spread the weights (strategy). {error}"
            ) from error


def find_largest(
    plan: Plan, tokens: NDArray[Any], patches: NDArray[Any], first: int, last: int
) -> tuple[list[Place], int]:
    """The micro-batches of steps `first` to `last` with the most places for tokens and with the most patches, and how
    many steps were looked at. `tokens` and `patches` are those of all samples `[N]`."""
    most: list[Place] = [Place(-1, 0, -1, -1)] * 2
    end = time.monotonic() + SEARCH_SECONDS
    step = first
    for step in range(first, last):
        for rank in range(plan.world):
            for number, rows in enumerate(plan.step(step, rank)):
                index = [np.array([ref.index for ref in row], np.int64) for row in rows]
                longest = max((int(tokens[one].sum()) for one in index), default=0)
                seen = sum(int(patches[one].sum()) for one in index)
                place = Place(step, number, longest * len(rows), seen)
                most[0] = max(most[0], place, key=lambda one: (one.positions, one.patches))
                most[1] = max(most[1], place, key=lambda one: (one.patches, one.positions))
        if time.monotonic() > end:
            break
    return list(dict.fromkeys(place for place in most if place.step >= 0)), step + 1 - first


@contextmanager
def leave_no_trace(trainer: Any, module: Any) -> Iterator[None]:
    """Make a training step that makes no update, and put back what it counts, draws and scales."""
    strategy, progress = trainer.strategy, trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    rng, scaler, counted = rng_state(), strategy.scaler_state(), progress.state_dict()
    plugin = getattr(strategy.precision_plugin, "scaler", None)
    scale = None if plugin is None else plugin.state_dict()
    buffers = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    meter, bad, first_steps, skip = module.meter, module.bad, module.first_steps, module.guard.skip
    module.meter = Meter(module.over_ranks)
    module.bad, module.first_steps = copy.deepcopy(bad), _NotYet()
    module.guard.skip = [[module.global_step + 1, module.global_step + 1]]
    states = _hold_states(trainer)
    try:
        yield
    finally:
        del states
        module.meter, module.bad, module.first_steps, module.guard.skip = meter, bad, first_steps, skip
        progress.load_state_dict(counted)
        strategy.load_scaler_state(scaler)
        if plugin is not None:
            plugin.load_state_dict(scale)
        with torch.no_grad():
            for name, buffer in module.model.named_buffers():
                buffer.copy_(buffers[name])
        module.left_out, module.stopping, module.grad_norms = None, False, {}
        set_rng_state(rng)


def _hold_states(trainer: Any) -> list[torch.Tensor]:
    """Memory for the states that the optimizer makes in its first step: two numbers for each that learns, as Adam's."""
    optimizer = trainer.optimizers[0]
    if len(getattr(optimizer, "state", {})):
        return []
    held = [p for group in optimizer.param_groups for p in group["params"]]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in held]
    return [torch.empty(2 * p.numel(), dtype=p.dtype, device=p.device) for p in local]


class _NotYet:
    """In place of `FirstSteps`."""

    watch = None

    def take_counts(self, sums: list[float]) -> list[float]:
        return sums[: -len(COUNTED)]

    def look(self, module: Any) -> None: ...
