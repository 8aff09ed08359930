"""Activation checkpointing of layers, whether they are in train or eval mode.

`transformers` skips it in eval mode, where frozen layers live here; and the reentrant form silently loses gradients
behind frozen inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_train.models.context import recomputed_context


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Make each layer forget its activations in forward and compute them again in backward.

    Names, parameters and `state_dict` stay as they are. Without gradients (evaluation, generation) nothing changes.
    """
    for layer in layers:
        if not isinstance(layer.forward, partial):
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, context_fn=recomputed_context(layer)
            )
