"""Strategies that keep the whole model on every device: one process, or DDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from vlm_train.checkpoint.pieces import Piece
from vlm_train.training.strategies.state import OwnState, torch_pieces


class Replicated(OwnState):
    """Single and DDP: rank 0 holds everything, so it writes everything."""

    device_can_veto = True

    def pieces(self, named: dict[str, nn.Parameter]) -> Iterator[Piece]:
        """Pieces of the optimizer's states, which rank 0 writes."""
        return torch_pieces(self.optimizers[0], named, owned=self.is_global_zero)

    def whole(self, named: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Every parameter as it is."""
        return ((name, parameter.detach()) for name, parameter in named.items())


class Single(Replicated, SingleDeviceStrategy):
    """One process on one device, "cpu" or "cuda:0"."""

    spans_processes = False

    def __init__(self, *, device: str) -> None:
        super().__init__(device=device)


class DDP(Replicated, DDPStrategy):
    """A copy of the model per process; gradients are averaged while backward still runs.

    Args:
        bucket_mib: gradients that travel together.
        timeout_minutes: a collective that takes longer ends the run.
    """

    def __init__(self, *, bucket_mib: int = 25, timeout_minutes: float = 30.0) -> None:
        super().__init__(
            bucket_cap_mb=bucket_mib,
            gradient_as_bucket_view=True,  # one copy of the gradients less
            timeout=timedelta(minutes=timeout_minutes),
        )

    @contextmanager
    def gradients_cross_ranks(self, last: bool) -> Iterator[None]:
        """Average gradients once a step: the last micro-batch's, added to those of the micro-batches before it."""
        if last:
            yield
        else:
            with self.block_backward_sync():
                yield

    def pre_backward(self, closure_loss: Tensor) -> None:
        """DDP's own forward has prepared it. Lightning prepares here what runs backward inside of forward."""
