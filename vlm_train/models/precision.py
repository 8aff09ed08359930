"""Parameters in 16 bits."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from vlm_train.contracts.model_parts import find_layers


def cast_to_bf16(model: nn.Module) -> None:
    """Parameters in bf16 (`trainer.precision=bf16-true`), but quantized ones. Buffers stay: rotary ones lose positions
    in 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


HALVED = "halved"
"""The attribute in which a model keeps what `halve_frozen` made of it: it runs under autocast to that type only."""


def find_halvable(model: nn.Module) -> list[nn.Linear]:
    """The linear layers within numbered layers that are frozen and share no weight with anything else. None of DoRA,
    which takes the norm of the weight itself."""
    held = [parameter for module in model.modules() for parameter in module.parameters(recurse=False)]
    owners = Counter(map(id, held))

    def is_alone(module: nn.Module) -> bool:
        return all(not p.requires_grad and owners[id(p)] == 1 for p in module.parameters(recurse=False))

    dora = {id(module.base_layer) for module in model.modules() if len(getattr(module, "lora_magnitude_vector", ()))}
    inside = (module for layer in find_layers(model).values() for module in layer.modules())
    plain = (module for module in inside if type(module) is nn.Linear and not hasattr(module, "quantized"))
    return [module for module in plain if id(module) not in dora and is_alone(module)]


def halve_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Keep the weights of frozen products in `dtype`, that of autocast, which casts them so in every pass: the same
    numbers to the bit. All else (norms, embeddings, the head) stays as it is. Returns how many weights it was."""
    found = [p for layer in find_halvable(model) for p in layer.parameters(recurse=False) if p.dtype == torch.float32]
    for parameter in found:
        parameter.data = parameter.data.to(dtype)
    setattr(model, HALVED, dtype)
    return sum(parameter.numel() for parameter in found)
