"""The attention `flex`: as `packed`, but by FlexAttention, which is compiled and needs no other package.

Causal sequences of packed rows go through it in one call, as sequences with attention groups do under `packed` too.
Rows of one sample are done as under `packed`, as is everything outside of training where FlexAttention does not run.

Legend: B rows, T tokens, H query heads, K key heads, C channels a head, N tokens of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.layers.attention import LayerMask, packed_attention, packed_mask
from vlm_train.models.layers.block_sparse import LEAST_CHANNELS, attend_by_blocks, blocks_run, heads_fit

FLEX = "flex"
REGISTERED = "block_sparse"
"""Its name in `transformers`, which has an integration of its own under names with "flex"."""


def register_flex() -> None:
    """Make `transformers` know the attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(REGISTERED, block_sparse_attention)
    AttentionMaskInterface.register(REGISTERED, block_sparse_mask)


def block_sparse_mask(**options: Any) -> Any:
    """The mask function of `transformers`, see `packed_mask`."""
    return packed_mask(causal_blocks=True, **options)


def block_sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | LayerMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers`: `[B, H, T, C]`, twice `[B, K, T, C]` -> `[B, T, H, C]`.

    Raises:
        ConfigError: training on a device, with heads or with a dropout that FlexAttention does not take.
    """
    problem = find_flex_problem(query, value, dropout)
    if problem is not None and not query.is_meta and (module.training or torch.is_grad_enabled()):
        raise ConfigError(f"attention=flex: {problem}, or choose attention=packed.")
    by = attend_causal_blocks if problem is None else None
    return packed_attention(module, query, key, value, attention_mask, dropout, scaling, attend=by, **options)


def attend_causal_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, dropout: float, scaling: float | None
) -> Tensor:
    """Tokens of the causal sequences: `[N, H, C]`, twice `[N, K, C]` -> `[N, H, C]`."""
    return attend_by_blocks(query, key, value, mask.causal_blocks, scaling)


def find_flex_problem(query: Tensor, value: Tensor, dropout: float = 0.0) -> str | None:
    """What of states whose last size is a head's channels FlexAttention does not take; None: it takes them."""
    if not blocks_run(query):
        return f"got tensors on {query.device.type}, where it has no gradients; allowed: a CUDA device"
    if not heads_fit(query, value):
        return f"got heads of {query.shape[-1]} channels; allowed: at least {LEAST_CHANNELS}"
    if dropout:
        return f"got an attention dropout of {dropout}; allowed: 0"
    return None
