"""Packed attention: each segment of packed rows by itself, so that a row costs what its samples cost.

`transformers` knows it as the attention `packed`. Its mask function hands the segments to every layer in place of a
mask; where there are none (plain causal rows, an explicit mask, generation) it does what `sdpa` does.

Legend: B rows, T tokens, H query heads, K key heads, C channels a head, L tokens of one segment, N = B x T.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.data.batch import Segments
from vlm_train.errors import ConfigError

PACKED = "packed"


@dataclass
class _Given:
    segments: Segments | None = None


_given = _Given()  # no ContextVar: `torch.compile` breaks its graphs there


@dataclass(frozen=True, kw_only=True)
class Spans:
    """What a layer gets in place of a mask.

    Attributes:
        segments: tokens of different ones do not see each other; inside one they are causal.
        window: tokens that a query sees, its own included; None: all of its segment so far.
    """

    segments: Segments
    window: int | None


@contextmanager
def given_segments(segments: Segments | None) -> Iterator[None]:
    """A model with packed attention, given no mask, attends along `segments` inside the `with`."""
    before, _given.segments = _given.segments, segments
    try:
        yield
    finally:
        _given.segments = before


def register_packed() -> None:
    """Make `transformers` know the attention `packed`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, packed_mask)


def packed_mask(*, local_size: int | None = None, allow_is_causal_skip: bool = True, **options: Any) -> Any:
    """The mask function of `transformers`: once a forward for every kind of layer, `local_size` its sliding window.

    Raises:
        ConfigError: there are segments, but the model wants anything but causal attention.
    """
    from transformers.masking_utils import sdpa_mask

    segments = _given.segments
    if segments is None:
        return sdpa_mask(local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **options)
    if not allow_is_causal_skip:  # the library's sign of a mask that `is_causal` cannot replace
        raise ConfigError("llm.attention: packed is causal, but this model wants another mask; choose sdpa or eager")
    return Spans(segments=segments, window=local_size)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Spans | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers`: `[B, H, T, C]`, twice `[B, K, T, C]` -> `[B, T, H, C]`.

    Raises:
        ConfigError: the layer adds something to its scores (older releases drop it silently), or there are segments
            that did not reach it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if extra := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ConfigError(f"llm.attention: packed knows no {', '.join(extra)}, which this model uses; choose eager")
    if not isinstance(attention_mask, Spans):
        if _given.segments is not None:
            raise ConfigError(
                "llm.attention: packed got no segments, for this model makes its masks itself; choose sdpa"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    shape = (query.shape[0], query.shape[2])
    query, key, value = (_flat(states) for states in (query, key, value))
    if _kernel_fits(query, value, dropout):
        flat = _by_kernel(query, key, value, attention_mask, scaling)
    else:
        flat = _one_by_one(query, key, value, attention_mask, dropout, scaling)
    return flat.unflatten(0, shape), None


def _flat(states: Tensor) -> Tensor:
    """`[B, H, T, C]` -> `[N, H, C]`, in the precision of autocast, which knows the kernel as little as rotations."""
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    return states.transpose(1, 2).flatten(0, 1).to(dtype)


def _kernel_fits(query: Tensor, value: Tensor, dropout: float) -> bool:
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


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float | None) -> Tensor:
    """All segments in one call: `[N, H, C]`, twice `[N, K, C]` -> `[N, H, C]`."""
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(kernel).parameters:  # torch 2.11 has it not
            options["enable_gqa"] = True
        else:
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    starts, longest = spans.segments.starts, max(spans.segments.lengths)
    back = -1 if spans.window is None else spans.window - 1  # the kernel does not count the query's own token
    window = (back, 0)
    return kernel(query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, **options)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, dropout: float, scaling: float | None
) -> Tensor:
    """Segment after segment, their lengths known without asking the device; shapes as in `_by_kernel`."""
    parts = []
    for states in zip(*(states.split(spans.segments.lengths) for states in (query, key, value)), strict=True):
        q, k, v = (one.transpose(0, 1)[None] for one in states)  # [1, H or K, L, C]
        mask = _near(q.shape[2], spans.window, q.device)
        part = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def _near(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Causal mask `[L, L]` of a window, or None if the window holds the whole segment."""
    if window is None or window >= length:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
