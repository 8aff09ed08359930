"""Activation checkpointing of layers, whether they are in train or eval mode.

`transformers` skips it in eval mode, where frozen layers live here; and the reentrant form silently loses gradients
behind frozen inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
ATTENTION = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_flash_attention_forward",
    )
)


def checkpoint_layers(layers: Iterable[nn.Module], *, selective: bool = False) -> None:
    """Make each layer forget its activations in forward and compute them again in backward.

    Names, parameters and `state_dict` stay as they are. Without gradients (evaluation, generation) nothing changes.

    Args:
        selective: keep what attention and every second matrix product give; the rest is cheap to compute again.
    """
    again: Any = checkpoint
    if selective:  # `torch.compile` refuses a `context_fn`, and leaves those layers alone
        again = torch.compiler.disable(partial(checkpoint, context_fn=_keep_products))
    for layer in layers:
        if not isinstance(layer.forward, partial):
            layer.forward = partial(again, layer.forward, use_reentrant=False)


def _keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts that keep the results of attention and of every second product of a layer."""
    seen = {False: 0, True: 0}

    def choose_policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operator in PRODUCTS:
            seen[ctx.is_recompute] += 1
            if seen[ctx.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose_policy)
