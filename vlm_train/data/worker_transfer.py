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


class Place(NamedTuple):
    """Where a tensor lies among the bytes of a parcel."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Parcel:
    """Micro-batches with a `Place` instead of every small tensor, and the bytes that hold them all (once pinned: as a
    tensor `[bytes]` uint8)."""

    batches: list[Batch]
    small: bytearray | Tensor

    @classmethod
    def pack_batches(cls, batches: Sequence[Batch]) -> Parcel:
        """Pack batches."""
        parts: list[bytes] = []
        end = 0

        def put_tensor(tensor: Tensor) -> Tensor | Place:
            nonlocal end
            if tensor.nbytes > LARGE:
                return tensor
            data = tensor.numpy().tobytes()
            start, end = end, end + len(data)
            padding = -end % ALIGNMENT
            parts.extend((data, bytes(padding)))
            place = Place(start, end, tensor.dtype, tensor.shape)
            end += padding
            return place

        packed = [map_tensors(batch, put_tensor) for batch in batches]
        return cls(packed, bytearray().join(parts))

    def unpack_batches(self) -> list[Batch]:
        """The batches again; their small tensors are views of one."""
        small = self._joint_tensor()

        def get_tensor(place: Place) -> Tensor:
            return small[place.start : place.stop].view(place.dtype).reshape(place.shape)

        return [map_tensors(batch, get_tensor, Place) for batch in self.batches]

    def _joint_tensor(self) -> Tensor:
        return self.small if isinstance(self.small, Tensor) else torch.frombuffer(self.small, dtype=torch.uint8)

    def pin_memory(self) -> Parcel:
        """In page-locked memory (called by the DataLoader)."""
        return replace(
            self, batches=[batch.pin_memory() for batch in self.batches], small=self._joint_tensor().pin_memory()
        )
