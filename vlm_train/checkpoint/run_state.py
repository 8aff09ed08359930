"""Where a run stands, besides its weights: collected for a checkpoint, and restored from one."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from vlm_train.checkpoint.generators import rng_state, set_rng_state
from vlm_train.checkpoint.resume import Resume
from vlm_train.checkpoint.state import restore_pieces
from vlm_train.distributed import of_all_ranks


def collect_run_state(trainer: Any) -> bytes:
    """The content of `state.ckpt`, as `restore_run` takes it. A collective: every rank calls it."""
    module, world = trainer.lightning_module, trainer.world_size
    state: dict[str, Any] = {
        "global_step": trainer.global_step,
        "lr_schedulers": [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs],
        "since_log": collect_counts(module),
        "loss_scaler": trainer.strategy.scaler_state(),
        "callbacks": {one.state_key: held for one in trainer.callbacks if (held := one.state_dict())},
        "rng": of_all_ranks(rng_state(), world),
    }
    state |= {type(one).__qualname__: held for one in _parts(trainer) if (held := one.state_dict())}
    for callback in trainer.callbacks:
        callback.on_save_checkpoint(trainer, module, state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore_run(trainer: Any, resumed: Resume) -> None:
    """Go on where a checkpoint was written.

    Called once, by `Checkpoints.on_fit_start`: model and optimizer are in place, no data has been asked for yet. The
    model holds its learned weights already: `fit` loads them while it is whole, before a strategy cuts it.

    Raises:
        CheckpointError: what learns is not what learned.
    """
    module = trainer.lightning_module
    state = torch.load(resumed.state, map_location="cpu", weights_only=True)

    # The optimizer: its states, the exact weights behind 16-bit ones, the loss scale, the step.
    restore_pieces(trainer.strategy, module.policy.named, resumed.folder)
    trainer.strategy.load_scaler_state(state.get("loss_scaler", {}))
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    progress.ready = progress.completed = state["global_step"]

    # The schedule, and the rates it has reached.
    (schedule,) = [one.scheduler for one in trainer.lr_scheduler_configs]
    schedule.load_state_dict(state["lr_schedulers"][0])
    for group, rate in zip(trainer.optimizers[0].param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate

    # What is counted: sums since the last log line, bad samples, the guard.
    restore_counts(module, state["since_log"])

    # Where packing stands, fp16's scale, and what callbacks keep, each under the name of its class.
    for part in _parts(trainer):
        if (held := state.get(type(part).__qualname__)) is not None:
            part.load_state_dict(held)
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, state)
        if (held := state["callbacks"].get(callback.state_key)) is not None:
            callback.load_state_dict(held)

    # Last, as anything above may draw: the global generators, on the ranks that were there.
    if trainer.global_rank < len(state["rng"]):
        set_rng_state(state["rng"][trainer.global_rank])


def collect_counts(module: Any) -> dict[str, Any]:
    """The sums since the last log line, bad samples, the guard. A collective: every rank calls it."""
    return module.meter.export_state() | {
        "bad": module.bad.export_state(module.over_ranks(dict(module.bad.kinds))),
        "guard": module.guard.export_state(),
    }


def restore_counts(module: Any, held: Mapping[str, Any]) -> None:
    """Go on with what `collect_counts` gave: rank 0 takes the sums of all ranks."""
    module.bad.load_state(held["bad"], first_rank=module.global_rank == 0)
    module.guard.load_state(held["guard"])
    if module.global_rank == 0:
        module.meter.load_state(held, module.device)


def _parts(trainer: Any) -> list[Any]:
    return [one for one in (trainer.datamodule, trainer.precision_plugin) if one is not None]
