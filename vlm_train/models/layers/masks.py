"""The one mask builder: sequences and attention groups -> who may attend to whom.

Every attention pattern of the framework is this one rule over two integer tensors:

    query q may attend to key k  if  segment[q] == segment[k]
                                and  (group[k] <= 0  or  group[k] == group[q])          shared, or the same branch
                                and  (k <= q  or  (group[k] == group[q] < 0))           causal, or a bidirectional block

group 0 is causal and shared by its whole segment; group n > 0 is a private branch (one of several independent
question-answer pairs of an image: it sees the shared prefix and itself); group n < 0 is a shared block whose tokens see
each other in both directions (the tokens of an image, the prefix of a prefix-LM), a number of its own for each.

Position ids are no part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm_train.contracts.batch import PackedSequences


def may_attend(
    query: Tensor, key: Tensor, segment_q: Tensor, segment_k: Tensor, group_q: Tensor, group_k: Tensor
) -> Tensor:
    """The rule, for any shapes that broadcast: `query` and `key` are places in a row."""
    same_group = group_q == group_k
    visible = (group_k <= 0) | same_group
    ordered = (key <= query) | (same_group & (group_k < 0))
    return (segment_q == segment_k) & visible & ordered


def attention_mask(segment_ids: Tensor, attention_group: Tensor, window: int | None = None) -> Tensor:
    """Boolean mask `[B, 1, T, T]`, True where row (query) may attend to column (key).

    Args:
        segment_ids: `[B, T]`; padding (0) attends only to padding, so that no row is empty.
        attention_group: `[B, T]`, see the module text.
        window: see `within_window`.
    """
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device)[None]
    (query, key), (segment_q, segment_k), (group_q, group_k) = (
        (one[:, :, None], one[:, None, :]) for one in (place, segment_ids, attention_group)
    )
    return within_window(may_attend(query, key, segment_q, segment_k, group_q, group_k)[:, None], window)


def within_window(mask: Tensor, window: int | None) -> Tensor:
    """A mask `[B, 1, T, T]` that leaves every query the last `window` of its keys, its own included; None: all.

    Keys are counted as the query sees them: a branch goes on where the prefix ends, whatever stands in between.
    """
    if window is None:
        return mask
    seen = count_seen(mask)
    return mask & (seen[..., :, None] - seen[..., None, :] < window)


def count_seen(mask: Tensor) -> Tensor:
    """Keys up to and including its own that each query of a mask `[..., T, T]` sees: `[..., T]`."""
    return mask.tril().sum(-1)


def block_mask_rule(sequences: PackedSequences, groups: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The rule as a `mask_mod` of FlexAttention, over the tokens of `sequences` one after the other."""
    place = torch.arange(len(groups), device=groups.device)
    sequence = torch.bucketize(place, sequences.cu_seqlens[1:], right=True)

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(query, key, sequence[query], sequence[key], groups[query], groups[key])

    if window is None:
        return rule
    near, seen = window, count_seen(attention_mask(sequence[None], groups[None]))[0, 0]

    def rule_within_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(batch, head, query, key) & (seen[query] - seen[key] < near)

    return rule_within_window


def both_ways(token_mask: Tensor) -> Tensor:
    """Boolean mask `[B, 1, T, T]` of rows that are one bidirectional block each; `token_mask` `[B, T]` marks tokens
    that are no padding."""
    return attention_mask(token_mask.int(), torch.full_like(token_mask, -1, dtype=torch.int32))
