"""Weights with their low-rank adapters folded in, without touching the model."""

from __future__ import annotations

from torch import Tensor, nn

from vlm_train.errors import ConfigError


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` under the names it had before adapters, each adapted weight with its adapters added.

    Raises:
        ConfigError: an adapted layer is quantised; its base must be loaded unquantised to merge into it.
    """
    adapted = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
    inside = tuple(f"{name}." for name in adapted)
    state = {key: value for key, value in module.state_dict().items() if not key.startswith(inside)}
    for name, layer in adapted.items():
        base = layer.get_base_layer()
        if not base.weight.is_floating_point():
            raise ConfigError(f"export: {name} is quantised; merge its adapter into an unquantised base model")
        state.update({f"{name}.{key}": value for key, value in base.state_dict().items()})
        for adapter in layer.active_adapters:
            delta = layer.get_delta_weight(adapter)
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta.detach().to(base.weight.dtype)
    return state
