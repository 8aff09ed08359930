"""Sums over the tokens of each sample, for losses that are normalized by samples. Packed rows hold several samples.

Legend: B rows, T tokens, S chosen positions, M samples of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch, TokenStream


def sum_by_segment(batch: Batch, stream: TokenStream, index: Tensor, values: Tensor) -> Tensor:
    """`[M]`: the sum of `values` `[S]`, which belong to the flat positions `index` `[S]`, of every sample.

    Samples are in the order of `batch.keys`: row by row, segment by segment. Their number is known on the CPU, so
    nothing has to be asked of the device. A batch of padding has none.
    """
    counts = torch.tensor([len(row) for row in batch.keys])
    first = (counts.cumsum(0) - counts).to(index.device, non_blocking=True)  # [B], the number of a row's first sample
    number = (first[:, None] + stream.segment_ids.long() - 1).flatten()[index]
    return values.new_zeros(sum(map(len, batch.keys))).index_add(0, number, values)
