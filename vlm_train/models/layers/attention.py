"""Packed attention: each sequence of packed rows by itself, so that a row costs what its samples cost.

`transformers` knows it as the attention `packed`. Its mask function hands a `SequenceMask` to every layer in place of a
mask; where there is none (plain causal rows, an explicit mask, generation) it does what `sdpa` does.

    sequences              GPU                               CPU, or where those do not run
    causal                 FlashAttention (`varlen_attn`)    one after the other
    with attention groups  FlexAttention, block-sparse       one after the other, each with its explicit mask

Legend: B rows, T tokens, H query heads, K key heads, C channels a head, L tokens of one sequence, N tokens (of a batch:
B x T).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.batch import PackedSequences, SequenceMask
from vlm_train.errors import ConfigError
from vlm_train.models.layers.block_sparse import attend_by_blocks, blocks_run, heads_fit, make_blocks
from vlm_train.models.layers.masks import block_mask_rule
from vlm_train.models.layers.one_by_one import attend_one_by_one

PACKED = "packed"


@dataclass
class _Decoding:
    running: bool = False
    mask: SequenceMask | None = None


_decoding = _Decoding()  # no ContextVar: `torch.compile` breaks its graphs there


@dataclass(frozen=True, kw_only=True)
class LayerMask:
    """What a layer gets in place of a mask.

    Attributes:
        causal, masked, groups: as in `SequenceMask`.
        window: tokens that a query sees, its own included; None: all of its sequence so far.
        longest: `[max_length of causal]`, a tensor of that size without memory: `torch.compile` keeps sizes open, but
            compiles a layer again for another number.
        blocks: the `BlockMask` of `masked`, where FlexAttention runs.
        causal_blocks: the same of `causal`, under the attention `flex`.
    """

    causal: PackedSequences | None
    masked: PackedSequences | None
    groups: Tensor | None
    window: int | None
    longest: Tensor | None
    blocks: Any
    causal_blocks: Any = None


@contextmanager
def decoding(mask: SequenceMask | None) -> Iterator[None]:
    """A model with packed attention attends along `mask` inside the `with`; None: plain causal rows, whatever mask of
    tokens it is given."""
    before = _decoding.running, _decoding.mask
    _decoding.running, _decoding.mask = True, mask
    try:
        yield
    finally:
        _decoding.running, _decoding.mask = before


def register_packed() -> None:
    """Make `transformers` know the attention `packed`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, packed_mask)


def packed_mask(
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    causal_blocks: bool = False,
    **options: Any,
) -> Any:
    """The mask function of `transformers`: once a forward for every kind of layer, `local_size` its sliding window.

    Args:
        causal_blocks: causal sequences get a `BlockMask` too.

    Raises:
        ConfigError: there are sequences, but the model wants anything but causal attention.
    """
    from transformers.masking_utils import sdpa_mask

    if not _decoding.running or _decoding.mask is None:
        token_mask = None if _decoding.running else attention_mask
        return sdpa_mask(
            attention_mask=token_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **options
        )
    if not allow_is_causal_skip:  # the library's sign of a mask that `is_causal` cannot replace
        raise ConfigError("llm.attention: packed is causal, but this model wants another mask; choose sdpa or eager")
    return layer_mask(_decoding.mask, local_size, causal_blocks)


def layer_mask(mask: SequenceMask, window: int | None, causal_blocks: bool = False) -> LayerMask:
    """What layers with this sliding window get: made once a forward for all of them."""
    longest = blocks = of_causal = None
    if mask.causal is not None:
        longest = mask.causal.cu_seqlens.new_empty(()).expand(mask.causal.max_length)
        _keep_size_open(longest, mask.causal.cu_seqlens, mask.causal.index)
        if causal_blocks and blocks_run(mask.causal.cu_seqlens):
            groups = mask.causal.cu_seqlens.new_zeros(sum(mask.causal.lengths))
            of_causal = make_blocks(block_mask_rule(mask.causal, groups, window), groups)
    if mask.masked is not None:
        assert mask.groups is not None
        _keep_size_open(mask.masked.cu_seqlens, mask.masked.index, mask.groups)
        if blocks_run(mask.groups):
            blocks = make_blocks(block_mask_rule(mask.masked, mask.groups, window), mask.groups)
    return LayerMask(
        causal=mask.causal,
        masked=mask.masked,
        groups=mask.groups,
        window=window,
        longest=longest,
        blocks=blocks,
        causal_blocks=of_causal,
    )


def _keep_size_open(*tensors: Tensor | None) -> None:
    """Let `torch.compile` take the first size of these tensors for one that changes."""
    for tensor in tensors:
        if tensor is not None and not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | LayerMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attend: Callable[..., Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers`: `[B, H, T, C]`, twice `[B, K, T, C]` -> `[B, T, H, C]`.

    Args:
        attend: takes the place of `attend_causal`.

    Raises:
        ConfigError: the layer adds something to its scores (older releases drop it silently), or there are sequences
            that did not reach it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if extra := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ConfigError(f"llm.attention: packed knows no {', '.join(extra)}, which this model uses; choose eager")
    if not isinstance(attention_mask, LayerMask):
        if _decoding.mask is not None:
            raise ConfigError(
                "llm.attention: packed got no sequences, for this model makes its masks itself; choose sdpa"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    rows, length = query.shape[0], query.shape[2]
    query, key, value = (_flatten_rows(one) for one in (query, key, value))
    flat = value.new_empty(rows * length, query.shape[1], value.shape[2])
    causal = attend or attend_causal
    for sequences, by in ((attention_mask.causal, causal), (attention_mask.masked, attend_masked)):
        if sequences is None:
            continue
        if (index := sequences.index) is None:
            flat = by(query, key, value, attention_mask, dropout, scaling)
        else:
            part = by(query[index], key[index], value[index], attention_mask, dropout, scaling)
            flat = flat.index_copy(0, index, part)
    return flat.unflatten(0, (rows, length)), None


def attend_causal(
    query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, dropout: float, scaling: float | None
) -> Tensor:
    """Tokens of the causal sequences: `[N, H, C]`, twice `[N, K, C]` -> `[N, H, C]`."""
    assert mask.causal is not None
    if kernel_fits(query, value, dropout):
        return _by_kernel(query, key, value, mask, scaling)
    return attend_one_by_one(query, key, value, mask.causal, window=mask.window, dropout=dropout, scaling=scaling)


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, dropout: float, scaling: float | None
) -> Tensor:
    """Tokens of the sequences with attention groups; shapes as in `attend_causal`."""
    assert mask.masked is not None
    if mask.blocks is not None and dropout == 0.0 and heads_fit(query, value):
        return attend_by_blocks(query, key, value, mask.blocks, scaling)
    return attend_one_by_one(
        query, key, value, mask.masked, groups=mask.groups, window=mask.window, dropout=dropout, scaling=scaling
    )


def _flatten_rows(states: Tensor) -> Tensor:
    """`[B, H, T, C]` -> `[N, H, C]`, in the precision of autocast, which knows the kernel as little as rotations."""
    return states.transpose(1, 2).flatten(0, 1).to(autocast_dtype(states))


def autocast_dtype(states: Tensor) -> torch.dtype:
    """What autocast would make of `states`, if it runs; else what they are."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def kernel_fits(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's FlashAttention takes it: 16 bits on Ampere or newer, equal heads of 8, 16, ..., 256 channels."""
    channels = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and dropout == 0.0
        and value.shape[-1] == channels <= 256
        and channels % 8 == 0
    )


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, scaling: float | None) -> Tensor:
    """All causal sequences in one call; shapes as in `attend_causal`."""
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(kernel).parameters:  # torch 2.11 has it not
            options["enable_gqa"] = True
        else:
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    assert mask.causal is not None and mask.longest is not None
    starts, longest = mask.causal.cu_seqlens, mask.longest.shape[0]
    back = -1 if mask.window is None else mask.window - 1  # the kernel does not count the query's own token
    window = (back, 0)
    return kernel(query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, **options)
