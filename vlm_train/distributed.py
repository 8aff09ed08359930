"""What a process knows of the others. No torch import: the command line asks before that is needed."""

from __future__ import annotations

import os
from typing import Any


def process_rank() -> int:
    """This process's global rank as torchrun or srun set it; 0 without either."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def of_all_ranks(value: Any, world: int) -> list[Any]:
    """A plain value of every rank, by rank. A collective, with a wait for the slowest."""
    if world == 1:
        return [value]
    import torch.distributed as dist

    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, value)
    return everywhere
