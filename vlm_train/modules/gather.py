"""Collecting tensors from all ranks, injected into objectives so that no model knows of parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from vlm_train.objectives.base import Gather, identity_gather


class RankGather:
    """The gather of a process group. Unequal numbers of rows are padded for the way, as collectives need equal ones."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.device = dist.get_rank(), device

    def sizes(self, rows: int) -> list[int]:
        """Rows of every rank."""
        return [int(size) for size in self._plain(torch.tensor([rows], device=self.device)).tolist()]

    def __call__(self, tensor: Tensor, sizes: list[int], *, with_grad: bool) -> Tensor:
        """See `Gather`."""
        most = max(sizes)
        padded = torch.cat([tensor, tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])
        whole = torch.cat(list(all_gather(padded))) if with_grad else self._plain(padded)
        if min(sizes) == most:
            return whole
        return torch.cat([whole[r * most : r * most + size] for r, size in enumerate(sizes)])

    def _plain(self, tensor: Tensor) -> Tensor:
        slices = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(slices, tensor.contiguous())
        return torch.cat(slices)


def gather_for(world: int, device: torch.device) -> Gather:
    """The gather of `world` ranks."""
    return RankGather(device) if world > 1 else identity_gather


def of_all_ranks(value: Any, world: int) -> list[Any]:
    """A plain value of every rank, by rank. A collective, with a wait for the slowest."""
    if world == 1:
        return [value]
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, value)
    return everywhere
