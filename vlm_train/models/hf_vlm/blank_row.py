"""One more row for batches without images: it shows a blank image, and what it gives is not looked at.

Every rank then makes the same calls in the same order, and what comes before the language model gets gradients of zero.
Legend: B rows, T tokens of a row, W tokens of a row that the blank image fits in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import PackedSequences, SequenceMask


def add_row(tensor: Tensor, row: Tensor, width: int) -> Tensor:
    """`[B, T]` and a row of any length -> `[B + 1, W]`, filled up with zeros."""
    both = (tensor, row[None].to(tensor.dtype))
    return torch.cat([F.pad(one, (0, width - one.shape[1])) for one in both])


def extend_mask(mask: SequenceMask, rows: int, length: int, width: int) -> SequenceMask:
    """The mask of `[B, T]` for `[B + 1, W]`: what was added are sequences of their own."""
    groups, masked = mask.groups, _move(mask.masked, rows, length, width)
    added = [(row * width + length, width - length) for row in range(rows)] if width > length else []
    added.append((rows * width, width))
    return SequenceMask(causal=_move(mask.causal, rows, length, width, added), masked=masked, groups=groups)


def _move(
    sequences: PackedSequences | None, rows: int, length: int, width: int, added: Sequence[tuple[int, int]] = ()
) -> PackedSequences | None:
    """Sequences of rows of T tokens in rows of W, and `added` ones (start, length) behind them."""
    if sequences is None and not added:
        return None
    lengths, places = tuple(count for _, count in added), [torch.arange(start, start + count) for start, count in added]
    if sequences is not None:
        index = sequences.index
        if index is None:
            index = torch.arange(rows * length, device=sequences.cu_seqlens.device)
        lengths = (*sequences.lengths, *lengths)
        places = [index // length * width + index % length, *(one.to(index.device) for one in places)]
    found = torch.cat(places)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=found.device)
    return PackedSequences(lengths=lengths, max_length=max(lengths), cu_seqlens=starts, index=found)
