"""FlexAttention over the tokens of packed sequences: blocks in which no token sees another are skipped.

Legend: N tokens, H query heads, K key heads, C channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

LEAST_CHANNELS = 16
"""FlexAttention takes no heads of fewer."""


def blocks_run(tensor: Tensor) -> bool:
    """Whether FlexAttention has gradients on this tensor's device."""
    return tensor.is_cuda


def heads_fit(query: Tensor, value: Tensor) -> bool:
    """Whether it takes heads of so many channels."""
    return min(query.shape[-1], value.shape[-1]) >= LEAST_CHANNELS


def make_blocks(rule: Callable[..., Tensor], tokens: Tensor) -> Any:
    """The `BlockMask` of a rule over `tokens` `[N]`, whose values do not matter."""
    make = _compile_once(create_block_mask) if tokens.is_cuda else create_block_mask
    return make(rule, None, None, len(tokens), len(tokens), device=tokens.device)


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scaling: float | None = None) -> Tensor:
    """All sequences in one call: `[N, H, C]`, twice `[N, K, C]` -> `[N, H, C]`."""
    heads, shared = query.shape[1], query.shape[1] // key.shape[1]  # query heads, of a key head
    if shared > 1 and heads & (heads - 1):  # it shares key heads among powers of two only
        key, value, shared = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), 1
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))  # [1, H or K, N, C]
    attend: Callable[..., Any] = flex_attention
    if query.is_cuda and not torch.compiler.is_compiling():
        attend = _compile_once(flex_attention)
    return attend(q, k, v, block_mask=blocks, scale=scaling, enable_gqa=shared > 1)[0].transpose(0, 1)


@cache
def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """FlexAttention is fast only when compiled."""
    return torch.compile(function)
