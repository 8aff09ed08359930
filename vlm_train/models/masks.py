"""The one mask builder: segments and attention groups -> who may attend to whom, in the form an attention takes.

Every attention pattern of the framework is this one rule over two integer tensors:

    query q may attend to key k  if  segment[q] == segment[k]
                                and  (group[k] <= 0  or  group[k] == group[q])          shared, or the same branch
                                and  (k <= q  or  (group[k] == group[q] < 0))           causal, or a bidirectional block

group 0 is causal and shared by its whole segment; group n > 0 is a private branch (one of several independent
question-answer pairs of an image: it sees the shared prefix and itself); group n < 0 is a shared block whose tokens see
each other in both directions (the tokens of an image, the prefix of a prefix-LM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_train.data.batch import Segments, TokenStream


def attention_of(stream: TokenStream, takes_segments: bool) -> Tensor | Segments | None:
    """Who may attend to whom in `stream`, as cheap as it can be said.

    None: plain causal rows. Segments: causal samples in packed rows, where the attention takes them. Otherwise the
    mask `[B, 1, T, T]`.
    """
    if stream.plain_causal:
        return None
    if takes_segments and stream.segments is not None:
        return stream.segments
    return attention_mask(stream.segment_ids, stream.attention_group)


def attention_mask(segment_ids: Tensor, attention_group: Tensor) -> Tensor:
    """Boolean mask `[B, 1, T, T]`, True where row (query) may attend to column (key).

    Args:
        segment_ids: `[B, T]`; padding (0) attends only to padding, so that no row is empty.
        attention_group: `[B, T]`, see the module text.
    """
    seg_q, seg_k = segment_ids[:, :, None], segment_ids[:, None, :]
    group_q, group_k = attention_group[:, :, None], attention_group[:, None, :]
    same_group = group_q == group_k
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    causal = index[None, :] <= index[:, None]
    visible = (group_k <= 0) | same_group
    ordered = causal[None] | (same_group & (group_k < 0))
    return ((seg_q == seg_k) & visible & ordered)[:, None]


def both_ways(real: Tensor) -> Tensor:
    """Boolean mask `[B, 1, T, T]` of rows that are one bidirectional block each; `real` `[B, T]` marks no padding."""
    return attention_mask(real.int(), torch.full_like(real, -1, dtype=torch.int32))
