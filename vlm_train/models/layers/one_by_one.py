"""Attention of packed sequences one after the other, for devices and precisions without a kernel for all at once.

Under `torch.compile` it is an operator: graphs hold no loop over sequences, whose number and lengths always change.

Legend: N tokens, H query heads, K key heads, C channels a head, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import PackedSequences
from vlm_train.models.layers.masks import attention_mask


def attend_one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PackedSequences,
    *,
    groups: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """`[N, H, C]`, twice `[N, K, C]` -> `[N, H, C]`: each sequence is causal, or as its attention groups `[N]` say."""
    if torch.compiler.is_compiling() and dropout == 0.0:  # dropout cannot be computed again in backward
        return _forward(query, key, value, sequences.cu_seqlens, groups, window, scaling)
    return _attend(query, key, value, sequences.lengths, groups, window, dropout, scaling)


@torch.compiler.disable  # it would be compiled again for other lengths
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    groups: Tensor | None,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    sizes = list(lengths)
    group_of = [None] * len(sizes) if groups is None else groups.split(sizes)
    parts = []
    for *states, group in zip(query.split(sizes), key.split(sizes), value.split(sizes), group_of, strict=True):
        q, k, v = (one.transpose(0, 1)[None] for one in states)  # [1, H or K, L, C]
        mask = _make_mask(q.shape[2], group, window, q.device)
        part = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def _make_mask(length: int, group: Tensor | None, window: int | None, device: torch.device) -> Tensor | None:
    """Mask `[L, L]` of one sequence; None: causal."""
    if group is not None:
        return attention_mask(torch.zeros_like(group)[None], group[None], window)[0, 0]
    if window is None or window >= length:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


@torch.library.custom_op("vlm_train::attend_one_by_one", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    return _attend(query, key, value, cu_seqlens.diff().tolist(), groups, window, 0.0, scaling)


@torch.library.custom_op("vlm_train::attend_one_by_one_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    groups: Tensor | None,
    window: int | None,
    scaling: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = cu_seqlens.diff().tolist()
    group_of = [None] * len(sizes) if groups is None else groups.split(sizes)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = query.shape[1] // key.shape[1]  # query heads of a key head
    parts = []
    for *states, group in zip(*(one.split(sizes) for one in (gradient, query, key, value)), group_of, strict=True):
        g, q, k, v = (one.transpose(0, 1).float() for one in states)  # [H or K, L, C]
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        mask = _make_mask(q.shape[1], group, window, q.device)
        if mask is None:
            mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        weights = (q @ k.mT * scale).masked_fill(~mask, float("-inf")).softmax(-1)
        of_weights = g @ v.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        of_key, of_value = (one.unflatten(0, (-1, shared)).sum(1) for one in (of_scores.mT @ q, weights.mT @ g))
        parts.append([one.transpose(0, 1).to(query.dtype) for one in (of_scores @ k, of_key, of_value)])
    of_query, of_key, of_value = (torch.cat(one) for one in zip(*parts, strict=True))
    return of_query, of_key, of_value


@_forward.register_fake
def _(query, key, value, cu_seqlens, groups, window, scaling):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


@_backward.register_fake
def _(gradient, query, key, value, cu_seqlens, groups, window, scaling):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _remember(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.window, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _go_back(ctx, gradient):  # type: ignore[no-untyped-def]
    return *_backward(gradient, *ctx.saved_tensors, ctx.window, ctx.scaling), None, None, None, None


_forward.register_autograd(_go_back, setup_context=_remember)
