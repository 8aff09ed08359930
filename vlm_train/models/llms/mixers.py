"""Mixers: what carries a token's state to the next ones other than attention, and so past the borders of a mask."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch import nn

MASKS = {"attention_mask", "mask"}
KINDS = ("linear", "conv", "mamba", "recurrent")


def mixers_without_mask(layers: Iterable[nn.Module], kinds: Iterable[str] = ()) -> list[str]:
    """What in `layers` mixes tokens, but takes no attention mask: kinds of layers, or names of classes.

    Told by structure: a convolution over time, a kind of layer (`layer_types` of the configuration) that says so, or a
    layer in which nothing takes a mask at all.
    """
    found = {kind for kind in kinds if any(word in kind for word in KINDS)}
    for layer in layers:
        modules = list(layer.modules())
        for module in modules:
            if any(isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children()):
                found.add(type(module).__name__)
        if not any(MASKS & inspect.signature(module.forward).parameters.keys() for module in modules):
            found.add(type(layer).__name__)
    return sorted(found)
