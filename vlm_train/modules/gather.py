"""Collecting tensors from all ranks, injected into objectives so that no model knows of parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from vlm_train.objectives.base import Gather, identity_gather


def rank_gather(tensor: Tensor, *, with_grad: bool) -> Tensor:
    """Tensors `[B, ...]` of all ranks, in rank order, as `[W * B, ...]`; every rank must hold equally many rows.

    `with_grad=True` sends gradients back to the rank that each slice came from (summed over ranks).
    """
    if with_grad:
        return torch.cat(list(all_gather(tensor)))
    slices = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(slices, tensor.contiguous())
    return torch.cat(slices)


def gather_for(world: int) -> Gather:
    """The gather of `world` ranks."""
    return rank_gather if world > 1 else identity_gather
