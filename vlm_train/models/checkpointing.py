"""Activation checkpointing of layers, whether they are in train or eval mode.

`transformers` skips it in eval mode, where frozen layers live here; and the reentrant form silently loses gradients
behind frozen inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_train.models.context import context_readers, recomputed_context


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Make each layer forget its activations in forward and compute them again in backward.

    Names, parameters and `state_dict` stay as they are. Without gradients (evaluation, generation) nothing changes.
    """
    for layer in layers:
        if not isinstance(layer.forward, partial):
            layer.forward = partial(_checkpoint_of(layer), layer.forward, use_reentrant=False)


def _checkpoint_of(layer: nn.Module) -> Any:
    """`checkpoint`, for layers that read a context one that `torch.compile` leaves alone: it refuses a `context_fn`."""
    if not context_readers(layer):
        return checkpoint
    return torch.compiler.disable(partial(checkpoint, context_fn=recomputed_context(layer)))
