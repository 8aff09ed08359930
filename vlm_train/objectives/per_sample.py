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


def sum_samples_by_source(batch: Batch, values: Tensor) -> dict[str, Tensor]:
    """Source -> `[K]`, its part of the sums of `values` `[M, K]`, one row a sample, as `Loss.sources`."""
    of_sample = [source for row in batch.sources for source in row]
    names = sorted(set(of_sample))
    if len(names) < 2:
        return {name: values.sum(dim=0) for name in names}
    number = torch.tensor([names.index(source) for source in of_sample]).to(values.device, non_blocking=True)
    sums = values.new_zeros(len(names), values.shape[1]).index_add_(0, number, values)
    return dict(zip(names, sums, strict=True))
