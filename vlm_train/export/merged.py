"""Weights with their adapters folded in, without touching the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.models.adapters.quantize import quantized_layers


def find_quantized(module: nn.Module) -> str | None:
    """The name of a quantized layer, if there is one."""
    return next((name for name, _ in quantized_layers(module)), None)


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` under the names it had before adapters, each adapted weight with its adapters folded in.

    No layer may be quantized, see `unquantize_model`.
    """
    adapted: dict[str, Any] = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    inside = tuple(f"{name}." for name in adapted)
    state = {key: value for key, value in module.state_dict().items() if not key.startswith(inside)}
    for name, layer in adapted.items():
        base = layer.get_base_layer()
        state.update({f"{name}.{key}": value for key, value in base.state_dict().items()})
        for adapter in layer.active_adapters:
            merged = state[f"{name}.weight"].float() + layer.get_delta_weight(adapter).float()
            if adapter in layer.lora_magnitude_vector:  # DoRA: every output's weights get the length that was learned
                length = layer.lora_magnitude_vector[adapter].weight.float()
                merged *= (length / torch.linalg.vector_norm(merged, dim=1))[:, None]
            state[f"{name}.weight"] = merged.to(base.weight.dtype)
    return state


def unquantize_model(assembly: Any) -> Any:
    """`assembly` with its adapters, and all else that is not quantized, over a freshly read base in full precision.

    Merging into quantized weights would round the adapters away. The base is read a second time, so it has to be where
    it was, and both fit into memory.
    """
    from vlm_train.build import build_model
    from vlm_train.checkpoint.weights import load_init_from

    cfg = assembly.cfg.copy()
    cfg.peft.bits = None
    fresh = build_model(cfg, assembly.processor.tokenizer)
    load_init_from(fresh, cfg.init_from)
    skip = {f"{name}.weight" for name, _ in quantized_layers(assembly.model)}
    own = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, parameter in assembly.model.named_parameters():
            if name not in skip:
                own[name].copy_(parameter)
    return replace(assembly, model=fresh.train(assembly.model.training))
