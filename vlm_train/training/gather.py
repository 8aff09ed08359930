"""Collecting tensors from all ranks, injected into objectives so that no model knows of parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _gather_rows(tensor: Tensor) -> Tensor:
    """`[rows, ...]` of all ranks, one after the other."""
    tensor = tensor.contiguous()
    slices = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(slices, tensor)
    return torch.cat(slices)


class _WithGrad(torch.autograd.Function):
    """`_joined` whose gradients go back to the rank they belong to.

    That of torch (`torch.distributed.nn.functional.all_gather`) returns wrong ones over gloo where they come with other
    strides than contiguous, as einsum's do.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return _gather_rows(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        first = dist.get_rank() * ctx.rows
        return summed[first : first + ctx.rows]


class RankGather:
    """The gather of a process group. Unequal numbers of rows are padded for the way, as collectives need equal ones."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.device = dist.get_rank(), device

    def sizes(self, rows: int) -> list[int]:
        """The number of rows on every rank."""
        return [int(size) for size in _gather_rows(torch.tensor([rows], device=self.device)).tolist()]

    def __call__(self, tensor: Tensor, sizes: list[int], *, with_grad: bool) -> Tensor:
        """The rows of `tensor` of all ranks, one rank after the other."""
        most = max(sizes)
        padded = torch.cat([tensor, tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])
        whole = _WithGrad.apply(padded) if with_grad else _gather_rows(padded)
        if min(sizes) == most:
            return whole
        return torch.cat([whole[r * most : r * most + size] for r, size in enumerate(sizes)])


def most_of_ranks(trainer: Any, device: torch.device) -> Callable[[int], int]:
    """See `StepContext.most_of_ranks`."""
    if trainer.world_size == 1 or not trainer.strategy.shards_model:
        return int
    gather = RankGather(device)
    return lambda count: max(gather.sizes(count))
