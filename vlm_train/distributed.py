"""What a process knows of the others. No torch import: the command line asks before that is needed."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

from omegaconf import DictConfig

from vlm_train.errors import ConfigError


def process_rank() -> int:
    """This process's global rank as torchrun or srun set it; 0 without either."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def count_started(kind: str) -> int:
    """Processes that train, as those who started them say; `kind` is `launch.kind`."""
    return int(os.environ.get("SLURM_NTASKS" if kind == "srun" else "WORLD_SIZE", 1))


def require_devices(cfg: DictConfig) -> None:
    """Raises ConfigError where this machine has not the GPUs that the run is to train on."""
    import torch

    found, wanted = torch.cuda.device_count(), cfg.launch.devices
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ConfigError(f"trainer.accelerator: got gpu, but {why}. Allowed here: auto or cpu.")
    local = cfg.launch.kind == "local" and cfg.trainer.accelerator != "cpu"
    if local and torch.cuda.is_available() and wanted > found:
        raise ConfigError(f"launch.devices: got {wanted}, but this machine has {found} GPUs.")


def say_once(text: str) -> None:
    """Prints what every process finds alike, on the first one."""
    if process_rank() == 0:
        print(text, flush=True)


def exit_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks Linux to send this process a signal when its parent is killed, so that no orphan goes on."""
    ctypes.CDLL(None).prctl(1, number)


def of_all_ranks(value: Any, world: int) -> list[Any]:
    """A plain value of every rank, by rank. A collective, with a wait for the slowest."""
    if world == 1:
        return [value]
    import torch.distributed as dist

    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, value)
    return everywhere
