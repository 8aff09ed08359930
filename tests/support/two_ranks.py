"""Ranks as threads of one process, so that a test sees the gradients of all of them in one graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.objective import StepContext


class ThreadGather:
    """The gather of one of several threads; gradients flow to the others only where they are asked for."""

    def __init__(self, rank: int, world: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world, self.board, self.barrier = rank, world, board, barrier

    def sizes(self, rows: int) -> list[int]:
        return list(self._exchange(rows))

    def __call__(self, tensor: Tensor, sizes: list[int], *, with_grad: bool) -> Tensor:
        parts = self._exchange(tensor if with_grad else tensor.detach())
        assert [len(part) for part in parts] == sizes
        return torch.cat(parts)

    def _exchange(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(timeout=60)
        found = list(self.board)
        self.barrier.wait(timeout=60)
        return found


def on_ranks(function: Callable[[Any, Any], Any], batches: Sequence[Any]) -> list[Any]:
    """`function(batch, context)` on as many ranks as there are batches."""
    world = len(batches)
    board, barrier = [None] * world, threading.Barrier(world)
    with ThreadPoolExecutor(world) as pool:
        contexts = [StepContext(ThreadGather(rank, world, board, barrier)) for rank in range(world)]
        return list(pool.map(function, batches, contexts))
