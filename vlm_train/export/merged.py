"""Weights with their low-rank adapters folded in, without touching the model."""

from __future__ import annotations

from torch import Tensor, nn


def quantised(module: nn.Module) -> str | None:
    """The name of an adapted layer whose base is quantised, if there is one."""
    adapted = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    return next((n for n, layer in adapted.items() if not layer.get_base_layer().weight.is_floating_point()), None)


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` under the names it had before adapters, each adapted weight with its adapters added.

    No adapted layer may be quantised, see `quantised`.
    """
    adapted = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    inside = tuple(f"{name}." for name in adapted)
    state = {key: value for key, value in module.state_dict().items() if not key.startswith(inside)}
    for name, layer in adapted.items():
        base = layer.get_base_layer()
        state.update({f"{name}.{key}": value for key, value in base.state_dict().items()})
        for adapter in layer.active_adapters:
            delta = layer.get_delta_weight(adapter)
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta.detach().to(base.weight.dtype)
    return state
