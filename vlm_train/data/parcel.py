"""Batches on their way out of a loader process: every tensor costs a file and a message there, so the small ones share
one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_train.data.batch import Batch, map_tensors

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
    """Micro-batches with a `Place` instead of every small tensor, and the `[bytes]` uint8 that hold them all."""

    batches: list[Batch]
    small: Tensor

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Parcel:
        """Pack batches."""
        parts: list[Tensor] = []
        end = 0

        def put(tensor: Tensor) -> Tensor | Place:
            nonlocal end
            if tensor.nbytes > LARGE:
                return tensor
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            start, end = end, end + len(flat)
            padding = -end % ALIGNMENT
            parts.extend((flat, flat.new_zeros(padding)) if padding else (flat,))
            place = Place(start, end, tensor.dtype, tensor.shape)
            end += padding
            return place

        packed = [map_tensors(batch, put) for batch in batches]
        return cls(packed, torch.cat(parts))

    def unpack(self) -> list[Batch]:
        """The batches again; their small tensors are views of one."""

        def get(place: Place) -> Tensor:
            return self.small[place.start : place.stop].view(place.dtype).reshape(place.shape)

        return [map_tensors(batch, get, Place) for batch in self.batches]

    def pin_memory(self) -> Parcel:
        """In page-locked memory (called by the DataLoader)."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches], small=self.small.pin_memory())
