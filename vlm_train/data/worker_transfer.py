"""Batches on their way out of a loader process: every tensor costs a shared file and its handover there, so the small
ones travel as plain bytes in the message itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch, map_tensors

LARGE = 2**18
"""Tensors of more bytes (pixels) travel alone: copying them costs more than a message."""

ALIGNMENT = 8  # bytes; no type of a batch is wider


class PackedTensor(NamedTuple):
    """Where a tensor lies among the bytes of a message."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class WorkerMessage:
    """Micro-batches with a `PackedTensor` instead of every small tensor, and the bytes that hold them all (once pinned:
    as a tensor `[bytes]` uint8)."""

    batches: list[Batch]
    small: bytearray | Tensor

    @classmethod
    def pack_batches(cls, batches: Sequence[Batch]) -> WorkerMessage:
        """Pack batches."""
        parts: list[bytes] = []
        end = 0

        def pack_tensor(tensor: Tensor) -> Tensor | PackedTensor:
            nonlocal end
            if tensor.nbytes > LARGE:
                return tensor
            data = tensor.numpy().tobytes()
            start, end = end, end + len(data)
            padding = -end % ALIGNMENT
            parts.extend((data, bytes(padding)))
            end += padding
            return PackedTensor(start, start + len(data), tensor.dtype, tensor.shape)

        packed = [map_tensors(batch, pack_tensor) for batch in batches]
        return cls(packed, bytearray().join(parts))

    def unpack_batches(self) -> list[Batch]:
        """The batches again; their small tensors are views of one."""
        small = self._joint_tensor()

        def unpack_tensor(packed: PackedTensor) -> Tensor:
            return small[packed.start : packed.stop].view(packed.dtype).reshape(packed.shape)

        return [map_tensors(batch, unpack_tensor, PackedTensor) for batch in self.batches]

    def _joint_tensor(self) -> Tensor:
        return self.small if isinstance(self.small, Tensor) else torch.frombuffer(self.small, dtype=torch.uint8)

    def pin_memory(self) -> WorkerMessage:
        """In page-locked memory (called by the DataLoader)."""
        return replace(
            self, batches=[batch.pin_memory() for batch in self.batches], small=self._joint_tensor().pin_memory()
        )
