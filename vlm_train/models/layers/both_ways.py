"""Attention inside sequences of a flat tensor, every token seeing all of its sequence: patches of many views at once.

Legend: N tokens, H heads, C channels a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import PackedSequences
from vlm_train.models.layers.attention import kernel_fits


def pack_lengths(lengths: Sequence[int], device: torch.device) -> PackedSequences:
    """Sequences of these lengths, one after the other."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return PackedSequences(lengths=tuple(lengths), max_length=max(lengths), cu_seqlens=starts)


def attend_both_ways(query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences) -> Tensor:
    """Three times `[N, H, C]` -> `[N, H, C]`. One kernel call on GPUs in 16 bits; elsewhere one for every length."""
    if kernel_fits(query, value, 0.0):
        from torch.nn.attention import varlen

        kernel: Any = varlen.varlen_attn
        starts, longest = sequences.cu_seqlens, sequences.max_length
        return kernel(query, key, value, starts, starts, longest, longest)
    return _attend_by_length(query, key, value, sequences.lengths)


@torch.compiler.disable  # it would be compiled again for other lengths
def _attend_by_length(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """All sequences of one length as a batch."""
    places: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        places[length].append(number)
    states = [one.split(list(lengths)) for one in (query, key, value)]
    parts: list[Tensor] = [query] * len(lengths)
    for numbers in places.values():
        q, k, v = (torch.stack([one[number] for number in numbers]).transpose(1, 2) for one in states)  # [n, H, L, C]
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        for number, part in zip(numbers, found, strict=True):
            parts[number] = part
    return torch.cat(parts)
