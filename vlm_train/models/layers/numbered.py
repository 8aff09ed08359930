"""The numbered layers of a part: what is gathered, computed again and measured one by one."""

from __future__ import annotations

from torch import nn


def numbered_layers(part: nn.Module) -> list[nn.Module]:
    """The numbered layers of a part, if it has any; a list of modules, such as inserted blocks, is its own layers."""
    layers = part if isinstance(part, nn.ModuleList) else getattr(part, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []
