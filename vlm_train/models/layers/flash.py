"""The attention `flash`: as `packed`, but by the kernels of the flash-attn package, release 2, 3 or 4.

Causal sequences of packed rows go through its varlen kernel in one call, rows without a mask through its dense one.
What it has no kernel for (an explicit mask, attention groups, 32 bits outside of training) is done as under `packed`.

Legend: B rows, T tokens, H query heads, K key heads, C channels a head, N tokens of a batch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError
from vlm_train.models.layers.attention import LayerMask, autocast_dtype, packed_attention, packed_mask

FLASH = "flash"
REGISTERED = "fa_packed"
"""Its name in `transformers`, which takes names with "flash" for its own integration."""

RELEASES = (("flash_attn.cute", 4, (9, 0)), ("flash_attn_interface", 3, (9, 0)), ("flash_attn", 2, (8, 0)))
"""Module, release, and the least compute capability of its kernels. The first that is installed and runs is taken."""

MOST_CHANNELS = 256

OTHERS = "or choose llm.attention=packed and vision.attention=sdpa (packed at native resolution)."


@dataclass(frozen=True)
class FlashKernels:
    """`dense` takes `[B, T, H, C]`, `varlen` `[N, H, C]` and where sequences begin."""

    release: int
    dense: Callable[..., Any]
    varlen: Callable[..., Any]


def register_flash() -> None:
    """Make `transformers` know the attention. It needs the package only when it is chosen."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(REGISTERED, flash_attention)
    AttentionMaskInterface.register(REGISTERED, packed_mask)


@cache
def load_kernels() -> FlashKernels:
    """The kernels of the installed release.

    Raises:
        ConfigError: none is installed, or none runs on this GPU.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for name, release, least in RELEASES:
        try:
            module = importlib.import_module(name)
            kernels = FlashKernels(release, module.flash_attn_func, module.flash_attn_varlen_func)
        except (ImportError, AttributeError, OSError):  # OSError: built for other libraries
            continue
        if capability is None or capability >= least:
            return kernels
    asked = ", ".join(name for name, *_ in RELEASES)
    raise ConfigError(
        f"attention=flash: no flash-attn that runs here was found (looked for {asked}). Install it (pip install "
        f"flash-attn), {OTHERS}"
    )


def flash_attention(
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
        ConfigError: training in a type, on a device or with heads that the kernels do not take.
    """
    takes = not isinstance(attention_mask, Tensor) and not query.is_meta
    if takes and (problem := find_problem(query, value)) is not None:
        if module.training or torch.is_grad_enabled():
            raise ConfigError(f"attention=flash: {problem}, {OTHERS}")
        takes = False
    if isinstance(attention_mask, LayerMask) or not takes:
        by = attend_sequences if takes else None
        return packed_attention(module, query, key, value, attention_mask, dropout, scaling, attend=by, **options)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    dtype = autocast_dtype(query)
    rows = [states.transpose(1, 2).to(dtype) for states in (query, key, value)]
    wanted: dict[str, Any] = {
        "causal": bool(causal) and query.shape[2] > 1,
        "softmax_scale": scaling,
        "dropout_p": dropout,
    }
    return call_kernel(load_kernels().dense, *rows, **wanted), None


def attend_sequences(
    query: Tensor, key: Tensor, value: Tensor, mask: LayerMask, dropout: float, scaling: float | None
) -> Tensor:
    """Tokens of the causal sequences: `[N, H, C]`, twice `[N, K, C]` -> `[N, H, C]`."""
    assert mask.causal is not None and mask.longest is not None
    starts, longest = mask.causal.cu_seqlens, mask.longest.shape[0]
    wanted: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    wanted |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    wanted |= {"causal": True, "softmax_scale": scaling, "dropout_p": dropout}
    if mask.window is not None:
        wanted["window_size"] = (mask.window - 1, 0)  # the kernel does not count the query's own token
    return call_kernel(load_kernels().varlen, query, key, value, **wanted)


def call_kernel(kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **wanted: Any) -> Tensor:
    """What a kernel gives for the options that its release knows.

    Raises:
        ConfigError: it does not know one that would change the result.
    """
    known = _parameters_of(kernel)
    if lost := [name for name in ("dropout_p", "window_size") if wanted.get(name) and name not in known]:
        raise ConfigError(f"attention=flash: the installed release knows no {', '.join(lost)}; choose packed.")
    found = kernel(query, key, value, **{name: one for name, one in wanted.items() if name in known})
    return found[0] if isinstance(found, tuple) else found  # some releases add the log of the sums


@cache
def _parameters_of(kernel: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def find_problem(query: Tensor, value: Tensor) -> str | None:
    """What of the states `[B, H, T, C]` the kernels do not take, and what they do; None: they take them."""
    dtype, channels = autocast_dtype(query), query.shape[-1]
    if not query.is_cuda:
        return f"got tensors on {query.device.type}; allowed: a CUDA device"
    if dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"got {name}; allowed: 16 bits (trainer.precision=bf16-mixed, bf16-true or 16-mixed)"
    if channels > MOST_CHANNELS or channels % 8 or value.shape[-1] != channels:
        got = f"got heads of {channels} and {value.shape[-1]} channels"
        return f"{got}; allowed: equal multiples of 8 up to {MOST_CHANNELS}"
    return None
