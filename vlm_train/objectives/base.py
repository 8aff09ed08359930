"""What an objective is and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from vlm_train.data.batch import Batch


@dataclass(frozen=True)
class Loss:
    """A loss as a sum, so that it can be normalised over the whole global batch.

    Attributes:
        sum: scalar, the weighted sum over this micro-batch.
        count: the denominator's share of this micro-batch (sum of weights); the trainer divides by the global total.
        weight: factor of this loss in the total.
        metrics: further scalars to log, detached (accuracy, temperature ...).
        sources: where a source's part of the loss is known, data source -> `[2]`, its part of `sum` and `count`.
    """

    sum: Tensor
    count: Tensor
    weight: float = 1.0
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    sources: Mapping[str, Tensor] = field(default_factory=dict)


class Gather(Protocol):
    """Collects tensors from all ranks along dimension 0; the identity on one rank. Every rank makes the same calls."""

    rank: int

    def sizes(self, rows: int) -> list[int]:
        """How many rows every rank holds: the last step of an epoch, or a bad sample, makes them unequal."""
        ...

    def __call__(self, tensor: Tensor, sizes: list[int], *, with_grad: bool) -> Tensor:
        """`[rows, ...]` of all ranks, in rank order, as `[sum(sizes), ...]`.

        `with_grad=True` sends gradients back to the rank that each slice came from (summed over ranks).
        """
        ...


class Objective(Protocol):
    """Computes named losses of a batch.

    `stream` names the entry of `Window.sums` that normalises it: a token stream, or "samples".
    """

    stream: str

    def __call__(self, model: nn.Module, batch: Batch, gather: Gather) -> dict[str, Loss]: ...


class OneRank:
    """The gather of a single process."""

    rank = 0

    def sizes(self, rows: int) -> list[int]:
        return [rows]

    def __call__(self, tensor: Tensor, sizes: list[int], *, with_grad: bool) -> Tensor:
        return tensor


identity_gather = OneRank()
