"""What an objective declares of itself, what it is given, and what it returns.

An objective is a plain callable. Inheriting from `Objective` gives the usual declarations; a class that declares all of
them itself need not inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from vlm_train.contracts.batch import Batch

NormalizedBy = Literal["tokens", "samples"]


@dataclass(frozen=True)
class Loss:
    """A loss as a sum, so that it can be normalized over the whole global batch.

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


class OneRank:
    """The gather of a single process."""

    rank = 0

    def sizes(self, rows: int) -> list[int]:
        return [rows]

    def __call__(self, tensor: Tensor, sizes: list[int], *, with_grad: bool) -> Tensor:
        return tensor


@dataclass(frozen=True)
class StepContext:
    """What an objective may ask for besides the model and the batch.

    Attributes:
        gather: collects tensors from all ranks.
        reference: `with context.reference() as reference:` gives the frozen second model. Nothing inside the `with`
            records gradients, so the trained model runs outside of it. None where the run has none.
        most_of_ranks: the largest of the counts that the ranks give; every rank asks. It says how often a part is
            called: strategies that spread its weights (ZeRO-3, FSDP2) gather them at every call, so ranks must make
            equally many. Under all others it gives a rank its own count back.
    """

    gather: Gather = field(default_factory=OneRank)
    reference: Callable[[], AbstractContextManager[Any]] | None = None
    most_of_ranks: Callable[[int], int] = int


class Objective(Protocol):
    """Computes named losses of a batch.

    Attributes:
        streams: the token streams that it reads.
        normalized_by: what the sum over a step is divided by: `tokens`, the weights of the learned tokens of the first
            of `streams`, or `samples`, their number.
        needs_whole_step: compares the samples of a step with each other (in-batch negatives), so that they can be
            neither cut into micro-batches nor packed.
        needs_reference: reads `context.reference`.
        needs: what the model must offer, protocols of `vlm_train.contracts.family`.
        columns: columns of numbers beside the shards (`columns:` of an entry of `data.train` and `data.val`) that it
            reads as `batch.columns[name]`, such as what a reference model said of the answers, computed once.
        top_tokens: columns beside the shards of what a teacher says of every token of the stream "llm", read as
            `batch.top_tokens[name]`.
        weight_rules: values of `batch.normalize` that it is right under, because it reads the weights of tokens as
            they are; empty: any.
    """

    streams: tuple[str, ...]
    normalized_by: NormalizedBy = "tokens"
    needs_whole_step: bool = False
    needs_reference: bool = False
    needs: tuple[type, ...] = ()
    columns: tuple[str, ...] = ()
    top_tokens: tuple[str, ...] = ()
    weight_rules: tuple[str, ...] = ()

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """The losses of one micro-batch, by name."""
        ...


def list_columns(objective: Any) -> tuple[str, ...]:
    """The columns beside the shards that an objective reads: those of numbers, and those of a teacher's tokens."""
    return (*getattr(objective, "columns", ()), *getattr(objective, "top_tokens", ()))
