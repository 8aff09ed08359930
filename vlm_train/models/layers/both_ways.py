"""Attention inside sequences of a flat tensor, every token seeing all of its sequence: patches of many views at once.

Legend: N tokens, H heads, C channels a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import PackedSequences
from vlm_train.errors import ConfigError
from vlm_train.models.layers.attention import PACKED, kernel_fits
from vlm_train.models.layers.block_sparse import attend_by_blocks, blocks_run, make_blocks
from vlm_train.models.layers.flash import FLASH, call_kernel, find_problem, load_kernels
from vlm_train.models.layers.flex import FLEX, find_flex_problem

ATTENTIONS = (PACKED, FLASH, FLEX)


@dataclass(frozen=True, kw_only=True)
class WholeSequences(PackedSequences):
    """Sequences whose tokens see all of their own.

    Attributes:
        attention: `packed` (torch's kernel; one call for every length where it does not run), `flash` (the flash-attn
            package) or `flex` (FlexAttention).
        blocks: the `BlockMask` of `flex`, where it runs.
    """

    attention: str = PACKED
    blocks: Any = None


def check_attention(attention: str) -> str:
    """The attention of a tower. Raises `ConfigError` when there is none of that name, or flash-attn is missing."""
    if attention not in ATTENTIONS:
        raise ConfigError(f"vision.attention: {attention!r}; allowed: {', '.join(ATTENTIONS)}")
    if attention == FLASH:
        load_kernels()
    return attention


def pack_lengths(lengths: Sequence[int], device: torch.device, attention: str = PACKED) -> WholeSequences:
    """Sequences of these lengths, one after the other."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    blocks = None
    if attention == FLEX and blocks_run(starts):
        places = torch.arange(sum(lengths), device=device)
        blocks = make_blocks(_same_sequence(torch.bucketize(places, starts[1:], right=True)), places)
    return WholeSequences(
        lengths=tuple(lengths), max_length=max(lengths), cu_seqlens=starts, attention=attention, blocks=blocks
    )


def _same_sequence(sequence: Tensor) -> Callable[..., Tensor]:
    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sequence[query] == sequence[key]

    return rule


def attend_both_ways(query: Tensor, key: Tensor, value: Tensor, sequences: WholeSequences) -> Tensor:
    """Three times `[N, H, C]` -> `[N, H, C]`. One kernel call on GPUs in 16 bits; elsewhere one for every length.

    Raises:
        ConfigError: training in a type, on a device or with heads that `flash` or `flex` does not take.
    """
    attention, starts, longest = sequences.attention, sequences.cu_seqlens, sequences.max_length
    if attention != PACKED and not query.is_meta:
        problem = find_problem(query, value) if attention == FLASH else find_flex_problem(query, value)
        if problem is None and attention == FLASH:
            wanted: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": False}
            wanted |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
            return call_kernel(load_kernels().varlen, query, key, value, **wanted)
        if problem is None:
            return attend_by_blocks(query, key, value, sequences.blocks)
        if torch.is_grad_enabled():
            raise ConfigError(f"vision.attention={attention}: {problem}, or choose vision.attention={PACKED}.")
    if kernel_fits(query, value, 0.0):
        from torch.nn.attention import varlen

        kernel: Any = varlen.varlen_attn
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
